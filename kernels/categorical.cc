#include "kernels/categorical.h"

#include <algorithm>
#include <limits>

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/categorical.cc"
#include "hwy/foreach_target.h"
// The rest is compiled once per target, so it has to follow foreach_target.h.
#include "hwy/highway.h"
#include "kernels/elementwise-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace firesteel::kernels {
namespace HWY_NAMESPACE {

// Max of vectors would take a NaN or leave it, depending on the target.
template <class V>
HWY_INLINE V LargerOf(V best, V v) {
  return hn::IfThenElse(hn::Gt(v, best), v, best);
}

float LargestLogitImpl(const float* logits, size_t n) {
  const hn::ScalableTag<float> d;
  const size_t lanes = hn::Lanes(d);
  const auto none = hn::Set(d, -std::numeric_limits<float>::infinity());
  auto m0 = none, m1 = none, m2 = none, m3 = none;
  size_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    m0 = LargerOf(m0, hn::LoadU(d, logits + i));
    m1 = LargerOf(m1, hn::LoadU(d, logits + i + lanes));
    m2 = LargerOf(m2, hn::LoadU(d, logits + i + 2 * lanes));
    m3 = LargerOf(m3, hn::LoadU(d, logits + i + 3 * lanes));
  }
  for (; i < n; i += lanes) {
    const size_t r = std::min(lanes, n - i);
    const auto v = hn::LoadN(d, logits + i, r);
    m0 = LargerOf(m0, hn::IfThenElse(hn::FirstN(d, r), v, none));
  }
  return hn::ReduceMax(d, LargerOf(LargerOf(m0, m1), LargerOf(m2, m3)));
}

// 1 / temperature; finite, so that the largest logit's weight is 1 at any temperature.
float InverseOf(float temperature) {
  return std::min(1.0f / temperature, std::numeric_limits<float>::max());
}

// Highway's Exp is 0 of NaN.
template <class D, class V>
HWY_INLINE V Weight(D d, V logit, V largest, V inverse) {
  return hn::Exp(d, hn::Mul(hn::Sub(logit, largest), inverse));
}

void CategoricalWeightsImpl(const float* logits, size_t n, float largest, float temperature,
                            float* weights) {
  const hn::ScalableTag<float> d;
  const auto top = hn::Set(d, largest), inverse = hn::Set(d, InverseOf(temperature));
  Map(d, logits, n, weights, [&](auto v) HWY_ATTR { return Weight(d, v, top, inverse); });
}

void CategoricalBlockSumsImpl(const float* logits, size_t n, float largest, float temperature,
                              double* sums) {
  const hn::ScalableTag<float> d;
  const size_t lanes = hn::Lanes(d);
  const auto top = hn::Set(d, largest), inverse = hn::Set(d, InverseOf(temperature));
  for (size_t begin = 0; begin < n; begin += kCategoricalBlock, ++sums) {
    const size_t end = std::min(n, begin + kCategoricalBlock);
    auto s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0;
    size_t i = begin;
    for (; i + 4 * lanes <= end; i += 4 * lanes) {
      s0 = hn::Add(s0, Weight(d, hn::LoadU(d, logits + i), top, inverse));
      s1 = hn::Add(s1, Weight(d, hn::LoadU(d, logits + i + lanes), top, inverse));
      s2 = hn::Add(s2, Weight(d, hn::LoadU(d, logits + i + 2 * lanes), top, inverse));
      s3 = hn::Add(s3, Weight(d, hn::LoadU(d, logits + i + 3 * lanes), top, inverse));
    }
    for (; i < end; i += lanes) {
      const size_t r = std::min(lanes, end - i);
      const auto weight = Weight(d, hn::LoadN(d, logits + i, r), top, inverse);
      s0 = hn::Add(s0, hn::IfThenElseZero(hn::FirstN(d, r), weight));
    }
    *sums = static_cast<double>(hn::ReduceSum(d, hn::Add(hn::Add(s0, s1), hn::Add(s2, s3))));
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace firesteel::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace firesteel::kernels {

HWY_EXPORT(LargestLogitImpl);
HWY_EXPORT(CategoricalWeightsImpl);
HWY_EXPORT(CategoricalBlockSumsImpl);

float LargestLogit(const float* logits, size_t n) {
  return HWY_DYNAMIC_DISPATCH(LargestLogitImpl)(logits, n);
}

void CategoricalWeights(const float* logits, size_t n, float largest, float temperature,
                        float* weights) {
  HWY_DASSERT(temperature > 0.0f);
  HWY_DYNAMIC_DISPATCH(CategoricalWeightsImpl)(logits, n, largest, temperature, weights);
}

void CategoricalBlockSums(const float* logits, size_t n, float largest, float temperature,
                          double* sums) {
  HWY_DASSERT(temperature > 0.0f);
  HWY_DYNAMIC_DISPATCH(CategoricalBlockSumsImpl)(logits, n, largest, temperature, sums);
}

}  // namespace firesteel::kernels
#endif  // HWY_ONCE
