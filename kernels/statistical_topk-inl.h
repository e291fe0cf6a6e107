// Threshold and compaction, shared by the FFN's predictor and by attention.

#if defined(FIRESTEEL_KERNELS_STATISTICAL_TOPK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FIRESTEEL_KERNELS_STATISTICAL_TOPK_INL_H_
#undef FIRESTEEL_KERNELS_STATISTICAL_TOPK_INL_H_
#else
#define FIRESTEEL_KERNELS_STATISTICAL_TOPK_INL_H_
#endif

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "hwy/cache_control.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace firesteel::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Two running moments of double lanes; four pairs hide the latency of the additions.
template <class V>
HWY_INLINE void AddMoments(V x, V origin, V& sum, V& squares) {
  const V difference = hn::Sub(x, origin);
  sum = hn::Add(sum, difference);
  squares = hn::MulAdd(difference, difference, squares);
}

inline double StatisticalThresholdImpl(const float* scores, size_t n, double quantile) {
  const hn::ScalableTag<double> dd;
  const hn::Rebind<float, decltype(dd)> df;
  using V = hn::Vec<decltype(dd)>;
  const size_t lanes = hn::Lanes(dd);
  const double first = static_cast<double>(scores[0]);
  const V origin = hn::Set(dd, first);
  V s0 = hn::Zero(dd), s1 = s0, s2 = s0, s3 = s0;
  V q0 = s0, q1 = s0, q2 = s0, q3 = s0;
  const auto load = [&](size_t i) HWY_ATTR { return hn::PromoteTo(dd, hn::LoadU(df, scores + i)); };
  size_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    // Of a prompt they come from another core's cache, more slowly than they are added.
    constexpr size_t kAhead = 1024, kLine = 16;
    for (size_t at = 0; at < 4 * lanes; at += kLine) hwy::Prefetch(scores + i + kAhead + at);
    AddMoments(load(i), origin, s0, q0);
    AddMoments(load(i + lanes), origin, s1, q1);
    AddMoments(load(i + 2 * lanes), origin, s2, q2);
    AddMoments(load(i + 3 * lanes), origin, s3, q3);
  }
  for (; i + lanes <= n; i += lanes) AddMoments(load(i), origin, s0, q0);
  if (i != n) {
    // Padded with the origin, so that the padding adds nothing.
    const auto part = hn::LoadNOr(hn::Set(df, scores[0]), df, scores + i, n - i);
    AddMoments(hn::PromoteTo(dd, part), origin, s1, q1);
  }
  const double sum = hn::ReduceSum(dd, hn::Add(hn::Add(s0, s1), hn::Add(s2, s3)));
  const double squares = hn::ReduceSum(dd, hn::Add(hn::Add(q0, q1), hn::Add(q2, q3)));
  const double count = static_cast<double>(n);
  double variance = (squares - sum * (sum / count)) / (count - 1.0);
  if (variance < 0.0) variance = 0.0;  // rounding; a NaN stays
  return first + sum / count + std::sqrt(variance) * quantile;
}

// The largest float ≤ theta: for floats s, s > theta as reals exactly where s > this.
inline float FloorToFloat(double theta) {
  constexpr float kMax = std::numeric_limits<float>::max();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  if (theta == static_cast<double>(kInfinity)) return kInfinity;
  if (theta >= static_cast<double>(kMax)) return kMax;
  if (theta < -static_cast<double>(kMax)) return -kInfinity;
  const float nearest = static_cast<float>(theta);
  return static_cast<double>(nearest) > theta ? std::nextafter(nearest, -kInfinity) : nearest;
}

// `excess` may be null. Branch-free over the scores: about one vector in a few has survivors at 8%.
template <bool kExcess>
HWY_INLINE size_t CompactAboveFloat(const float* HWY_RESTRICT scores, size_t n, float theta,
                                    uint32_t* HWY_RESTRICT indices, float* HWY_RESTRICT excess) {
  const hn::ScalableTag<float> df;
  const hn::RebindToUnsigned<decltype(df)> du;
  const size_t lanes = hn::Lanes(df);
  const auto limit = hn::Set(df, theta);
  auto index = hn::Iota(du, 0);
  const auto step = hn::Set(du, static_cast<uint32_t>(lanes));
  size_t count = 0;
  const auto emit = [&](auto v, auto above) HWY_ATTR {
    const size_t survivors =
        hn::CompressStore(index, hn::RebindMask(du, above), du, indices + count);
    if constexpr (kExcess) hn::CompressStore(hn::Sub(v, limit), above, df, excess + count);
    count += survivors;
    index = hn::Add(index, step);
  };
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto v = hn::LoadU(df, scores + i);
    emit(v, hn::Gt(v, limit));
  }
  if (i != n) {
    const auto v = hn::LoadNOr(limit, df, scores + i, n - i);  // the limit itself is not above it
    emit(v, hn::Gt(v, limit));
  }
  return count;
}

inline size_t CompactAboveImpl(const float* scores, size_t n, double theta, uint32_t* indices,
                               float* excess) {
  if (std::isnan(theta)) return 0;
  const float limit = FloorToFloat(theta);
  return excess != nullptr ? CompactAboveFloat<true>(scores, n, limit, indices, excess)
                           : CompactAboveFloat<false>(scores, n, limit, indices, excess);
}

}  // namespace HWY_NAMESPACE
}  // namespace firesteel::kernels
HWY_AFTER_NAMESPACE();

#endif  // FIRESTEEL_KERNELS_STATISTICAL_TOPK_INL_H_
