#include "kernels/screen.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "kernels/statistical_topk.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/screen.cc"
#include "hwy/foreach_target.h"
// The rest is compiled once per target, so it has to follow foreach_target.h.
#include "hwy/highway.h"
#include "kernels/dot-inl.h"
#include "kernels/integer_sums-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace firesteel::kernels {
namespace HWY_NAMESPACE {

I2Row QuantizeWeightsI2Impl(const float* w, size_t cols, uint8_t* codes) {
  const hn::CappedTag<float, 16> df;
  const hn::RebindToSigned<decltype(df)> di;
  const hn::Rebind<uint8_t, decltype(df)> d8;
  const size_t lanes = hn::Lanes(df);
  const size_t padded = PaddedI2Cols(cols);
  auto squares = hn::Zero(df);
  for (size_t i = 0; i < padded; i += lanes) {
    const auto v = hn::LoadU(df, w + i);
    squares = hn::MulAdd(v, v, squares);
  }
  const double square = static_cast<double>(hn::ReduceSum(df, squares));
  const auto step =
      hn::Set(df, static_cast<float>(0.9957 * std::sqrt(square / static_cast<double>(cols))));
  const auto one = hn::Set(di, 1);
  auto products = hn::Zero(df);
  auto levels = hn::Zero(di);  // Σ q²
  const auto code = [&](const float* p) HWY_ATTR {
    const auto v = hn::LoadU(df, p);
    const auto c =
        hn::Add(hn::IfThenElseZero(hn::RebindMask(di, hn::Ge(v, hn::Neg(step))), one),
                hn::Add(hn::IfThenElseZero(hn::RebindMask(di, hn::Ge(v, hn::Zero(df))), one),
                        hn::IfThenElseZero(hn::RebindMask(di, hn::Ge(v, step)), one)));
    const auto q = hn::Sub(hn::Add(c, c), hn::Set(di, 3));
    products = hn::MulAdd(v, hn::ConvertTo(df, q), products);
    levels = hn::Add(levels, hn::Mul(q, q));
    return c;
  };
  constexpr size_t kQuarter = kI2Group / 4;
  for (size_t group = 0; group < padded; group += kI2Group) {
    for (size_t o = 0; o < kQuarter; o += lanes) {
      const float* p = w + group + o;
      const auto c0 = code(p), c1 = code(p + kQuarter), c2 = code(p + 2 * kQuarter),
                 c3 = code(p + 3 * kQuarter);
      const auto packed = hn::Or(hn::Or(c0, hn::ShiftLeft<2>(c1)),
                                 hn::Or(hn::ShiftLeft<4>(c2), hn::ShiftLeft<6>(c3)));
      hn::StoreU(hn::DemoteTo(d8, packed), d8, codes + group / 4 + o);
    }
  }
  if (square == 0.0) return {};
  const double product = static_cast<double>(hn::ReduceSum(df, products));
  // Zeros behind the row have the level 1 (or 3, in a row of zeros).
  const double level_square =
      static_cast<double>(hn::ReduceSum(di, levels)) - static_cast<double>(padded - cols);
  const double scale = square / product;
  const double norm_square = scale * scale * level_square;
  return {.scale = static_cast<float>(scale),
          .residual = static_cast<float>(std::sqrt(std::max(0.0, norm_square - square))),
          .norm = static_cast<float>(std::sqrt(norm_square))};
}

// A vector of bytes holds four vectors of codes; adds each times its activations, of one token or
// two.
template <size_t kTokens>
HWY_INLINE void AddCodes(hn::Vec<ByteTag> w, const int8_t* HWY_RESTRICT x,
                         [[maybe_unused]] const int8_t* HWY_RESTRICT x1, SumVec& a,
                         [[maybe_unused]] SumVec& b) {
  const SumTag ds;
  const ByteTag du8;
  const SignedByteTag di8;
  const hn::Repartition<uint16_t, ByteTag> du16;
  constexpr size_t kNext = kI2Group / 4;  // from one code's activations to the next one's
  const auto mask = hn::Set(du8, 0x03);
  const auto wide = hn::BitCast(du16, w);
  const auto c0 = hn::And(w, mask);
  const auto c1 = hn::And(hn::BitCast(du8, hn::ShiftRight<2>(wide)), mask);
  const auto c2 = hn::And(hn::BitCast(du8, hn::ShiftRight<4>(wide)), mask);
  const auto c3 = hn::And(hn::BitCast(du8, hn::ShiftRight<6>(wide)), mask);
  const auto add = [&](const int8_t* token, SumVec& sum) HWY_ATTR {
    sum = hn::SumOfMulQuadAccumulate(ds, c0, hn::LoadU(di8, token), sum);
    sum = hn::SumOfMulQuadAccumulate(ds, c1, hn::LoadU(di8, token + kNext), sum);
    sum = hn::SumOfMulQuadAccumulate(ds, c2, hn::LoadU(di8, token + 2 * kNext), sum);
    sum = hn::SumOfMulQuadAccumulate(ds, c3, hn::LoadU(di8, token + 3 * kNext), sum);
  };
  add(x, a);
  if constexpr (kTokens > 1) add(x1, b);
}

// 2 · Σ code · x − 3 · Σ x, that is Σ q · x, of four rows.
HWY_INLINE Four LevelSums(hn::Vec<hn::FixedTag<int32_t, 4>> sums, int32_t x_sum) {
  const hn::FixedTag<int32_t, 4> di;
  return hn::ConvertTo(FourTag(), hn::Sub(hn::Add(sums, sums), hn::Set(di, 3 * x_sum)));
}

HWY_INLINE Four Scaled(Four sums, float x_scale, const float* row_scales) {
  const FourTag df;
  return hn::Mul(sums, hn::Mul(hn::LoadU(df, row_scales), hn::Set(df, x_scale)));
}

// The sums of one token, or of two (t and t + 1), with four rows.
template <size_t kTokens, class FetchFn>
HWY_INLINE void SumI2(const QuantizedRows& x, size_t t, const TileRows& w, const FetchFn& fetch,
                      size_t row_bytes, Four& sums, Four& sums1) {
  static_assert(kTokens == 1 || kTokens == 2);
  const SumTag ds;
  const ByteTag du8;
  constexpr size_t kGroupBytes = kI2Group / 4;
  const size_t bytes = hn::Lanes(du8);
  const int8_t* const token = x.Low(t);
  const int8_t* const token1 = kTokens > 1 ? x.Low(t + 1) : token;
  SumVec a0 = hn::Zero(ds), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0;
  for (size_t group = 0; group < row_bytes; group += kGroupBytes) {
    fetch(group);
    for (size_t o = 0; o < kGroupBytes; o += bytes) {
      const size_t at = group + o;
      const auto add = [&](const uint8_t* row, SumVec& a, SumVec& b) HWY_ATTR {
        AddCodes<kTokens>(hn::LoadU(du8, row + at), token + 4 * group + o, token1 + 4 * group + o,
                          a, b);
      };
      add(w.r0, a0, b0);
      add(w.r1, a1, b1);
      add(w.r2, a2, b2);
      add(w.r3, a3, b3);
    }
  }
  sums = LevelSums(SumsOfFour(a0, a1, a2, a3), x.low_sums[t]);
  if constexpr (kTokens > 1) sums1 = LevelSums(SumsOfFour(b0, b1, b2, b3), x.low_sums[t + 1]);
}

// All tokens times `count` rows, one or four, to out(t)[position(i)].
template <class PositionFn, class OutFn>
HWY_INLINE void TileI2(const QuantizedRows& x, const TileRows& rows, size_t row_bytes, size_t count,
                       const float* scales, const PositionFn& position, const OutFn& out) {
  HWY_ALIGN float row_scales[4], values[4];
  for (size_t i = 0; i < 4; ++i) row_scales[i] = scales[position(i < count ? i : 0)];
  const auto store = [&](size_t t, Four sums) HWY_ATTR {
    hn::Store(Scaled(sums, x.scales[t], row_scales), FourTag(), values);
    for (size_t i = 0; i < count; ++i) out(t)[position(i)] = values[i];
  };
  for (size_t t = 0; t < x.rows; t += 2) {
    Four sums = hn::Zero(FourTag()), sums1 = sums;
    const bool two = t + 2 <= x.rows;
    if (two && t == 0) {
      SumI2<2>(x, t, rows, FetchFurther(rows), row_bytes, sums, sums1);
    } else if (two) {
      SumI2<2>(x, t, rows, FetchNothing(), row_bytes, sums, sums1);
    } else {
      SumI2<1>(x, t, rows, FetchNothing(), row_bytes, sums, sums1);
    }
    store(t, sums);
    if (two) store(t + 1, sums1);
  }
}

void ScreenMatMulImpl(const QuantizedRows& x, const I2View& w, size_t row_begin, size_t row_end,
                      const MatView& y) {
  const size_t row_bytes = BytesOfI2Row(w.cols);
  // Four rows, each `quarter` behind the last, are four streams through memory.
  const auto rows = [&](size_t row, size_t quarter) HWY_ATTR {
    return TileRows::Of([&](size_t i) { return w.codes + (row + i * quarter) * row_bytes; }, 0, 4);
  };
  if (x.rows == 1) {
    row_begin += Stream(
        row_begin, row_end,
        [&](size_t row, size_t quarter) HWY_ATTR {
          Four sums = hn::Zero(FourTag()), none = sums;
          const TileRows tile = rows(row, quarter);
          SumI2<1>(x, 0, tile, FetchFurther(tile), row_bytes, sums, none);
          return sums;
        },
        [&](size_t row, Four sums) HWY_ATTR {
          hn::StoreU(Scaled(sums, x.scales[0], w.scales + row), FourTag(), y.Row(0) + row);
        });
  }
  const auto out = [&](size_t t) { return y.Row(t); };
  const size_t quarter = (row_end - row_begin) / 4;
  for (size_t row = row_begin; row < row_begin + quarter; ++row) {
    TileI2(
        x, rows(row, quarter), row_bytes, 4, w.scales, [&](size_t i) { return row + i * quarter; },
        out);
  }
  for (size_t row = row_begin + 4 * quarter; row < row_end; ++row) {
    TileI2(x, rows(row, 0), row_bytes, 1, w.scales, [&](size_t) { return row; }, out);
  }
}

// x [p] = H · x / sqrt(p), p a power of two. Each pass adds and subtracts elements `half` apart;
// sums of two have one order, so the width of vectors changes no bit.
HWY_INLINE void Hadamard(float* HWY_RESTRICT x, size_t p) {
  const hn::CappedTag<float, 16> df;
  const size_t lanes = hn::Lanes(df);
  const float norm = 1.0f / std::sqrt(static_cast<float>(p));
  size_t half = 1;
  if (p < lanes) {
    for (; half < p; half *= 2) {
      for (size_t i = 0; i < p; ++i) {
        if ((i & half) != 0) continue;
        const float a = x[i], b = x[i + half];
        x[i] = a + b;
        x[i + half] = a - b;
      }
    }
    for (size_t i = 0; i < p; ++i) x[i] *= norm;
    return;
  }
  // Inside a vector: lane i gets its partner plus or minus itself.
  HWY_ALIGN int32_t partner[16];
  HWY_ALIGN float sign[16];
  for (; half < lanes; half *= 2) {
    for (size_t i = 0; i < lanes; ++i) {
      partner[i] = static_cast<int32_t>(i ^ half);
      sign[i] = (i & half) != 0 ? -1.0f : 1.0f;
    }
    const auto indices = hn::SetTableIndices(df, partner);
    const auto signs = hn::Load(df, sign);
    for (size_t i = 0; i < p; i += lanes) {
      const auto v = hn::LoadU(df, x + i);
      hn::StoreU(hn::Add(hn::TableLookupLanes(v, indices), hn::Mul(v, signs)), df, x + i);
    }
  }
  for (; half < p; half *= 2) {
    for (size_t block = 0; block < p; block += 2 * half) {
      for (size_t i = block; i < block + half; i += lanes) {
        const auto a = hn::LoadU(df, x + i);
        const auto b = hn::LoadU(df, x + i + half);
        hn::StoreU(hn::Add(a, b), df, x + i);
        hn::StoreU(hn::Sub(a, b), df, x + i + half);
      }
    }
  }
  const auto factor = hn::Set(df, norm);
  for (size_t i = 0; i < p; i += lanes) {
    hn::StoreU(hn::Mul(hn::LoadU(df, x + i), factor), df, x + i);
  }
}

void RotateAtRandomImpl(const float* signs, size_t n, float* HWY_RESTRICT x) {
  if (n == 0) return;
  const size_t p = std::bit_floor(n);
  for (size_t round = 0; round < 3; ++round) {
    for (size_t i = 0; i < n; ++i) x[i] *= signs[round * n + i];
    Hadamard(round == 1 ? x + n - p : x, p);
  }
}

size_t ListPossibleImpl(const float* HWY_RESTRICT estimates, const float* HWY_RESTRICT radii,
                        float factor, float threshold, size_t begin, size_t end,
                        uint32_t* HWY_RESTRICT ids) {
  const hn::CappedTag<float, 16> df;
  const hn::RebindToUnsigned<decltype(df)> du;
  const size_t lanes = hn::Lanes(df);
  const auto limit = hn::Set(df, threshold);
  const auto f = hn::Set(df, factor);
  const auto step = hn::Set(du, static_cast<uint32_t>(lanes));
  auto index = hn::Iota(du, static_cast<uint32_t>(begin));
  size_t count = 0;
  size_t i = begin;
  for (; i + lanes <= end; i += lanes) {
    const auto upper = hn::Add(hn::LoadU(df, estimates + i), hn::Mul(f, hn::LoadU(df, radii + i)));
    count += hn::CompressStore(index, hn::RebindMask(du, hn::Ge(upper, limit)), du, ids + count);
    index = hn::Add(index, step);
  }
  for (; i < end; ++i) {
    if (estimates[i] + factor * radii[i] >= threshold) ids[count++] = static_cast<uint32_t>(i);
  }
  return count;
}

}  // namespace HWY_NAMESPACE
}  // namespace firesteel::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace firesteel::kernels {

HWY_EXPORT(QuantizeWeightsI2Impl);
HWY_EXPORT(ScreenMatMulImpl);
HWY_EXPORT(RotateAtRandomImpl);
HWY_EXPORT(ListPossibleImpl);

// No target has vectors (of at most 16 floats) that compaction could overrun by more.
static_assert(kCompactionSlack >= 16);

I2Row QuantizeWeightsI2(const float* w, size_t cols, uint8_t* codes) {
  HWY_DASSERT(cols > 0 && cols <= kMaxQuantizedCols);
  return HWY_DYNAMIC_DISPATCH(QuantizeWeightsI2Impl)(w, cols, codes);
}

void ScreenMatMul(const QuantizedRows& x, const I2View& w, size_t row_begin, size_t row_end,
                  const MatView& y) {
  HWY_DASSERT(x.cols == PaddedI2Cols(w.cols) && x.cols <= x.plane);
  HWY_DASSERT(row_begin <= row_end && row_end <= w.rows && w.rows <= y.cols && x.rows <= y.rows);
  HWY_DYNAMIC_DISPATCH(ScreenMatMulImpl)(x, w, row_begin, row_end, y);
}

void RotateAtRandom(const float* signs, size_t n, float* x) {
  HWY_DYNAMIC_DISPATCH(RotateAtRandomImpl)(signs, n, x);
}

size_t ListPossible(const float* estimates, const float* radii, float factor, float threshold,
                    size_t begin, size_t end, uint32_t* ids) {
  HWY_DASSERT(begin <= end);
  return HWY_DYNAMIC_DISPATCH(ListPossibleImpl)(estimates, radii, factor, threshold, begin, end,
                                                ids);
}

}  // namespace firesteel::kernels
#endif  // HWY_ONCE
