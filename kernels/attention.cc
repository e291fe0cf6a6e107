#include "kernels/attention.h"

#include <cmath>
#include <cstring>

#include "kernels/statistical_topk.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/attention.cc"
#include "hwy/foreach_target.h"
// The rest is compiled once per target, so it has to follow foreach_target.h.
#include "hwy/highway.h"
#include "kernels/dot-inl.h"
#include "kernels/elementwise-inl.h"
#include "kernels/statistical_topk-inl.h"
#include "kernels/weighted_rows-inl.h"
// clang-format on

#ifndef FIRESTEEL_KERNELS_ATTENTION_CC_
#define FIRESTEEL_KERNELS_ATTENTION_CC_
namespace firesteel::kernels {
namespace {

constexpr size_t RoundUp(size_t n, size_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// The parts of Attend's scratch, each aligned to 64 bytes.
struct AttentionScratch {
  AttentionScratch(float* scratch, size_t positions)
      : scores(scratch),
        weights(scores + ScoreFloats(positions)),
        gates(weights + ListFloats(positions)),
        indices(reinterpret_cast<uint32_t*>(gates + ListFloats(positions))) {}

  // Whole blocks: the range may begin and end inside one.
  static constexpr size_t ScoreFloats(size_t positions) {
    return RoundUp(positions, kKvBlockTokens) + kKvBlockTokens;
  }
  static constexpr size_t ListFloats(size_t positions) {
    return RoundUp(positions + kCompactionSlack, kAlignment / sizeof(float));
  }

  float* scores;      // of all positions of the blocks touched
  float* weights;     // of kept positions
  float* gates;       // of kept positions: scale · q[r:] · k[r:], then its softplus
  uint32_t* indices;  // of kept positions
};

// Where the parts of a position are in its block (see attention.h).
struct BlockView {
  const AttentionShape& shape;
  const float* const* blocks;
  size_t offset;

  const float* Predictor(size_t block) const { return blocks[block] + offset; }
  const float* RestOfKey(size_t position) const {
    const size_t rest = shape.head_dim - shape.predictor_dim;
    return Predictor(position / kKvBlockTokens) + kKvBlockTokens * shape.predictor_dim +
           position % kKvBlockTokens * rest;
  }
  const float* Value(size_t position) const {
    return Predictor(position / kKvBlockTokens) +
           (kKvBlockTokens + position % kKvBlockTokens) * shape.head_dim;
  }
};

// Index of the first largest score that is a number; 0 if there is none.
size_t FirstLargest(const float* scores, size_t n) {
  size_t best = 0;
  for (size_t i = 1; i < n; ++i) {
    if (scores[i] > scores[best] || (std::isnan(scores[best]) && !std::isnan(scores[i]))) best = i;
  }
  return best;
}

}  // namespace
}  // namespace firesteel::kernels
#endif  // FIRESTEEL_KERNELS_ATTENTION_CC_

HWY_BEFORE_NAMESPACE();
namespace firesteel::kernels {
namespace HWY_NAMESPACE {

// Lanes hold neighbouring positions of a block.
using PositionTag = hn::CappedTag<float, kKvBlockTokens>;

// scores of kGroups vectors of positions, starting with vector `group` of block `block`: each is
// the sum over j, in rising order, of query[j] · key[j]. Eight independent sums hide the latency of
// one.
template <size_t kGroups>
HWY_INLINE void PredictorTile(const float* HWY_RESTRICT query, size_t dim, const BlockView& view,
                              size_t first_block, size_t group, float* HWY_RESTRICT scores) {
  static_assert(kGroups == 1 || kGroups == 8);
  const PositionTag d;
  const size_t lanes = hn::Lanes(d);
  const size_t groups_per_block = kKvBlockTokens / lanes;
  const auto keys = [&](size_t i) {
    const size_t g = group + (kGroups == 1 ? 0 : i);
    return view.Predictor(first_block + g / groups_per_block) + g % groups_per_block * lanes;
  };
  const float *k0 = keys(0), *k1 = keys(1), *k2 = keys(2), *k3 = keys(3), *k4 = keys(4),
              *k5 = keys(5), *k6 = keys(6), *k7 = keys(7);
  auto s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0;
  for (size_t j = 0; j < dim; ++j) {
    const auto q = hn::Set(d, query[j]);
    const size_t at = j * kKvBlockTokens;
    s0 = hn::MulAdd(q, hn::LoadU(d, k0 + at), s0);
    if constexpr (kGroups > 1) {
      s1 = hn::MulAdd(q, hn::LoadU(d, k1 + at), s1);
      s2 = hn::MulAdd(q, hn::LoadU(d, k2 + at), s2);
      s3 = hn::MulAdd(q, hn::LoadU(d, k3 + at), s3);
      s4 = hn::MulAdd(q, hn::LoadU(d, k4 + at), s4);
      s5 = hn::MulAdd(q, hn::LoadU(d, k5 + at), s5);
      s6 = hn::MulAdd(q, hn::LoadU(d, k6 + at), s6);
      s7 = hn::MulAdd(q, hn::LoadU(d, k7 + at), s7);
    }
  }
  float* to = scores + group * lanes;
  hn::StoreU(s0, d, to);
  if constexpr (kGroups > 1) {
    hn::StoreU(s1, d, to + lanes);
    hn::StoreU(s2, d, to + 2 * lanes);
    hn::StoreU(s3, d, to + 3 * lanes);
    hn::StoreU(s4, d, to + 4 * lanes);
    hn::StoreU(s5, d, to + 5 * lanes);
    hn::StoreU(s6, d, to + 6 * lanes);
    hn::StoreU(s7, d, to + 7 * lanes);
  }
}

// Raw predictor scores of all slots of the blocks [first_block, last_block]. Slots that nobody
// stored to give rubbish in their own lane only.
void PredictorScores(const AttentionShape& shape, const float* query, const BlockView& view,
                     size_t first_block, size_t last_block, float* scores) {
  const size_t lanes = hn::Lanes(PositionTag());
  const size_t groups = (last_block - first_block + 1) * (kKvBlockTokens / lanes);
  size_t g = 0;
  for (; g + 8 <= groups; g += 8) {
    PredictorTile<8>(query, shape.predictor_dim, view, first_block, g, scores);
  }
  for (; g < groups; ++g) {
    PredictorTile<1>(query, shape.predictor_dim, view, first_block, g, scores);
  }
}

// Fills indices (of scores, rising) of the positions to keep; returns how many, ≥ 1.
size_t Select(const AttentionShape& shape, const float* scores, size_t n, double quantile,
              uint32_t* indices) {
  if (shape.top_k == 0 || n <= shape.top_k) {
    for (size_t i = 0; i < n; ++i) indices[i] = static_cast<uint32_t>(i);
    return n;
  }
  const double theta =
      n == 1 ? static_cast<double>(scores[0]) : StatisticalThresholdImpl(scores, n, quantile);
  const size_t kept = CompactAboveImpl(scores, n, theta, indices, nullptr);
  if (kept != 0) return kept;
  indices[0] = static_cast<uint32_t>(FirstLargest(scores, n));
  return 1;
}

size_t AttendImpl(const AttentionShape& shape, const float* query, const float* const* blocks,
                  size_t offset, size_t begin, size_t end, double quantile, float* scratch,
                  float* out, uint32_t* kept) {
  const size_t n = end - begin;
  const BlockView view{shape, blocks, offset};
  const AttentionScratch parts(scratch, n);
  uint32_t* indices = kept != nullptr ? kept : parts.indices;

  PredictorScores(shape, query, view, begin / kKvBlockTokens, (end - 1) / kKvBlockTokens,
                  parts.scores);
  float* scores = parts.scores + begin % kKvBlockTokens;
  ScaleSoftCapImpl(scores, shape.scale, shape.softcap, n, scores);

  const size_t count = Select(shape, scores, n, quantile, indices);
  for (size_t j = 0; j < count; ++j) {
    parts.weights[j] = scores[indices[j]];
    indices[j] += static_cast<uint32_t>(begin);
  }
  SoftmaxImpl(parts.weights, count, parts.weights);

  if (shape.spark()) {
    DotRows<PromotedStep>(
        query + shape.predictor_dim, shape.head_dim - shape.predictor_dim, count,
        [&](size_t j) { return view.RestOfKey(indices[j]); }, parts.gates);
    ScaleSoftCapImpl(parts.gates, shape.scale, 0.0f, count, parts.gates);
    SoftplusImpl(parts.gates, count, parts.gates);
    Map2(hn::ScalableTag<float>(), parts.weights, parts.gates, count, parts.weights,
         [](auto a, auto b) HWY_ATTR { return hn::Mul(a, b); });
  }

  WeightedRows(
      hn::ScalableTag<float>(), parts.weights, count,
      [&](size_t j) { return view.Value(indices[j]); }, shape.head_dim, out);
  return count;
}

}  // namespace HWY_NAMESPACE
}  // namespace firesteel::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace firesteel::kernels {

HWY_EXPORT(AttendImpl);

void StoreKeyValue(const AttentionShape& shape, const float* key, const float* value, size_t slot,
                   float* block) {
  HWY_DASSERT(slot < kKvBlockTokens);
  HWY_DASSERT(shape.predictor_dim <= shape.head_dim);
  const size_t r = shape.predictor_dim;
  const size_t rest = shape.head_dim - r;
  for (size_t j = 0; j < r; ++j) block[j * kKvBlockTokens + slot] = key[j];
  if (rest != 0) {
    std::memcpy(block + kKvBlockTokens * r + slot * rest, key + r, rest * sizeof(float));
  }
  std::memcpy(block + (kKvBlockTokens + slot) * shape.head_dim, value,
              shape.head_dim * sizeof(float));
}

size_t AttentionScratchFloats(size_t positions) {
  return AttentionScratch::ScoreFloats(positions) + 3 * AttentionScratch::ListFloats(positions);
}

size_t Attend(const AttentionShape& shape, const float* query, const float* const* blocks,
              size_t offset, size_t begin, size_t end, double quantile, float* scratch, float* out,
              uint32_t* kept) {
  HWY_DASSERT(begin < end);
  HWY_DASSERT(shape.predictor_dim <= shape.head_dim);
  return HWY_DYNAMIC_DISPATCH(AttendImpl)(shape, query, blocks, offset, begin, end, quantile,
                                          scratch, out, kept);
}

}  // namespace firesteel::kernels
#endif  // HWY_ONCE
