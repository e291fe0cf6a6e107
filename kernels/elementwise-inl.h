// Vector forms of the transcendental functions, and the element-wise kernels that attention shares.

#if defined(FIRESTEEL_KERNELS_ELEMENTWISE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FIRESTEEL_KERNELS_ELEMENTWISE_INL_H_
#undef FIRESTEEL_KERNELS_ELEMENTWISE_INL_H_
#else
#define FIRESTEEL_KERNELS_ELEMENTWISE_INL_H_
#endif

#include <cstddef>

#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace firesteel::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// e^x for x ≤ 104, at most an ulp or two off; NaN stays NaN (Highway's Exp makes it 0).
template <class D, class V>
HWY_INLINE V ExpNaN(D d, V x) {
  return hn::IfThenElse(hn::IsNaN(x), x, hn::Exp(d, x));
}

// The sum of c[i] · x^i, c from the highest power down.
template <class D, class V, size_t kN>
HWY_INLINE V Polynomial(D d, V x, const float (&c)[kN]) {
  V sum = hn::Set(d, c[0]);
  for (size_t i = 1; i < kN; ++i) sum = hn::MulAdd(sum, x, hn::Set(d, c[i]));
  return sum;
}

// tanh to within an ulp or two, in a tenth of the time of Highway's where all lanes are below
// kSmall, as softcapped scores nearly always are. The polynomial is that of tanhf in S. Moshier's
// Cephes library. A lane's bits do not depend on the others.
template <class D, class V>
HWY_INLINE V TanhOfSmall(D d, V x) {
  constexpr float kSmall = 0.625f;
  constexpr float kPowers[] = {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f,
                               1.33314422036e-1f, -3.33332819422e-1f};
  const auto small = hn::Lt(hn::Abs(x), hn::Set(d, kSmall));
  const V square = hn::Mul(x, x);
  const V y = hn::MulAdd(hn::Mul(Polynomial(d, square, kPowers), square), x, x);
  return hn::AllTrue(d, small) ? y : hn::IfThenElse(small, y, hn::Tanh(d, x));
}

// ln(1 + t) for t in [0, 1], to within an ulp or two: t times the polynomial that has the values of
// ln(1 + t) / t at the Chebyshev nodes.
template <class D, class V>
HWY_INLINE V Log1pOfUnit(D d, V t) {
  constexpr float kPowers[] = {-0.0031760570f, 0.0195425265f, -0.0563736111f, 0.1054362357f,
                               -0.1526966691f, 0.1966327429f, -0.2495161593f, 0.3332971036f,
                               -0.4999989271f, 1.0f};
  return hn::Mul(t, Polynomial(d, t, kPowers));
}

// out[i] = fn(x[i]); in place is fine. The ragged end goes through the same instructions as the
// rest.
template <class D, class Fn>
HWY_INLINE void Map(D d, const float* x, size_t n, float* out, const Fn& fn) {
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) hn::StoreU(fn(hn::LoadU(d, x + i)), d, out + i);
  if (i != n) hn::StoreN(fn(hn::LoadN(d, x + i, n - i)), d, out + i, n - i);
}

// out[i] = fn(x[i], y[i]); out may be x or y.
template <class D, class Fn>
HWY_INLINE void Map2(D d, const float* x, const float* y, size_t n, float* out, const Fn& fn) {
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    hn::StoreU(fn(hn::LoadU(d, x + i), hn::LoadU(d, y + i)), d, out + i);
  }
  if (const size_t r = n - i; r != 0) {
    hn::StoreN(fn(hn::LoadN(d, x + i, r), hn::LoadN(d, y + i, r)), d, out + i, r);
  }
}

// Σ fn(x[i]) in double, lane by lane; fn maps a vector of double.
template <class Fn>
HWY_INLINE double SumInDouble(const float* x, size_t n, const Fn& fn) {
  const hn::ScalableTag<double> dd;
  const hn::Rebind<float, decltype(dd)> df;
  using V = hn::Vec<decltype(dd)>;
  const size_t lanes = hn::Lanes(dd);
  V s0 = hn::Zero(dd), s1 = s0, s2 = s0, s3 = s0;
  const auto load = [&](size_t i) HWY_ATTR { return hn::PromoteTo(dd, hn::LoadU(df, x + i)); };
  size_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    s0 = hn::Add(s0, fn(load(i)));
    s1 = hn::Add(s1, fn(load(i + lanes)));
    s2 = hn::Add(s2, fn(load(i + 2 * lanes)));
    s3 = hn::Add(s3, fn(load(i + 3 * lanes)));
  }
  for (; i + lanes <= n; i += lanes) s0 = hn::Add(s0, fn(load(i)));
  if (i != n) s1 = hn::Add(s1, fn(hn::PromoteTo(dd, hn::LoadN(df, x + i, n - i))));
  return hn::ReduceSum(dd, hn::Add(hn::Add(s0, s1), hn::Add(s2, s3)));
}

inline void ScaleSoftCapImpl(const float* x, float scale, float cap, size_t n, float* out) {
  const hn::ScalableTag<float> d;
  const auto vscale = hn::Set(d, scale);
  if (cap == 0.0f) {
    Map(d, x, n, out, [&](auto v) HWY_ATTR { return hn::Mul(v, vscale); });
    return;
  }
  const auto vcap = hn::Set(d, cap);
  const auto inner = hn::Set(d, scale / cap);
  Map(d, x, n, out,
      [&](auto v) HWY_ATTR { return hn::Mul(vcap, TanhOfSmall(d, hn::Mul(v, inner))); });
}

// max(x, 0) + ln(1 + e^−|x|): neither term overflows, and for x → −∞ it tends to e^x.
inline void SoftplusImpl(const float* x, size_t n, float* out) {
  const hn::ScalableTag<float> d;
  const auto zero = hn::Zero(d);
  Map(d, x, n, out, [&](auto v) HWY_ATTR {
    const auto tail = Log1pOfUnit(d, hn::Exp(d, hn::Neg(hn::Abs(v))));
    return hn::IfThenElse(hn::IsNaN(v), v, hn::Add(hn::Max(v, zero), tail));
  });
}

// A NaN or +∞ among x makes every output NaN.
inline void SoftmaxImpl(const float* x, size_t n, float* out) {
  const hn::ScalableTag<float> d;
  const size_t lanes = hn::Lanes(d);
  const auto lowest = hn::Set(d, hwy::LowestValue<float>());
  auto vmax = lowest;
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) vmax = hn::Max(vmax, hn::LoadU(d, x + i));
  if (i != n) vmax = hn::Max(vmax, hn::LoadNOr(lowest, d, x + i, n - i));
  vmax = hn::MaxOfLanes(d, vmax);

  Map(d, x, n, out, [&](auto v) HWY_ATTR { return ExpNaN(d, hn::Sub(v, vmax)); });
  const double sum = SumInDouble(out, n, [](auto v) HWY_ATTR { return v; });
  const auto inverse = hn::Set(d, static_cast<float>(1.0 / sum));
  Map(d, out, n, out, [&](auto v) HWY_ATTR { return hn::Mul(v, inverse); });
}

}  // namespace HWY_NAMESPACE
}  // namespace firesteel::kernels
HWY_AFTER_NAMESPACE();

#endif  // FIRESTEEL_KERNELS_ELEMENTWISE_INL_H_
