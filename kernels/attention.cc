#include "kernels/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels/amx.h"
#include "kernels/amx_attention.h"
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
// clang-format on

#ifndef FIRESTEEL_KERNELS_ATTENTION_CC_
#define FIRESTEEL_KERNELS_ATTENTION_CC_
namespace firesteel::kernels {
namespace {

constexpr size_t RoundUp(size_t n, size_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// How far ahead to fetch: rows of predictor keys (of several blocks side by side), and value rows.
// With neither, 8192 positions take a tenth longer; a half or a double of either is the same.
constexpr size_t kRowsAhead = 16;
constexpr size_t kValuesAhead = 8;

// The parts of Attend's scratch, each aligned to 64 bytes.
struct AttentionScratch {
  AttentionScratch(float* scratch, size_t heads, size_t positions)
      : score_stride(ScoreFloats(positions)),
        weight_stride(ListFloats(positions)),
        scores(scratch),
        weights(scores + heads * score_stride),
        gates(weights + heads * weight_stride),
        indices(reinterpret_cast<uint32_t*>(gates + ListFloats(positions))) {}

  static constexpr size_t Floats(size_t heads, size_t positions) {
    return heads * (ScoreFloats(positions) + ListFloats(positions)) + 2 * ListFloats(positions);
  }
  // Whole blocks: the range may begin and end inside one.
  static constexpr size_t ScoreFloats(size_t positions) {
    return RoundUp(positions, kKvBlockTokens) + kKvBlockTokens;
  }
  static constexpr size_t ListFloats(size_t positions) {
    return RoundUp(positions + kCompactionSlack, kAlignment / sizeof(float));
  }

  size_t score_stride;   // from one head to the next
  size_t weight_stride;  // from one head to the next
  float* scores;         // of each head, of all positions of the blocks touched
  float* weights;        // of each head, of kept positions
  float* gates;          // of kept positions: scale · q[r:] · k[r:], then its softplus
  uint32_t* indices;     // of kept positions
};

// Where the parts of a position are in its block (see attention.h), of elements T.
template <typename T>
struct BlockView {
  const AttentionShape& shape;
  const std::byte* const* blocks;
  size_t offset;

  const T* Predictor(size_t block) const {
    return reinterpret_cast<const T*>(blocks[block] + offset);
  }
  const T* RestOfKey(size_t position) const {
    const size_t rest = shape.head_dim - shape.predictor_dim;
    return Predictor(position / kKvBlockTokens) + kKvBlockTokens * shape.predictor_dim +
           position % kKvBlockTokens * rest;
  }
  const T* Value(size_t position) const {
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

// A query of a prompt that sees at most so many positions multiplies the rest of all keys, and all
// values, with weights of zero where a position is not kept: up to here tiles are faster than
// reading what was kept row by row.
constexpr size_t kTiledPositions = 2048;

// The parts of AttendPrompt's scratch, each aligned to 64 bytes.
struct PromptScratch {
  PromptScratch(std::byte* scratch, const AttentionShape& shape, size_t positions)
      : rest_dims(shape.head_dim - shape.predictor_dim),
        blocks(positions / kKvBlockTokens + 2),
        tiled_blocks(std::min(blocks, (kTiledPositions + kMaxPromptRows) / kKvBlockTokens + 2)),
        score_stride(blocks * kKvBlockTokens + kApart),
        tiled_stride(tiled_blocks * kKvBlockTokens),
        at_(scratch) {
    predictor_keys = Take<std::byte>(blocks * BlockTileBytes(shape.predictor_dim));
    rest_of_keys = Take<std::byte>(tiled_blocks * BlockTileBytes(rest_dims));
    values = Take<std::byte>(tiled_blocks * BlockTileBytes(shape.head_dim));
    queries = Split(shape.head_dim);
    scores = {Take<float>(kTileQueries * score_stride), kTileQueries, score_stride, score_stride};
    const size_t gate_stride = tiled_stride + kApart;
    gates = {Take<float>(kTileQueries * gate_stride), kTileQueries, gate_stride, gate_stride};
    weights = Split(tiled_stride);
    sums = {Take<float>(kTileQueries * shape.head_dim), kTileQueries, shape.head_dim,
            shape.head_dim};
    const size_t list = AttentionScratch::ListFloats(positions);
    kept_weights = Take<float>(list);
    kept_gates = Take<float>(list);
    kept_high = Take<BF16>(list);
    kept_low = Take<BF16>(list);
    indices = Take<uint32_t>(list);
  }

  size_t Bytes(const std::byte* scratch) const { return static_cast<size_t>(at_ - scratch); }

  size_t rest_dims;
  size_t blocks;        // that the rows of a call may see
  size_t tiled_blocks;  // the same of rows that see at most kTiledPositions
  size_t score_stride;
  size_t tiled_stride;
  std::byte* predictor_keys;
  std::byte* rest_of_keys;
  std::byte* values;
  SplitRows queries;
  MatView scores;
  MatView gates;
  SplitRows weights;
  MatView sums;
  // Of one query, of kept positions:
  float* kept_weights;
  float* kept_gates;
  BF16* kept_high;
  BF16* kept_low;
  uint32_t* indices;

 private:
  // Rows of scores lie apart by other than a multiple of a page, whose lines are of one set.
  static constexpr size_t kApart = kAlignment / sizeof(float);

  template <typename T>
  T* Take(size_t count) {
    T* const part = reinterpret_cast<T*>(at_);
    at_ += RoundUp(count * sizeof(T), kAlignment);
    return part;
  }
  SplitRows Split(size_t stride) {
    BF16* const high = Take<BF16>(kTileQueries * stride);
    return {high, Take<BF16>(kTileQueries * stride), stride};
  }
  std::byte* at_;
};

}  // namespace
}  // namespace firesteel::kernels
#endif  // FIRESTEEL_KERNELS_ATTENTION_CC_

HWY_BEFORE_NAMESPACE();
namespace firesteel::kernels {
namespace HWY_NAMESPACE {

// Lanes hold neighbouring positions of a block, and two vectors make a pair: in bf16 one load gives
// both.
using PositionTag = hn::CappedTag<float, kKvBlockTokens / 2>;

// Vector pairs that a tile of one head, or of two heads, sums side by side: enough independent sums
// to hide the latency of the multiply-add, as many as fit the registers.
inline constexpr size_t kScorePairs = 4;
#if HWY_ARCH_ARM_A64 || (HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3)
inline constexpr size_t kScorePairsOfTwo = 4;  // 16 sums of 32 registers
inline constexpr size_t kValuePairs = 8;       // 256 columns of AVX-512: each row in one go
#else
inline constexpr size_t kScorePairsOfTwo = 2;  // 8 sums of 16 registers
inline constexpr size_t kValuePairs = 4;
#endif

// The two vectors of a pair: of floats the second is `distance` elements behind the first; of bf16
// they are the even and the odd elements.
template <class D, class V>
HWY_INLINE void LoadPair(D d, const float* p, size_t distance, V& first, V& second) {
  first = hn::LoadU(d, p);
  second = hn::LoadU(d, p + distance);
}
template <class D, class V>
HWY_INLINE void LoadPair(D d, const BF16* p, size_t /*distance*/, V& first, V& second) {
  const hn::RebindToUnsigned<D> d32;
  const hn::Repartition<uint16_t, D> d16;
  const auto both = hn::BitCast(d32, hn::LoadU(d16, reinterpret_cast<const uint16_t*>(p)));
  first = hn::BitCast(d, hn::ShiftLeft<16>(both));
  second = hn::BitCast(d, hn::And(both, hn::Set(d32, 0xFFFF0000u)));
}

// Adds a pair times a factor of each head to the sums of one or two heads.
template <size_t kHeads, class D, class V, typename T>
HWY_INLINE void AddPair(D d, const T* p, size_t distance, V x, V y, V& x0, V& x1, V& y0, V& y1) {
  V first, second;
  LoadPair(d, p, distance, first, second);
  x0 = hn::MulAdd(x, first, x0);
  x1 = hn::MulAdd(x, second, x1);
  if constexpr (kHeads > 1) {
    y0 = hn::MulAdd(y, first, y0);
    y1 = hn::MulAdd(y, second, y1);
  }
}

// Where the predictor keys of `kPairs` pairs of vectors start, counted from `first_pair` on.
template <size_t kPairs, typename T>
struct PairPointers {
  PairPointers(const BlockView<T>& view, size_t first_block, size_t first_pair) {
    const size_t lanes = hn::Lanes(PositionTag());
    const size_t pairs_per_block = kKvBlockTokens / 2 / lanes;
    const size_t step = std::is_same_v<T, float> ? lanes : 2 * lanes;
    for (size_t i = 0; i < kPairs; ++i) {
      const size_t pair = first_pair + i;
      p[i] = view.Predictor(first_block + pair / pairs_per_block) + pair % pairs_per_block * step;
    }
  }
  const T* p[kPairs];
};

// scores of kPairs pairs of vectors of positions for kHeads queries: each is the sum over j, in
// rising order, of query[j] · key[j]. Meanwhile fetches what comes next, from the pairs `ahead`
// once these are read: the hardware's prefetcher stops at the end of a page, and a head's part of a
// block is not much longer.
template <size_t kHeads, size_t kPairs, typename T>
HWY_INLINE void PredictorTile(const float* HWY_RESTRICT query, const float* HWY_RESTRICT query1,
                              size_t dim, const PairPointers<kPairs, T>& keys,
                              const PairPointers<kPairs, T>& ahead, size_t first_pair,
                              float* HWY_RESTRICT scores, float* HWY_RESTRICT scores1) {
  static_assert(kHeads <= 2 && (kPairs == 1 || kPairs == 2 || kPairs == 4));
  const PositionTag d;
  using V = hn::Vec<PositionTag>;
  constexpr size_t kHalf = kKvBlockTokens / 2;
  const auto at = [](size_t i) { return i < kPairs ? i : 0; };
  const T *k0 = keys.p[0], *k1 = keys.p[at(1)], *k2 = keys.p[at(2)], *k3 = keys.p[at(3)];
  // By name: vectors of SVE cannot be array elements. x: first head, y: second head.
  V x00 = hn::Zero(d), x01 = x00, x10 = x00, x11 = x00, x20 = x00, x21 = x00, x30 = x00, x31 = x00;
  V y00 = x00, y01 = x00, y10 = x00, y11 = x00, y20 = x00, y21 = x00, y30 = x00, y31 = x00;
  const auto add = [&](size_t j, const PairPointers<kPairs, T>& fetch, size_t row) HWY_ATTR {
    const V x = hn::Set(d, query[j]);
    const V y = kHeads > 1 ? hn::Set(d, query1[j]) : x;
    const size_t i = j * kKvBlockTokens;
    for (size_t k = 0; k < kPairs; ++k) {
      hwy::Prefetch(fetch.p[k] + row * kKvBlockTokens);
      if constexpr (std::is_same_v<T, float>) {
        hwy::Prefetch(fetch.p[k] + row * kKvBlockTokens + kHalf);
      }
    }
    AddPair<kHeads>(d, k0 + i, kHalf, x, y, x00, x01, y00, y01);
    if constexpr (kPairs > 1) AddPair<kHeads>(d, k1 + i, kHalf, x, y, x10, x11, y10, y11);
    if constexpr (kPairs > 2) {
      AddPair<kHeads>(d, k2 + i, kHalf, x, y, x20, x21, y20, y21);
      AddPair<kHeads>(d, k3 + i, kHalf, x, y, x30, x31, y30, y31);
    }
  };
  const size_t distance = HWY_MIN(kRowsAhead, dim);
  size_t j = 0;
  for (; j < dim - distance; ++j) add(j, keys, j + distance);
  for (; j < dim; ++j) add(j, ahead, j + distance - dim);

  const size_t lanes = hn::Lanes(d);
  const size_t pairs_per_block = kHalf / lanes;
  const auto store = [&](size_t i, V first, V second, float* HWY_RESTRICT to) HWY_ATTR {
    const size_t pair = first_pair + i;
    to += pair / pairs_per_block * kKvBlockTokens + pair % pairs_per_block * lanes;
    hn::StoreU(first, d, to);
    hn::StoreU(second, d, to + kHalf);
  };
  store(0, x00, x01, scores);
  if constexpr (kPairs > 1) store(1, x10, x11, scores);
  if constexpr (kPairs > 2) store(2, x20, x21, scores);
  if constexpr (kPairs > 2) store(3, x30, x31, scores);
  if constexpr (kHeads > 1) {
    store(0, y00, y01, scores1);
    if constexpr (kPairs > 1) store(1, y10, y11, scores1);
    if constexpr (kPairs > 2) store(2, y20, y21, scores1);
    if constexpr (kPairs > 2) store(3, y30, y31, scores1);
  }
}

// The pairs [pair, end) in tiles of kPairs, for one or two heads; returns where it stopped.
template <size_t kHeads, size_t kPairs, typename T>
HWY_INLINE size_t PredictorTiles(const float* query, const float* query1, const BlockView<T>& view,
                                 size_t first_block, size_t pair, size_t end, float* scores,
                                 float* scores1) {
  for (; pair + kPairs <= end; pair += kPairs) {
    const bool more = pair + 2 * kPairs <= end;
    PredictorTile<kHeads>(query, query1, view.shape.predictor_dim,
                          PairPointers<kPairs, T>(view, first_block, pair),
                          PairPointers<kPairs, T>(view, first_block, more ? pair + kPairs : pair),
                          pair, scores, scores1);
  }
  return pair;
}

// Raw predictor scores of all slots of the blocks [first_block, last_block], of each head. Slots
// that nobody stored to give rubbish in their own lane only.
template <typename T>
void PredictorScores(const float* queries, size_t heads, const BlockView<T>& view,
                     size_t first_block, size_t last_block, const AttentionScratch& parts) {
  const size_t pairs_per_block = kKvBlockTokens / 2 / hn::Lanes(PositionTag());
  const size_t end = (last_block - first_block + 1) * pairs_per_block;
  const size_t dim = view.shape.head_dim;
  size_t h = 0;
  for (; h + 2 <= heads; h += 2) {
    const float* query = queries + h * dim;
    float* scores = parts.scores + h * parts.score_stride;
    const size_t pair = PredictorTiles<2, kScorePairsOfTwo>(
        query, query + dim, view, first_block, 0, end, scores, scores + parts.score_stride);
    PredictorTiles<2, 1>(query, query + dim, view, first_block, pair, end, scores,
                         scores + parts.score_stride);
  }
  if (h < heads) {
    const float* query = queries + h * dim;
    float* scores = parts.scores + h * parts.score_stride;
    const size_t pair =
        PredictorTiles<1, kScorePairs>(query, query, view, first_block, 0, end, scores, scores);
    PredictorTiles<1, 1>(query, query, view, first_block, pair, end, scores, scores);
  }
}

// Columns [c, …) of kPairs pairs of vectors of the weighted sum of rows, for kHeads lists of
// weights. Every column adds its rows in the given order, so neither tiles nor heads change a bit.
template <size_t kHeads, size_t kPairs, class RowFn>
HWY_INLINE void ValueTile(const float* HWY_RESTRICT weights, const float* HWY_RESTRICT weights1,
                          size_t count, const RowFn& row, size_t c, float* HWY_RESTRICT out,
                          float* HWY_RESTRICT out1) {
  static_assert(kPairs == 1 || kPairs == 2 || kPairs == 4 || kPairs == 8);
  static_assert(kHeads == 1 || (kHeads == 2 && kPairs <= 4));
  using T = std::remove_cv_t<std::remove_pointer_t<decltype(row(0))>>;
  const hn::CappedTag<float, 16> d;
  using V = hn::Vec<decltype(d)>;
  const size_t lanes = hn::Lanes(d);
  // x: pairs 0 to 3 of the first head; y: those of the second head, or pairs 4 to 7 of the first.
  V x00 = hn::Zero(d), x01 = x00, x10 = x00, x11 = x00, x20 = x00, x21 = x00, x30 = x00, x31 = x00;
  V y00 = x00, y01 = x00, y10 = x00, y11 = x00, y20 = x00, y21 = x00, y30 = x00, y31 = x00;
  const auto add = [&](size_t j, const T* fetch) HWY_ATTR {
    const V x = hn::Set(d, weights[j]);
    const V y = kHeads > 1 ? hn::Set(d, weights1[j]) : x;
    for (size_t i = 0; i < 2 * kPairs * lanes; i += kAlignment / sizeof(T)) {
      hwy::Prefetch(fetch + i);
    }
    const T* p = row(j) + c;
    AddPair<kHeads>(d, p, lanes, x, y, x00, x01, y00, y01);
    if constexpr (kPairs > 1) AddPair<kHeads>(d, p + 2 * lanes, lanes, x, y, x10, x11, y10, y11);
    if constexpr (kPairs > 2) {
      AddPair<kHeads>(d, p + 4 * lanes, lanes, x, y, x20, x21, y20, y21);
      AddPair<kHeads>(d, p + 6 * lanes, lanes, x, y, x30, x31, y30, y31);
    }
    if constexpr (kPairs > 4) {
      AddPair<1>(d, p + 8 * lanes, lanes, x, x, y00, y01, y00, y01);
      AddPair<1>(d, p + 10 * lanes, lanes, x, x, y10, y11, y10, y11);
      AddPair<1>(d, p + 12 * lanes, lanes, x, x, y20, y21, y20, y21);
      AddPair<1>(d, p + 14 * lanes, lanes, x, x, y30, y31, y30, y31);
    }
  };
  size_t j = 0;
  for (; j + kValuesAhead < count; ++j) add(j, row(j + kValuesAhead) + c);
  for (; j < count; ++j) add(j, row(j) + c);

  const auto store = [&](size_t pair, V first, V second, float* HWY_RESTRICT to) HWY_ATTR {
    to += c + pair * 2 * lanes;
    if constexpr (std::is_same_v<T, float>) {
      hn::StoreU(first, d, to);
      hn::StoreU(second, d, to + lanes);
    } else {
      hn::StoreInterleaved2(first, second, d, to);
    }
  };
  store(0, x00, x01, out);
  if constexpr (kPairs > 1) store(1, x10, x11, out);
  if constexpr (kPairs > 2) store(2, x20, x21, out);
  if constexpr (kPairs > 2) store(3, x30, x31, out);
  if constexpr (kHeads > 1 || kPairs > 4) {
    constexpr size_t kFirst = kHeads > 1 ? 0 : 4;
    float* const to = kHeads > 1 ? out1 : out;
    store(kFirst, y00, y01, to);
    if constexpr (kPairs > 1) store(kFirst + 1, y10, y11, to);
    if constexpr (kPairs > 2) store(kFirst + 2, y20, y21, to);
    if constexpr (kPairs > 2) store(kFirst + 3, y30, y31, to);
  }
}

// out[c] = Σ_j weights[j] · row(j)[c] for c < cols, j < count in rising order, for one or two lists
// of weights of the same rows.
template <size_t kHeads, class RowFn>
void WeightedValues(const float* weights, const float* weights1, size_t count, const RowFn& row,
                    size_t cols, float* out, float* out1) {
  const hn::CappedTag<float, 16> d;
  const size_t lanes = hn::Lanes(d);
  constexpr size_t kPairs = kHeads > 1 ? kScorePairsOfTwo : kValuePairs;
  size_t c = 0;
  for (; c + 2 * kPairs * lanes <= cols; c += 2 * kPairs * lanes) {
    ValueTile<kHeads, kPairs>(weights, weights1, count, row, c, out, out1);
  }
  for (; c + 2 * lanes <= cols; c += 2 * lanes) {
    ValueTile<kHeads, 1>(weights, weights1, count, row, c, out, out1);
  }
  while (c < cols) {
    const size_t n = HWY_MIN(lanes, cols - c);
    auto x = hn::Zero(d), y = x;
    for (size_t j = 0; j < count; ++j) {
      const auto v = LoadF32N(d, row(j) + c, n);
      x = hn::MulAdd(hn::Set(d, weights[j]), v, x);
      if constexpr (kHeads > 1) y = hn::MulAdd(hn::Set(d, weights1[j]), v, y);
    }
    hn::StoreN(x, d, out + c, n);
    if constexpr (kHeads > 1) hn::StoreN(y, d, out1 + c, n);
    c += n;
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

// The weights of one head's kept positions, whose indices count from `begin` on and become
// absolute.
template <typename T>
void WeighKept(const float* query, const BlockView<T>& view, size_t begin, const float* scores,
               size_t count, uint32_t* indices, float* gates, float* weights) {
  const AttentionShape& shape = view.shape;
  for (size_t j = 0; j < count; ++j) {
    weights[j] = scores[indices[j]];
    indices[j] += static_cast<uint32_t>(begin);
  }
  SoftmaxImpl(weights, count, weights);
  if (!shape.spark()) return;
  DotRows<PromotedStep>(
      query + shape.predictor_dim, shape.head_dim - shape.predictor_dim, count,
      [&](size_t j) { return view.RestOfKey(indices[j]); }, gates);
  ScaleSoftCapImpl(gates, shape.scale, 0.0f, count, gates);
  SoftplusImpl(gates, count, gates);
  Map2(hn::ScalableTag<float>(), weights, gates, count, weights,
       [](auto a, auto b) HWY_ATTR { return hn::Mul(a, b); });
}

// The values of all positions [begin, end) for every head: two heads read them once.
template <typename T>
void SumAllValues(const BlockView<T>& view, size_t heads, size_t begin, size_t end,
                  const AttentionScratch& parts, float* out) {
  const size_t dim = view.shape.head_dim;
  const auto row = [&](size_t j) { return view.Value(begin + j); };
  size_t h = 0;
  for (; h + 2 <= heads; h += 2) {
    const float* weights = parts.weights + h * parts.weight_stride;
    WeightedValues<2>(weights, weights + parts.weight_stride, end - begin, row, dim, out + h * dim,
                      out + (h + 1) * dim);
  }
  if (h < heads) {
    const float* weights = parts.weights + h * parts.weight_stride;
    WeightedValues<1>(weights, weights, end - begin, row, dim, out + h * dim, out + h * dim);
  }
}

template <typename T>
void AttendTo(const AttentionShape& shape, const float* queries, size_t heads,
              const std::byte* const* blocks, size_t offset, size_t begin, size_t end,
              double quantile, float* scratch, float* out, size_t* num_kept, uint32_t* kept,
              size_t kept_stride) {
  const size_t n = end - begin;
  const size_t dim = shape.head_dim;
  const BlockView<T> view{shape, blocks, offset};
  const AttentionScratch parts(scratch, heads, n);
  const bool all = shape.top_k == 0 || n <= shape.top_k;

  PredictorScores(queries, heads, view, begin / kKvBlockTokens, (end - 1) / kKvBlockTokens, parts);
  for (size_t h = 0; h < heads; ++h) {
    float* const scores = parts.scores + h * parts.score_stride + begin % kKvBlockTokens;
    float* const weights = parts.weights + h * parts.weight_stride;
    float* const out_h = out + h * dim;
    uint32_t* const indices = kept != nullptr ? kept + h * kept_stride : parts.indices;
    ScaleSoftCapImpl(scores, shape.scale, shape.softcap, n, scores);
    const size_t count = Select(shape, scores, n, quantile, indices);
    WeighKept(queries + h * dim, view, begin, scores, count, indices, parts.gates, weights);
    if (!all) {
      WeightedValues<1>(
          weights, weights, count, [&](size_t j) { return view.Value(indices[j]); }, dim, out_h,
          out_h);
    }
    num_kept[h] = count;
  }
  if (all) SumAllValues(view, heads, begin, end, parts, out);
}

void AttendImpl(const AttentionShape& shape, const float* queries, size_t heads,
                const std::byte* const* blocks, size_t offset, size_t begin, size_t end,
                double quantile, float* scratch, float* out, size_t* num_kept, uint32_t* kept,
                size_t kept_stride) {
  const auto attend = shape.kv_dtype == DType::kBF16 ? AttendTo<BF16> : AttendTo<float>;
  attend(shape, queries, heads, blocks, offset, begin, end, quantile, scratch, out, num_kept, kept,
         kept_stride);
}

// The weights of one query's kept positions, `indices` of its scores [n], to its row of the split
// weights from element `at` on. `gates` are the products with the rest of all keys.
void WeighTiled(const AttentionShape& shape, const PromptScratch& parts, size_t query, size_t at,
                const float* scores, size_t n, const uint32_t* indices, size_t count) {
  float* const weights = parts.kept_weights;
  float* const gates = parts.kept_gates;
  for (size_t j = 0; j < count; ++j) weights[j] = scores[indices[j]];
  SoftmaxImpl(weights, count, weights);
  if (shape.spark()) {
    const float* const all = parts.gates.Row(query) + at;
    for (size_t j = 0; j < count; ++j) gates[j] = all[indices[j]];
    ScaleSoftCapImpl(gates, shape.scale, 0.0f, count, gates);
    SoftplusImpl(gates, count, gates);
    Map2(hn::ScalableTag<float>(), weights, gates, count, weights,
         [](auto a, auto b) HWY_ATTR { return hn::Mul(a, b); });
  }
  BF16* const high = parts.weights.high + query * parts.weights.stride + at;
  BF16* const low = parts.weights.low + query * parts.weights.stride + at;
  if (count == n) return SplitToBF16(weights, n, high, low);
  SplitToBF16(weights, count, parts.kept_high, parts.kept_low);
  for (size_t j = 0; j < count; ++j) {
    high[indices[j]] = parts.kept_high[j];
    low[indices[j]] = parts.kept_low[j];
  }
}

// The rows [begin, end) of `rows`, whose heads are the queries of one tile. `first_block` is the
// first one in tiles; rows before `tiled_end` see at most kTiledPositions.
void AttendGroup(const AttentionShape& shape, size_t heads, const PromptRows& rows, size_t begin,
                 size_t end, size_t tiled_end, const BlockView<BF16>& view, size_t first_block,
                 const double* quantiles, const PromptScratch& parts, uint32_t* kept,
                 size_t kept_stride) {
  const size_t dim = shape.head_dim;
  const size_t block = rows.Begin(begin) / kKvBlockTokens;
  const auto blocks_to = [&](size_t i) {
    return (rows.first + i - 1) / kKvBlockTokens + 1 - block;
  };
  for (size_t q = 0; q < kTileQueries; ++q) {
    BF16* const high = parts.queries.high + q * dim;
    BF16* const low = parts.queries.low + q * dim;
    if (const size_t i = begin + q / heads; i < end) {
      SplitToBF16(rows.queries + i * rows.query_stride + q % heads * dim, dim, high, low);
    } else {
      std::memset(high, 0, dim * sizeof(BF16));
      std::memset(low, 0, dim * sizeof(BF16));
    }
  }
  AmxDots(parts.queries,
          parts.predictor_keys + (block - first_block) * BlockTileBytes(shape.predictor_dim),
          blocks_to(end), shape.predictor_dim, parts.scores);
  const size_t own_tiled_end = std::clamp(tiled_end, begin, end);
  const size_t tiled_blocks = own_tiled_end > begin ? blocks_to(own_tiled_end) : 0;
  if (tiled_blocks > 0) {
    if (shape.spark()) {
      SplitRows rest = parts.queries;
      rest.high += shape.predictor_dim;
      rest.low += shape.predictor_dim;
      AmxDots(rest, parts.rest_of_keys + (block - first_block) * BlockTileBytes(parts.rest_dims),
              tiled_blocks, parts.rest_dims, parts.gates);
    }
    for (size_t q = 0; q < kTileQueries; ++q) {
      const size_t bytes = tiled_blocks * kKvBlockTokens * sizeof(BF16);
      std::memset(parts.weights.high + q * parts.weights.stride, 0, bytes);
      std::memset(parts.weights.low + q * parts.weights.stride, 0, bytes);
    }
  }
  for (size_t i = begin; i < end; ++i) {
    const size_t visible = rows.Begin(i);
    const size_t n = rows.first + i + 1 - visible;
    const size_t at = visible - block * kKvBlockTokens;
    for (size_t h = 0; h < heads; ++h) {
      const size_t query = (i - begin) * heads + h;
      float* const scores = parts.scores.Row(query) + at;
      uint32_t* const indices =
          kept != nullptr ? kept + (i * heads + h) * kept_stride : parts.indices;
      ScaleSoftCapImpl(scores, shape.scale, shape.softcap, n, scores);
      const double quantile = quantiles != nullptr ? quantiles[n] : 0.0;
      const size_t count = Select(shape, scores, n, quantile, indices);
      rows.num_kept[i * heads + h] = count;
      if (i < own_tiled_end) {
        WeighTiled(shape, parts, query, at, scores, n, indices, count);
        if (kept == nullptr) continue;
        for (size_t j = 0; j < count; ++j) indices[j] += static_cast<uint32_t>(visible);
        continue;
      }
      WeighKept(rows.queries + i * rows.query_stride + h * dim, view, visible, scores, count,
                indices, parts.kept_gates, parts.kept_weights);
      float* const out = rows.out + i * rows.out_stride + h * dim;
      WeightedValues<1>(
          parts.kept_weights, parts.kept_weights, count,
          [&](size_t j) { return view.Value(indices[j]); }, dim, out, out);
    }
  }
  if (tiled_blocks == 0) return;
  AmxValues(parts.weights, parts.values + (block - first_block) * BlockTileBytes(dim), tiled_blocks,
            dim, parts.sums);
  for (size_t i = begin; i < own_tiled_end; ++i) {
    for (size_t h = 0; h < heads; ++h) {
      std::memcpy(rows.out + i * rows.out_stride + h * dim, parts.sums.Row((i - begin) * heads + h),
                  dim * sizeof(float));
    }
  }
}

void AttendPromptImpl(const AttentionShape& shape, size_t heads, const PromptRows& rows,
                      const std::byte* const* blocks, size_t offset, const double* quantiles,
                      std::byte* scratch, uint32_t* kept, size_t kept_stride) {
  const BlockView<BF16> view{shape, blocks, offset};
  const size_t end = rows.first + rows.count;
  const size_t first_block = rows.Begin(0) / kKvBlockTokens;
  const PromptScratch parts(scratch, shape, end - first_block * kKvBlockTokens);
  size_t tiled_end = 0;
  while (tiled_end < rows.count &&
         rows.first + tiled_end + 1 - rows.Begin(tiled_end) <= kTiledPositions) {
    ++tiled_end;
  }
  for (size_t block = first_block; block * kKvBlockTokens < end; ++block) {
    const std::byte* const from = blocks[block] + offset;
    const size_t to = block - first_block;
    TilePredictorKeys(shape, from, parts.predictor_keys + to * BlockTileBytes(shape.predictor_dim));
    if (block * kKvBlockTokens >= rows.first + tiled_end || tiled_end == 0) continue;
    if (shape.spark()) {
      TileRestOfKeys(shape, from, parts.rest_of_keys + to * BlockTileBytes(parts.rest_dims));
    }
    TileValues(shape, from, end - block * kKvBlockTokens,
               parts.values + to * BlockTileBytes(shape.head_dim));
  }
  const size_t step = kTileQueries / heads;
  for (size_t i = 0; i < rows.count; i += step) {
    AttendGroup(shape, heads, rows, i, std::min(i + step, rows.count), tiled_end, view, first_block,
                quantiles, parts, kept, kept_stride);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace firesteel::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace firesteel::kernels {

HWY_EXPORT(AttendImpl);
HWY_EXPORT(AttendPromptImpl);

namespace {

float Rounded(float x, float /*to*/) { return x; }
BF16 Rounded(float x, BF16 /*to*/) { return ToBF16(x); }

template <typename T>
void StoreKeyValueAs(const AttentionShape& shape, const float* key, const float* value, size_t slot,
                     T* block) {
  const size_t r = shape.predictor_dim;
  const size_t rest = shape.head_dim - r;
  T* to = block + shape.PredictorColumn(slot);
  for (size_t j = 0; j < r; ++j) to[j * kKvBlockTokens] = Rounded(key[j], T());
  to = block + kKvBlockTokens * r + slot * rest;
  for (size_t j = 0; j < rest; ++j) to[j] = Rounded(key[r + j], T());
  to = block + (kKvBlockTokens + slot) * shape.head_dim;
  for (size_t j = 0; j < shape.head_dim; ++j) to[j] = Rounded(value[j], T());
}

}  // namespace

void StoreKeyValue(const AttentionShape& shape, const float* key, const float* value, size_t slot,
                   std::byte* block) {
  HWY_DASSERT(slot < kKvBlockTokens);
  HWY_DASSERT(shape.predictor_dim <= shape.head_dim);
  if (shape.kv_dtype == DType::kBF16) {
    StoreKeyValueAs(shape, key, value, slot, reinterpret_cast<BF16*>(block));
  } else {
    StoreKeyValueAs(shape, key, value, slot, reinterpret_cast<float*>(block));
  }
}

size_t AttentionScratchFloats(size_t heads, size_t positions) {
  return AttentionScratch::Floats(heads, positions);
}

void Attend(const AttentionShape& shape, const float* queries, size_t heads,
            const std::byte* const* blocks, size_t offset, size_t begin, size_t end,
            double quantile, float* scratch, float* out, size_t* num_kept, uint32_t* kept,
            size_t kept_stride) {
  HWY_DASSERT(begin < end);
  HWY_DASSERT(shape.predictor_dim <= shape.head_dim);
  HWY_DYNAMIC_DISPATCH(AttendImpl)
  (shape, queries, heads, blocks, offset, begin, end, quantile, scratch, out, num_kept, kept,
   kept_stride);
}

bool AttendsPrompts(const AttentionShape& shape, size_t heads) {
  constexpr size_t kPart = 32;
  return AmxAvailable() && shape.kv_dtype == DType::kBF16 && shape.head_dim % kPart == 0 &&
         shape.predictor_dim % kPart == 0 && kTileQueries % heads == 0;
}

size_t PromptScratchBytes(const AttentionShape& shape, size_t positions) {
  alignas(kAlignment) std::byte start;
  return PromptScratch(&start, shape, positions).Bytes(&start);
}

void AttendPrompt(const AttentionShape& shape, size_t heads, const PromptRows& rows,
                  const std::byte* const* blocks, size_t offset, const double* quantiles,
                  std::byte* scratch, uint32_t* kept, size_t kept_stride) {
  HWY_DASSERT(AttendsPrompts(shape, heads));
  HWY_DASSERT(0 < rows.count && rows.count <= kMaxPromptRows);
  HWY_DYNAMIC_DISPATCH(AttendPromptImpl)
  (shape, heads, rows, blocks, offset, quantiles, scratch, kept, kept_stride);
}

}  // namespace firesteel::kernels
#endif  // HWY_ONCE
