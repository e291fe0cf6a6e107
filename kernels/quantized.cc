#include "kernels/quantized.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/quantized.cc"
#include "hwy/foreach_target.h"
// The rest is compiled once per target, so it has to follow foreach_target.h.
#include "hwy/highway.h"
#include "kernels/dot-inl.h"
#include "kernels/integer_sums-inl.h"
// clang-format on

#ifndef FIRESTEEL_KERNELS_QUANTIZED_CC_
#define FIRESTEEL_KERNELS_QUANTIZED_CC_
namespace firesteel::kernels {
namespace {

constexpr size_t RoundUp(size_t n, size_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// What the largest activation may become: its high half rounds to 127.
constexpr float kLargestActivation = 127 * 256;
constexpr float kLargestByte = 127;

}  // namespace
}  // namespace firesteel::kernels
#endif  // FIRESTEEL_KERNELS_QUANTIZED_CC_

HWY_BEFORE_NAMESPACE();
namespace firesteel::kernels {
namespace HWY_NAMESPACE {

// Largest |x|; NaN or infinity where x has one.
inline float LargestMagnitude(const float* x, size_t n) {
  const hn::ScalableTag<float> df;
  const size_t lanes = hn::Lanes(df);
  auto largest = hn::Zero(df);
  auto spoiled = hn::Zero(df);  // Max may drop a NaN; x − x is 0 unless x is not finite
  size_t i = 0;
  const auto take = [&](auto v) HWY_ATTR {
    largest = hn::Max(largest, hn::Abs(v));
    spoiled = hn::Add(spoiled, hn::Sub(v, v));
  };
  for (; i + lanes <= n; i += lanes) take(hn::LoadU(df, x + i));
  if (i != n) take(hn::LoadN(df, x + i, n - i));
  return hn::ReduceMax(df, largest) + hn::ReduceSum(df, spoiled);
}

// Σ |round(x · factor)|, in integers, so that the order of x changes nothing.
inline int32_t SumOfMagnitudes(const float* x, size_t n, float factor) {
  const hn::ScalableTag<float> df;
  const hn::RebindToSigned<decltype(df)> di;
  const size_t lanes = hn::Lanes(df);
  auto sum = hn::Zero(di);
  const auto take = [&](auto v) HWY_ATTR {
    sum = hn::Add(sum, hn::NearestInt(hn::Abs(hn::Mul(v, hn::Set(df, factor)))));
  };
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) take(hn::LoadU(df, x + i));
  if (i != n) take(hn::LoadN(df, x + i, n - i));
  return hn::ReduceSum(di, sum);
}

// What one unit of the rounded x stands for; not finite where x is not.
inline float UnitOf(const float* x, size_t n, float reach) {
  const float largest = LargestMagnitude(x, n);
  const float finest = largest / kLargestActivation;
  // Below the least normal number, inverses are infinite.
  if (std::isinf(reach) || !std::isfinite(largest) || finest < FLT_MIN) {
    return largest / kLargestByte;
  }
  const auto sum = static_cast<float>(SumOfMagnitudes(x, n, 1.0f / finest));
  const float wanted = sum / static_cast<float>(n) * (reach / kLargestByte);
  return finest * std::clamp(wanted, 1.0f, kLargestActivation / kLargestByte);
}

void QuantizeActivationsImpl(const float* x, const QuantizedRows& out, size_t row, float reach) {
  const hn::CappedTag<float, 16> df;
  const hn::RebindToSigned<decltype(df)> di;
  const hn::Rebind<int8_t, decltype(df)> d8;
  const size_t lanes = hn::Lanes(df);
  const float unit = UnitOf(x, out.cols, reach);
  const auto inverse = hn::Set(df, unit >= FLT_MIN ? 1.0f / unit : 0.0f);
  const auto bound = hn::Set(df, kLargestActivation);
  const auto half = hn::Set(di, 128);
  int8_t* const low = out.Low(row);
  int8_t* const high = out.High(row);
  auto low_sum = hn::Zero(di);
  auto high_sum = hn::Zero(di);
  auto seen = hn::Zero(di);  // bits of the block's high values
  const auto put = [&](auto v, size_t i) HWY_ATTR {
    // Min and Max before the conversion, as that of anything else is undefined.
    const auto bounded = hn::Max(hn::Min(hn::Mul(v, inverse), bound), hn::Neg(bound));
    const auto rounded = hn::NearestInt(bounded);
    const auto h = hn::ShiftRight<8>(hn::Add(rounded, half));
    const auto l = hn::Sub(rounded, hn::ShiftLeft<8>(h));
    low_sum = hn::Add(low_sum, l);
    high_sum = hn::Add(high_sum, h);
    seen = hn::Or(seen, h);
    hn::StoreU(hn::DemoteTo(d8, l), d8, low + i);
    hn::StoreU(hn::DemoteTo(d8, h), d8, high + i);
  };
  const size_t padded = RoundUp(out.cols, kQuantizedPadding);
  uint64_t* const high_blocks = out.HighBlocks(row);
  std::memset(high_blocks, 0, out.HighWords() * sizeof(uint64_t));
  for (size_t first = 0; first < padded; first += kHighBlock) {
    seen = hn::Zero(di);
    for (size_t i = first; i < first + kHighBlock; i += lanes) {
      if (i + lanes <= out.cols) {
        put(hn::LoadU(df, x + i), i);
      } else {
        put(hn::LoadN(df, x + i, out.cols > i ? out.cols - i : 0), i);
      }
    }
    const uint64_t any = !hn::AllTrue(di, hn::Eq(seen, hn::Zero(di)));
    high_blocks[first / kHighBlock / 64] |= any << (first / kHighBlock % 64);
  }
  out.scales[row] = unit;
  out.low_sums[row] = hn::ReduceSum(di, low_sum);
  out.high_sums[row] = hn::ReduceSum(di, high_sum);

  const SumTag ds;
  int32_t* const offsets = out.NibbleOffsets(row);
  const auto eight = hn::Set(ByteTag(), 8);
  for (size_t j = 0; j < padded; j += 4 * hn::Lanes(ds)) {
    const auto four =
        hn::SumOfMulQuadAccumulate(ds, eight, hn::LoadU(SignedByteTag(), low + j), hn::Zero(ds));
    hn::StoreU(hn::Neg(four), ds, offsets + j / 4);
  }
}

float QuantizeWeightsI8Impl(const float* w, size_t cols, int8_t* q) {
  const hn::CappedTag<float, 16> df;
  const hn::Rebind<int8_t, decltype(df)> d8;
  const size_t lanes = hn::Lanes(df);
  const float largest = LargestMagnitude(w, cols);
  const auto inverse = hn::Set(df, largest > 0.0f ? 127.0f / largest : 0.0f);
  size_t i = 0;
  for (; i + lanes <= cols; i += lanes) {
    const auto rounded = hn::NearestInt(hn::Mul(hn::LoadU(df, w + i), inverse));
    hn::StoreU(hn::DemoteTo(d8, rounded), d8, q + i);
  }
  if (i != cols) {
    const auto rounded = hn::NearestInt(hn::Mul(hn::LoadN(df, w + i, cols - i), inverse));
    hn::StoreU(hn::DemoteTo(d8, rounded), d8, q + i);
    i += lanes;
  }
  const size_t padded = RoundUp(cols, kAlignment);
  if (i < padded) std::memset(q + i, 0, padded - i);
  return largest / 127.0f;
}

// Rounds kI4Block floats to [−8, 7] with the best of a few scales; returns the scale.
inline BF16 QuantizeBlock(const float* w, int8_t* q) {
  const hn::CappedTag<float, 16> df;
  const hn::Rebind<int8_t, decltype(df)> d8;
  const size_t lanes = hn::Lanes(df);
  auto largest = hn::LoadU(df, w);
  auto least = largest;
  for (size_t i = lanes; i < kI4Block; i += lanes) {
    largest = hn::Max(largest, hn::LoadU(df, w + i));
    least = hn::Min(least, hn::LoadU(df, w + i));
  }
  const float top = hn::ReduceMax(df, largest);
  const float bottom = hn::ReduceMin(df, least);
  // −8 stands for the value of largest magnitude, whichever its sign.
  const float full = (top > -bottom ? top : bottom) / -8.0f;
  const auto round = [&](float scale, size_t i) HWY_ATTR {
    const auto value = hn::Mul(hn::LoadU(df, w + i), hn::Set(df, scale == 0 ? 0 : 1.0f / scale));
    return hn::Max(hn::Min(hn::Round(value), hn::Set(df, 7.0f)), hn::Set(df, -8.0f));
  };
  BF16 best = ToBF16(full);
  float best_error = -1.0f;
  for (const float factor : {1.0f, 0.95f, 0.9f, 0.85f, 0.8f}) {
    const BF16 rounded_scale = ToBF16(full * factor);
    const float scale = ToF32(rounded_scale);
    auto squares = hn::Zero(df);
    for (size_t i = 0; i < kI4Block; i += lanes) {
      const auto error = hn::NegMulAdd(round(scale, i), hn::Set(df, scale), hn::LoadU(df, w + i));
      squares = hn::MulAdd(error, error, squares);
    }
    const float error = hn::ReduceSum(df, squares);
    if (best_error < 0.0f || error < best_error) {
      best = rounded_scale;
      best_error = error;
    }
  }
  for (size_t i = 0; i < kI4Block; i += lanes) {
    hn::StoreU(hn::DemoteTo(d8, hn::NearestInt(round(ToF32(best), i))), d8, q + i);
  }
  return best;
}

void QuantizeWeightsI4Impl(const float* w, size_t cols, uint8_t* q, BF16* scales) {
  float group[kI4Group];
  int8_t rounded[kI4Group];
  for (size_t first = 0; first < cols; first += kI4Group) {
    const size_t n = std::min(kI4Group, cols - first);
    std::memcpy(group, w + first, n * sizeof(float));
    std::fill(group + n, group + kI4Group, 0.0f);
    for (size_t half = 0; half < 2; ++half) {
      *scales++ = QuantizeBlock(group + half * kI4Block, rounded + half * kI4Block);
    }
    for (size_t i = 0; i < kI4Group / 2; ++i) {
      *q++ = static_cast<uint8_t>((rounded[i] + 8) | ((rounded[i + kI4Group / 2] + 8) << 4));
    }
  }
}

// A tile's tokens.
struct Token {
  Token(const QuantizedRows& x, size_t t)
      : low(x.Low(t)),
        high(x.High(t)),
        nibble_offsets(x.NibbleOffsets(t)),
        high_blocks(x.HighBlocks(t)),
        high_words(x.HasHigh(t) ? x.HighWords() : 0),
        scale(x.scales[t]),
        low_sum(x.low_sums[t]),
        high_sum(x.high_sums[t]) {}
  const int8_t* HWY_RESTRICT low;
  const int8_t* HWY_RESTRICT high;
  const int32_t* HWY_RESTRICT nibble_offsets;
  const uint64_t* HWY_RESTRICT high_blocks;
  size_t high_words;  // 0 where `high` is all zeros
  float scale;
  int32_t low_sum;
  int32_t high_sum;
};

// Four sums to floats, without the 128 that was added to every weight, since the CPU multiplies
// unsigned by signed bytes.
HWY_INLINE Four WithoutOffset(hn::Vec<hn::FixedTag<int32_t, 4>> sums, int32_t x_sum) {
  const hn::FixedTag<int32_t, 4> di;
  return hn::ConvertTo(FourTag(), hn::Sub(sums, hn::Set(di, 128 * x_sum)));
}

// A vector of 8-bit weights plus 128.
HWY_INLINE hn::Vec<ByteTag> LoadFlipped(const uint8_t* w) {
  return hn::Xor(hn::LoadU(ByteTag(), w), hn::Set(ByteTag(), 0x80));
}

// Adds the products of x with the bytes at `at` of four rows of 8-bit weights, plus 128.
HWY_INLINE void AddBytes(const TileRows& w, size_t at, hn::Vec<SignedByteTag> x, SumVec& s0,
                         SumVec& s1, SumVec& s2, SumVec& s3) {
  s0 = hn::SumOfMulQuadAccumulate(SumTag(), LoadFlipped(w.r0 + at), x, s0);
  s1 = hn::SumOfMulQuadAccumulate(SumTag(), LoadFlipped(w.r1 + at), x, s1);
  s2 = hn::SumOfMulQuadAccumulate(SumTag(), LoadFlipped(w.r2 + at), x, s2);
  s3 = hn::SumOfMulQuadAccumulate(SumTag(), LoadFlipped(w.r3 + at), x, s3);
}

// The sums of the high plane with four rows of 8-bit weights.
HWY_NOINLINE Four HighSumsI8(const Token& x, const TileRows& w) {
  const SumTag ds;
  const size_t bytes = hn::Lanes(ByteTag());
  SumVec h0 = hn::Zero(ds), h1 = h0, h2 = h0, h3 = h0;
  ForHighBlocks(x.high_blocks, x.high_words, [&](size_t block) HWY_ATTR {
    for (size_t i = block * kHighBlock; i < (block + 1) * kHighBlock; i += bytes) {
      AddBytes(w, i, hn::LoadU(SignedByteTag(), x.high + i), h0, h1, h2, h3);
    }
  });
  return WithoutOffset(SumsOfFour(h0, h1, h2, h3), x.high_sum);
}

// The sums of both planes.
HWY_INLINE Four JoinPlanes(const Token& x, const TileRows& w,
                           hn::Vec<hn::FixedTag<int32_t, 4>> low) {
  const Four sums = WithoutOffset(low, x.low_sum);
  if (HWY_LIKELY(x.high_words == 0)) return sums;
  return hn::MulAdd(HighSumsI8(x, w), hn::Set(FourTag(), 256.0f), sums);
}

// Joined sums of four rows to outputs; row_scales [4].
HWY_INLINE void StoreScaled(const Token& x, Four joined, const float* row_scales,
                            float* HWY_RESTRICT y) {
  const FourTag df;
  const auto scales = hn::Mul(hn::LoadU(df, row_scales), hn::Set(df, x.scale));
  hn::StoreU(hn::Mul(joined, scales), df, y);
}

// What a tile of listed rows does for those to come.
struct FetchQueued {
  HWY_INLINE void operator()(size_t byte) const {
    if (byte % kAlignment == 0) fetcher.Next();
  }
  RowFetcher& fetcher;
};

// The joined sums of one token with four rows of 8-bit weights.
template <class FetchFn>
HWY_INLINE Four SumI8(const Token& x, const TileRows& w, const FetchFn& fetch, size_t k) {
  const SumTag ds;
  const size_t bytes = hn::Lanes(ByteTag());
  SumVec a0 = hn::Zero(ds), a1 = a0, a2 = a0, a3 = a0;
  for (size_t i = 0; i < k; i += bytes) {
    fetch(i);
    AddBytes(w, i, hn::LoadU(SignedByteTag(), x.low + i), a0, a1, a2, a3);
  }
  return JoinPlanes(x, w, SumsOfFour(a0, a1, a2, a3));
}

// One token × up to four rows of 8-bit weights; row_scales [4].
template <class FetchFn>
HWY_NOINLINE void TileI8(const Token& x, const TileRows& w, const FetchFn& fetch, size_t k,
                         const float* row_scales, float* HWY_RESTRICT y) {
  StoreScaled(x, SumI8(x, w, fetch, k), row_scales, y);
}

// Two tokens × up to four rows.
template <class FetchFn>
HWY_NOINLINE void PairTileI8(const Token& x0, const Token& x1, const TileRows& w,
                             const FetchFn& fetch, size_t k, const float* row_scales,
                             float* HWY_RESTRICT y0, float* HWY_RESTRICT y1) {
  const SumTag ds;
  const SignedByteTag di8;
  const size_t bytes = hn::Lanes(di8);
  SumVec a0 = hn::Zero(ds), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0;
  for (size_t i = 0; i < k; i += bytes) {
    fetch(i);
    const auto low0 = hn::LoadU(di8, x0.low + i);
    const auto low1 = hn::LoadU(di8, x1.low + i);
    const auto add = [&](const uint8_t* row, SumVec& a, SumVec& b) HWY_ATTR {
      const auto u = LoadFlipped(row + i);
      a = hn::SumOfMulQuadAccumulate(ds, u, low0, a);
      b = hn::SumOfMulQuadAccumulate(ds, u, low1, b);
    };
    add(w.r0, a0, b0);
    add(w.r1, a1, b1);
    add(w.r2, a2, b2);
    add(w.r3, a3, b3);
  }
  StoreScaled(x0, JoinPlanes(x0, w, SumsOfFour(a0, a1, a2, a3)), row_scales, y0);
  StoreScaled(x1, JoinPlanes(x1, w, SumsOfFour(b0, b1, b2, b3)), row_scales, y1);
}

// Both halves of a vector of nibbles times their activations, each with its block's scale.
// offset0, offset1 take the 8 off every nibble. `scales` holds the bf16 scales of the two blocks.
template <class DF>
HWY_INLINE hn::Vec<DF> AddNibbles(DF df, hn::Vec<ByteTag> w, hn::Vec<SignedByteTag> x0,
                                  hn::Vec<SignedByteTag> x1, SumVec offset0, SumVec offset1,
                                  const BF16* scales, hn::Vec<DF> sum) {
  const SumTag ds;
  const ByteTag du8;
  const hn::Repartition<uint16_t, ByteTag> du16;
  const hn::RebindToUnsigned<DF> du32;
  const auto mask = hn::Set(du8, 0x0F);
  const auto lower = hn::And(w, mask);
  const auto upper = hn::And(hn::BitCast(du8, hn::ShiftRight<4>(hn::BitCast(du16, w))), mask);
  const auto s0 = hn::SumOfMulQuadAccumulate(ds, lower, x0, offset0);
  const auto s1 = hn::SumOfMulQuadAccumulate(ds, upper, x1, offset1);
  uint32_t pair;  // one load that broadcasts both scales
  std::memcpy(&pair, scales, sizeof(pair));
  const auto both = hn::Set(du32, pair);
  const auto scale0 = hn::BitCast(df, hn::ShiftLeft<16>(both));
  const auto scale1 = hn::BitCast(df, hn::And(both, hn::Set(du32, 0xFFFF0000u)));
  sum = hn::MulAdd(hn::ConvertTo(df, s0), scale0, sum);
  return hn::MulAdd(hn::ConvertTo(df, s1), scale1, sum);
}

// Block scales of the rows of a tile.
struct TileScales {
  const BF16* s0;
  const BF16* s1;
  const BF16* s2;
  const BF16* s3;

  template <class ScalesFn>
  static HWY_INLINE TileScales Of(const ScalesFn& scales, size_t first, size_t count) {
    return {scales(first), scales(first + (count > 1 ? 1 : 0)),
            scales(first + (count > 2 ? 2 : count - 1)),
            scales(first + (count > 3 ? 3 : count - 1))};
  }
};

// Adds 256 · the products of the high plane, whose blocks are half a group each, in the lower or in
// the upper nibbles.
template <class DF>
HWY_NOINLINE void AddHighI4(DF df, const Token& x, const TileRows& w, const TileScales& scales,
                            hn::Vec<DF>& a0, hn::Vec<DF>& a1, hn::Vec<DF>& a2, hn::Vec<DF>& a3) {
  static_assert(kHighBlock == kI4Block && kI4Group == 2 * kI4Block);
  const SumTag ds;
  const ByteTag du8;
  const SignedByteTag di8;
  const hn::Repartition<uint16_t, ByteTag> du16;
  const size_t bytes = hn::Lanes(du8);
  ForHighBlocks(x.high_blocks, x.high_words, [&](size_t block) HWY_ATTR {
    for (size_t o = 0; o < kHighBlock; o += bytes) {
      const auto high = hn::LoadU(di8, x.high + block * kHighBlock + o);
      const auto offset =
          hn::Neg(hn::SumOfMulQuadAccumulate(ds, hn::Set(du8, 8), high, hn::Zero(ds)));
      const auto add = [&](const uint8_t* row, const BF16* row_scales, hn::Vec<DF>& sum) HWY_ATTR {
        const auto both = hn::LoadU(du8, row + block / 2 * kHighBlock + o);
        const auto upper = hn::BitCast(du8, hn::ShiftRight<4>(hn::BitCast(du16, both)));
        const auto nibbles = hn::And(block % 2 == 0 ? both : upper, hn::Set(du8, 0x0F));
        const auto products = hn::SumOfMulQuadAccumulate(ds, nibbles, high, offset);
        const auto scale = hn::Set(df, 256.0f * ToF32(row_scales[block]));
        sum = hn::MulAdd(hn::ConvertTo(df, products), scale, sum);
      };
      add(w.r0, scales.s0, a0);
      add(w.r1, scales.s1, a1);
      add(w.r2, scales.s2, a2);
      add(w.r3, scales.s3, a3);
    }
  });
}

// The sums of one token with up to four rows of 4-bit weights.
template <class FetchFn>
HWY_INLINE Four SumI4(const Token& x, const TileRows& w, const TileScales& scales,
                      const FetchFn& fetch, size_t k) {
  const SumTag ds;
  const ByteTag du8;
  const SignedByteTag di8;
  const hn::RebindToFloat<SumTag> df;
  const size_t bytes = hn::Lanes(du8);
  constexpr size_t kHalf = kI4Group / 2;
  auto a0 = hn::Zero(df), a1 = a0, a2 = a0, a3 = a0;
  for (size_t group = 0; group < k; group += kI4Group) {
    const size_t block = group / kI4Block;
    for (size_t o = 0; o < kHalf; o += bytes) {
      const size_t at = group / 2 + o;
      fetch(at);
      const auto x0 = hn::LoadU(di8, x.low + group + o);
      const auto x1 = hn::LoadU(di8, x.low + group + kHalf + o);
      const auto c0 = hn::LoadU(ds, x.nibble_offsets + (group + o) / 4);
      const auto c1 = hn::LoadU(ds, x.nibble_offsets + (group + kHalf + o) / 4);
      const auto row = [&](const uint8_t* r) HWY_ATTR { return hn::LoadU(du8, r + at); };
      a0 = AddNibbles(df, row(w.r0), x0, x1, c0, c1, scales.s0 + block, a0);
      a1 = AddNibbles(df, row(w.r1), x0, x1, c0, c1, scales.s1 + block, a1);
      a2 = AddNibbles(df, row(w.r2), x0, x1, c0, c1, scales.s2 + block, a2);
      a3 = AddNibbles(df, row(w.r3), x0, x1, c0, c1, scales.s3 + block, a3);
    }
  }
  if (HWY_UNLIKELY(x.high_words != 0)) AddHighI4(df, x, w, scales, a0, a1, a2, a3);
  const auto scale = hn::Set(df, x.scale);
  return SumsOf(df, hn::Mul(a0, scale), hn::Mul(a1, scale), hn::Mul(a2, scale), hn::Mul(a3, scale));
}

template <class FetchFn>
HWY_NOINLINE void TileI4(const Token& x, const TileRows& w, const TileScales& scales,
                         const FetchFn& fetch, size_t k, float* HWY_RESTRICT y) {
  hn::StoreU(SumI4(x, w, scales, fetch, k), FourTag(), y);
}

// Which four rows a tile takes, and what to fetch meanwhile.
struct Neighbours {  // of a list of rows: the next four
  FetchQueued Fetch(const TileRows& /*rows*/) const { return {fetcher}; }
  RowFetcher& fetcher;
  size_t num;
  size_t tiles() const { return hwy::DivCeil(num, size_t{4}); }
  size_t count(size_t tile) const { return std::min<size_t>(4, num - 4 * tile); }
  size_t position(size_t tile, size_t i) const { return 4 * tile + i; }
};
struct Quarters {  // of a range: one of each quarter, so that they are four streams
  static FetchFurther Fetch(const TileRows& rows) { return FetchFurther(rows); }
  size_t num;
  size_t tiles() const { return num / 4 + num % 4; }
  size_t count(size_t tile) const { return tile < num / 4 ? 4 : 1; }
  size_t position(size_t tile, size_t i) const {
    return tile < num / 4 ? tile + i * (num / 4) : tile + 3 * (num / 4);
  }
};

// All tokens of x times the rows row_of(position) of w, to out(t)[position].
template <class Order, class RowFn, class OutFn>
HWY_INLINE void MultiplyRows(const QuantizedRows& x, const TypedView& w, const Order& order,
                             const RowFn& row_of, const OutFn& out) {
  const bool bytes = w.dtype == DType::kI8;
  const size_t k = RoundUp(x.cols, bytes ? kAlignment : kI4Group);
  const size_t tiles = order.tiles();
  for (size_t tile = 0; tile < tiles; ++tile) {
    const size_t count = order.count(tile);
    const auto row = [&](size_t i) { return row_of(order.position(tile, i)); };
    const TileRows rows = TileRows::Of([&](size_t i) { return w.RowBytes(row(i)); }, 0, count);
    const auto fetch = order.Fetch(rows);
    const auto store = [&](size_t t, const float* sums) {
      for (size_t i = 0; i < count; ++i) out(t)[order.position(tile, i)] = sums[i];
    };
    HWY_ALIGN float sums[4], sums1[4];
    if (bytes) {
      HWY_ALIGN float row_scales[4] = {};
      for (size_t i = 0; i < count; ++i) row_scales[i] = w.row_scales[row(i)];
      for (size_t t = 0; t < x.rows; t += 2) {
        const bool two = t + 2 <= x.rows;
        const Token x0(x, t);
        if (two && t == 0) {
          PairTileI8(x0, Token(x, 1), rows, fetch, k, row_scales, sums, sums1);
        } else if (two) {
          PairTileI8(x0, Token(x, t + 1), rows, FetchNothing(), k, row_scales, sums, sums1);
        } else if (t == 0) {
          TileI8(x0, rows, fetch, k, row_scales, sums);
        } else {
          TileI8(x0, rows, FetchNothing(), k, row_scales, sums);
        }
        if (two) store(t + 1, sums1);
        store(t, sums);
      }
    } else {
      const TileScales scales =
          TileScales::Of([&](size_t i) { return w.BlockScales(row(i)); }, 0, count);
      for (size_t t = 0; t < x.rows; ++t) {
        if (t == 0) {
          TileI4(Token(x, t), rows, scales, fetch, k, sums);
        } else {
          TileI4(Token(x, t), rows, scales, FetchNothing(), k, sums);
        }
        store(t, sums);
      }
    }
  }
}

// One token times 8-bit rows, each read to its end before the next: to memory a single stream. Four
// streams (Stream) are as fast by themselves, but not after scattered rows, which leave hardware
// prefetchers cautious for some 100 µs. Takes whole fours of rows; returns how many.
HWY_INLINE size_t StreamI8(const Token& x, const TypedView& w, size_t row_begin, size_t row_end,
                           float* HWY_RESTRICT y) {
  constexpr size_t kAhead = 1536;  // with 1024 or 3072 slower by some percent
  const size_t k = RoundUp(w.cols, kAlignment);
  const size_t num = (row_end - row_begin) / 4 * 4;
  const auto sum_of = [&](size_t row) HWY_ATTR {
    const uint8_t* HWY_RESTRICT p = w.RowBytes(row);
    const size_t lanes = hn::Lanes(ByteTag());
    SumVec s0 = hn::Zero(SumTag()), s1 = s0;
    const auto add = [&](size_t i, SumVec& sum) HWY_ATTR {
      if (i % kAlignment == 0) FetchToL2(p + i + kAhead);
      const auto low = hn::LoadU(SignedByteTag(), x.low + i);
      sum = hn::SumOfMulQuadAccumulate(SumTag(), LoadFlipped(p + i), low, sum);
    };
    size_t i = 0;
    for (; i + 4 * lanes <= k; i += 4 * lanes) {
      add(i, s0);
      add(i + lanes, s1);
      add(i + 2 * lanes, s0);
      add(i + 3 * lanes, s1);
    }
    for (; i < k; i += lanes) add(i, s0);
    return hn::Add(s0, s1);
  };
  for (size_t row = row_begin; row < row_begin + num; row += 4) {
    const SumVec a = sum_of(row), b = sum_of(row + 1), c = sum_of(row + 2), d = sum_of(row + 3);
    const TileRows rows = TileRows::Of([&](size_t i) { return w.RowBytes(row + i); }, 0, 4);
    StoreScaled(x, JoinPlanes(x, rows, SumsOfFour(a, b, c, d)), w.row_scales + row, y + row);
  }
  return num;
}

// One token times a range of rows, which is what decoding a lone sequence mostly does.
size_t StreamRows(const Token& x, const TypedView& w, size_t row_begin, size_t row_end,
                  float* HWY_RESTRICT y) {
  if (w.dtype == DType::kI8) return StreamI8(x, w, row_begin, row_end, y);
  const size_t k = RoundUp(w.cols, kI4Group);
  return Stream(
      row_begin, row_end,
      [&](size_t row, size_t quarter) HWY_ATTR {
        const TileRows rows =
            TileRows::Of([&](size_t i) { return w.RowBytes(row + i * quarter); }, 0, 4);
        const TileScales scales =
            TileScales::Of([&](size_t i) { return w.BlockScales(row + i * quarter); }, 0, 4);
        return SumI4(x, rows, scales, FetchFurther(rows), k);
      },
      [&](size_t row, Four sums) HWY_ATTR { hn::StoreU(sums, FourTag(), y + row); });
}

void QuantizedMatMulImpl(const QuantizedRows& x, const TypedView& w, size_t row_begin,
                         size_t row_end, const MatView& y) {
  if (x.rows == 1) row_begin += StreamRows(Token(x, 0), w, row_begin, row_end, y.Row(0));
  MultiplyRows(
      x, w, Quarters{row_end - row_begin}, [&](size_t j) { return row_begin + j; },
      [&](size_t t) { return y.Row(t) + row_begin; });
}

// One token times the 8-bit rows active[begin], …, four at a time, inlined like a stream. Returns
// how many it took.
size_t ListedI8(const Token& x, const TypedView& w, const uint32_t* active, size_t begin,
                size_t end, RowFetcher& fetcher, float* HWY_RESTRICT out) {
  const size_t k = RoundUp(w.cols, kAlignment);
  const size_t num = (end - begin) / 4 * 4;
  for (size_t j = begin; j < begin + num; j += 4) {
    const TileRows rows = TileRows::Of([&](size_t i) { return w.RowBytes(active[i]); }, j, 4);
    HWY_ALIGN const float row_scales[4] = {w.row_scales[active[j]], w.row_scales[active[j + 1]],
                                           w.row_scales[active[j + 2]],
                                           w.row_scales[active[j + 3]]};
    StoreScaled(x, SumI8(x, rows, FetchQueued{fetcher}, k), row_scales, out + j);
  }
  return num;
}

void QuantizedMaskedMatVecImpl(const QuantizedRows& x, const TypedView& w, const uint32_t* active,
                               size_t begin, size_t end, RowFetcher& fetcher, float* out) {
  if (w.dtype == DType::kI8) begin += ListedI8(Token(x, 0), w, active, begin, end, fetcher, out);
  MultiplyRows(
      x.From(0, 1), w, Neighbours{fetcher, end - begin},
      [&](size_t j) { return size_t{active[begin + j]}; }, [&](size_t) { return out + begin; });
}

}  // namespace HWY_NAMESPACE
}  // namespace firesteel::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace firesteel::kernels {

HWY_EXPORT(QuantizeActivationsImpl);
HWY_EXPORT(QuantizeWeightsI8Impl);
HWY_EXPORT(QuantizeWeightsI4Impl);
HWY_EXPORT(QuantizedMatMulImpl);
HWY_EXPORT(QuantizedMaskedMatVecImpl);

QuantizedRows QuantizedRows::Place(void* memory, size_t rows, size_t cols) {
  QuantizedRows out;
  out.rows = rows;
  out.cols = cols;
  out.plane = RoundUp(cols, kQuantizedPadding);
  // In an order that keeps each part aligned.
  out.planes = static_cast<int8_t*>(memory);
  out.high_blocks = reinterpret_cast<uint64_t*>(out.planes + 2 * rows * out.plane);
  out.nibble_offsets = reinterpret_cast<int32_t*>(out.high_blocks + rows * out.HighWords());
  out.low_sums = out.nibble_offsets + rows * out.plane / 4;
  out.high_sums = out.low_sums + rows;
  out.scales = reinterpret_cast<float*>(out.high_sums + rows);
  return out;
}

void QuantizeActivations(const float* x, const QuantizedRows& out, size_t row, float reach) {
  HWY_DASSERT(row < out.rows && out.cols <= out.plane && out.plane % kQuantizedPadding == 0);
  HWY_DASSERT(out.cols <= kMaxQuantizedCols);
  HWY_DYNAMIC_DISPATCH(QuantizeActivationsImpl)(x, out, row, reach);
}

float QuantizeWeightsI8(const float* w, size_t cols, int8_t* q) {
  return HWY_DYNAMIC_DISPATCH(QuantizeWeightsI8Impl)(w, cols, q);
}

void QuantizeWeightsI4(const float* w, size_t cols, uint8_t* q, BF16* scales) {
  HWY_DYNAMIC_DISPATCH(QuantizeWeightsI4Impl)(w, cols, q, scales);
}

void Dequantize(const TypedView& w, size_t row, size_t first, size_t n, float* out) {
  for (size_t i = 0; i < n; ++i) {
    const size_t col = first + i;
    switch (w.dtype) {
      case DType::kF32:
        out[i] = w.Row<float>(row)[col];
        break;
      case DType::kBF16:
        out[i] = ToF32(w.Row<BF16>(row)[col]);
        break;
      case DType::kI8:
        out[i] = static_cast<float>(w.Row<int8_t>(row)[col]) * w.row_scales[row];
        break;
      case DType::kI4: {
        const size_t in_group = col % kI4Group;
        const uint8_t byte =
            w.RowBytes(row)[col / kI4Group * (kI4Group / 2) + in_group % (kI4Group / 2)];
        const int nibble = in_group < kI4Group / 2 ? byte & 0xF : byte >> 4;
        out[i] = static_cast<float>(nibble - 8) * ToF32(w.BlockScales(row)[col / kI4Block]);
        break;
      }
    }
  }
}

void QuantizedMatMul(const QuantizedRows& x, const TypedView& w, size_t row_begin, size_t row_end,
                     const MatView& y) {
  HWY_DASSERT(IsQuantized(w.dtype) && x.cols == w.cols);
  HWY_DASSERT(row_begin <= row_end && row_end <= w.rows && w.rows <= y.cols);
  HWY_DASSERT(x.rows <= y.rows);
  HWY_DYNAMIC_DISPATCH(QuantizedMatMulImpl)(x, w, row_begin, row_end, y);
}

void QuantizedMaskedMatVec(const QuantizedRows& x, const TypedView& w, const uint32_t* active,
                           size_t begin, size_t end, RowFetcher& fetcher, float* out) {
  HWY_DASSERT(IsQuantized(w.dtype) && x.cols == w.cols && begin <= end);
  HWY_DYNAMIC_DISPATCH(QuantizedMaskedMatVecImpl)(x, w, active, begin, end, fetcher, out);
}

}  // namespace firesteel::kernels
#endif  // HWY_ONCE
