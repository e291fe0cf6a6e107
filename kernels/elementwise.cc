#include "kernels/elementwise.h"

#include <cmath>

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/elementwise.cc"
#include "hwy/foreach_target.h"
// The rest is compiled once per target, so it has to follow foreach_target.h.
#include "hwy/highway.h"
#include "kernels/elementwise-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace firesteel::kernels {
namespace HWY_NAMESPACE {

// 1 / sqrt(mean(x²) + eps); the mean in double, as its error would be common to all outputs.
float InverseRms(const float* x, float eps, size_t n) {
  const double sum = SumInDouble(x, n, [](auto v) HWY_ATTR { return hn::Mul(v, v); });
  return static_cast<float>(1.0 /
                            std::sqrt(sum / static_cast<double>(n) + static_cast<double>(eps)));
}

template <class D, class V>
HWY_INLINE V Normalise(D d, V x, V inverse, V weight) {
  return hn::Mul(hn::Mul(x, inverse), hn::Add(hn::Set(d, 1.0f), weight));
}

void RmsNormImpl(const float* x, const float* weight, float eps, size_t n, float* out) {
  const hn::ScalableTag<float> d;
  const auto inverse = hn::Set(d, InverseRms(x, eps, n));
  Map2(d, x, weight, n, out, [&](auto v, auto w) HWY_ATTR { return Normalise(d, v, inverse, w); });
}

void RmsNormAddImpl(const float* x, const float* weight, float eps, size_t n, float* inout) {
  const hn::ScalableTag<float> d;
  const size_t lanes = hn::Lanes(d);
  const auto inverse = hn::Set(d, InverseRms(x, eps, n));
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto y = Normalise(d, hn::LoadU(d, x + i), inverse, hn::LoadU(d, weight + i));
    hn::StoreU(hn::Add(hn::LoadU(d, inout + i), y), d, inout + i);
  }
  if (const size_t r = n - i; r != 0) {
    const auto y = Normalise(d, hn::LoadN(d, x + i, r), inverse, hn::LoadN(d, weight + i, r));
    hn::StoreN(hn::Add(hn::LoadN(d, inout + i, r), y), d, inout + i, r);
  }
}

void AddImpl(const float* x, size_t n, float* inout) {
  Map2(hn::ScalableTag<float>(), x, inout, n, inout,
       [](auto a, auto b) HWY_ATTR { return hn::Add(b, a); });
}

void RopeImpl(const float* cosines, const float* sines, size_t dim, float* x) {
  const hn::ScalableTag<float> d;
  const size_t lanes = hn::Lanes(d);
  const size_t half = dim / 2;
  float* HWY_RESTRICT lower = x;
  float* HWY_RESTRICT upper = x + half;
  size_t i = 0;
  for (; i + lanes <= half; i += lanes) {
    const auto a = hn::LoadU(d, lower + i), b = hn::LoadU(d, upper + i);
    const auto c = hn::LoadU(d, cosines + i), s = hn::LoadU(d, sines + i);
    hn::StoreU(hn::NegMulAdd(b, s, hn::Mul(a, c)), d, lower + i);
    hn::StoreU(hn::MulAdd(a, s, hn::Mul(b, c)), d, upper + i);
  }
  if (const size_t r = half - i; r != 0) {
    const auto a = hn::LoadN(d, lower + i, r), b = hn::LoadN(d, upper + i, r);
    const auto c = hn::LoadN(d, cosines + i, r), s = hn::LoadN(d, sines + i, r);
    hn::StoreN(hn::NegMulAdd(b, s, hn::Mul(a, c)), d, lower + i, r);
    hn::StoreN(hn::MulAdd(a, s, hn::Mul(b, c)), d, upper + i, r);
  }
}

// x/2 · (1 + tanh u) = x / (1 + e^(−2u)): the second form does not cancel for negative x. The
// exponent is capped where e^ overflows to infinity, which gives the limit, 0.
void GeluMulImpl(const float* x, const float* factor, size_t n, float* out) {
  const hn::ScalableTag<float> d;
  const auto one = hn::Set(d, 1.0f);
  const auto cubic = hn::Set(d, 0.044715f);
  const auto minus_2_root = hn::Set(d, -1.5957691216057308f);  // −2·√(2/π)
  const auto limit = hn::Set(d, 100.0f);
  Map2(d, x, factor, n, out, [&](auto v, auto f) HWY_ATTR {
    const auto inner = hn::MulAdd(hn::Mul(hn::Mul(v, v), v), cubic, v);
    const auto e = ExpNaN(d, hn::Min(hn::Mul(minus_2_root, inner), limit));
    return hn::Mul(hn::Div(v, hn::Add(one, e)), f);
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace firesteel::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace firesteel::kernels {

HWY_EXPORT(RmsNormImpl);
HWY_EXPORT(RmsNormAddImpl);
HWY_EXPORT(AddImpl);
HWY_EXPORT(RopeImpl);
HWY_EXPORT(GeluMulImpl);
HWY_EXPORT(ScaleSoftCapImpl);
HWY_EXPORT(SoftplusImpl);
HWY_EXPORT(SoftmaxImpl);

void RmsNorm(const float* x, const float* weight, float eps, size_t n, float* out) {
  HWY_DYNAMIC_DISPATCH(RmsNormImpl)(x, weight, eps, n, out);
}

void RmsNormAdd(const float* x, const float* weight, float eps, size_t n, float* inout) {
  HWY_DYNAMIC_DISPATCH(RmsNormAddImpl)(x, weight, eps, n, inout);
}

void Add(const float* x, size_t n, float* inout) { HWY_DYNAMIC_DISPATCH(AddImpl)(x, n, inout); }

void Rope(const float* cosines, const float* sines, size_t dim, float* x) {
  HWY_DASSERT(dim % 2 == 0);
  HWY_DYNAMIC_DISPATCH(RopeImpl)(cosines, sines, dim, x);
}

void GeluMul(const float* x, const float* factor, size_t n, float* out) {
  HWY_DYNAMIC_DISPATCH(GeluMulImpl)(x, factor, n, out);
}

void ScaleSoftCap(const float* x, float scale, float cap, size_t n, float* out) {
  HWY_DYNAMIC_DISPATCH(ScaleSoftCapImpl)(x, scale, cap, n, out);
}

void Softplus(const float* x, size_t n, float* out) {
  HWY_DYNAMIC_DISPATCH(SoftplusImpl)(x, n, out);
}

void Softmax(const float* x, size_t n, float* out) {
  HWY_DASSERT(n >= 1);
  HWY_DYNAMIC_DISPATCH(SoftmaxImpl)(x, n, out);
}

}  // namespace firesteel::kernels
#endif  // HWY_ONCE
