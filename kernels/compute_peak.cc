#include "kernels/compute_peak.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/compute_peak.cc"
#include "hwy/foreach_target.h"
// The rest is compiled once per target, so it has to follow foreach_target.h.
#include "hwy/highway.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace firesteel::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

double MultiplyAddsImpl(size_t steps, float* out) {
  const hn::ScalableTag<float> d;
  const auto a = hn::Set(d, out[0]), b = hn::Set(d, out[1]);
  // Each starts elsewhere, or the compiler would see that they are one and the same.
  const auto start = [&](int i) HWY_ATTR { return hn::Set(d, out[2] + static_cast<float>(i)); };
  auto s0 = start(0), s1 = start(1), s2 = start(2), s3 = start(3), s4 = start(4), s5 = start(5),
       s6 = start(6), s7 = start(7), s8 = start(8), s9 = start(9), s10 = start(10), s11 = start(11);
  for (size_t i = 0; i < steps; ++i) {
    s0 = hn::MulAdd(a, s0, b);
    s1 = hn::MulAdd(a, s1, b);
    s2 = hn::MulAdd(a, s2, b);
    s3 = hn::MulAdd(a, s3, b);
    s4 = hn::MulAdd(a, s4, b);
    s5 = hn::MulAdd(a, s5, b);
    s6 = hn::MulAdd(a, s6, b);
    s7 = hn::MulAdd(a, s7, b);
    s8 = hn::MulAdd(a, s8, b);
    s9 = hn::MulAdd(a, s9, b);
    s10 = hn::MulAdd(a, s10, b);
    s11 = hn::MulAdd(a, s11, b);
  }
  const auto sum = hn::Add(hn::Add(hn::Add(s0, s1), hn::Add(s2, s3)),
                           hn::Add(hn::Add(hn::Add(s4, s5), hn::Add(s6, s7)),
                                   hn::Add(hn::Add(s8, s9), hn::Add(s10, s11))));
  out[2] = hn::ReduceSum(d, sum);
  return 2.0 * 12.0 * static_cast<double>(steps * hn::Lanes(d));
}

}  // namespace HWY_NAMESPACE
}  // namespace firesteel::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace firesteel::kernels {

HWY_EXPORT(MultiplyAddsImpl);

double MultiplyAdds(size_t steps, float* values) {
  return HWY_DYNAMIC_DISPATCH(MultiplyAddsImpl)(steps, values);
}

}  // namespace firesteel::kernels
#endif  // HWY_ONCE
