#include "kernels/integer_rows.h"

#include <algorithm>
#include <cstring>

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/integer_rows.cc"
#include "hwy/foreach_target.h"
// The rest is compiled once per target, so it has to follow foreach_target.h.
#include "hwy/highway.h"
#include "kernels/dot-inl.h"
#include "kernels/integer_sums-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace firesteel::kernels {
namespace HWY_NAMESPACE {

using PairTag = hn::Repartition<uint16_t, ByteTag>;
using BytesVec = hn::Vec<ByteTag>;

// Four rows' bytes of the same columns → vectors whose four neighbouring bytes belong to one
// column. Within each 128-bit block of 16 columns: columns 0 to 3 to q0, 4 to 7 to q1 and so on.
// This makes the order of columns of the sums.
HWY_INLINE void Interleave(BytesVec r0, BytesVec r1, BytesVec r2, BytesVec r3, BytesVec& q0,
                           BytesVec& q1, BytesVec& q2, BytesVec& q3) {
  const ByteTag du8;
  const PairTag du16;
  const auto low01 = hn::BitCast(du16, hn::InterleaveLower(du8, r0, r1));
  const auto high01 = hn::BitCast(du16, hn::InterleaveUpper(du8, r0, r1));
  const auto low23 = hn::BitCast(du16, hn::InterleaveLower(du8, r2, r3));
  const auto high23 = hn::BitCast(du16, hn::InterleaveUpper(du8, r2, r3));
  q0 = hn::BitCast(du8, hn::InterleaveLower(du16, low01, low23));
  q1 = hn::BitCast(du8, hn::InterleaveUpper(du16, low01, low23));
  q2 = hn::BitCast(du8, hn::InterleaveLower(du16, high01, high23));
  q3 = hn::BitCast(du8, hn::InterleaveUpper(du16, high01, high23));
}

// The coefficients of four neighbours of a list, a byte each.
struct FourCoefficients {
  int32_t high;
  int32_t low;
};

// Those from `at` on; behind the last one there are zeros.
HWY_INLINE FourCoefficients CoefficientsAt(const QuantizedRows& c, size_t at) {
  FourCoefficients four;
  std::memcpy(&four.high, c.High(0) + at, sizeof(four.high));
  std::memcpy(&four.low, c.Low(0) + at, sizeof(four.low));
  return four;
}

// Adds four rows to the sums of their columns, which have names: vectors of SVE cannot be members.
HWY_INLINE void AddFour(BytesVec r0, BytesVec r1, BytesVec r2, BytesVec r3,
                        const FourCoefficients& c, SumVec& h0, SumVec& h1, SumVec& h2, SumVec& h3,
                        SumVec& l0, SumVec& l1, SumVec& l2, SumVec& l3) {
  const SumTag ds;
  const SignedByteTag di8;
  const auto high = hn::BitCast(di8, hn::Set(ds, c.high));
  const auto low = hn::BitCast(di8, hn::Set(ds, c.low));
  BytesVec q0, q1, q2, q3;
  Interleave(r0, r1, r2, r3, q0, q1, q2, q3);
  h0 = hn::SumOfMulQuadAccumulate(ds, q0, high, h0);
  h1 = hn::SumOfMulQuadAccumulate(ds, q1, high, h1);
  h2 = hn::SumOfMulQuadAccumulate(ds, q2, high, h2);
  h3 = hn::SumOfMulQuadAccumulate(ds, q3, high, h3);
  l0 = hn::SumOfMulQuadAccumulate(ds, q0, low, l0);
  l1 = hn::SumOfMulQuadAccumulate(ds, q1, low, l1);
  l2 = hn::SumOfMulQuadAccumulate(ds, q2, low, l2);
  l3 = hn::SumOfMulQuadAccumulate(ds, q3, low, l3);
}

// Adds kGroups × 4 rows to the sums of all columns.
template <size_t kGroups>
HWY_INLINE void AddRows(const uint8_t* const* HWY_RESTRICT rows, const FourCoefficients& c0,
                        [[maybe_unused]] const FourCoefficients& c1, size_t cols,
                        RowFetcher& fetcher, int32_t* HWY_RESTRICT high,
                        int32_t* HWY_RESTRICT low) {
  static_assert(kGroups == 1 || kGroups == 2);
  const SumTag ds;
  const ByteTag du8;
  const size_t bytes = hn::Lanes(du8);
  const size_t lanes = hn::Lanes(ds);
  const auto flip = hn::Set(du8, 0x80);  // the CPU multiplies unsigned by signed bytes
  const auto load = [&](size_t row, size_t i)
                        HWY_ATTR { return hn::Xor(hn::LoadU(du8, rows[row] + i), flip); };
  for (size_t i = 0; i < cols; i += bytes) {
    if (i % kAlignment == 0) {
      for (size_t group = 0; group < kGroups; ++group) fetcher.Next();
    }
    int32_t* const h = high + i;
    int32_t* const l = low + i;
    auto h0 = hn::LoadU(ds, h), h1 = hn::LoadU(ds, h + lanes), h2 = hn::LoadU(ds, h + 2 * lanes),
         h3 = hn::LoadU(ds, h + 3 * lanes);
    auto l0 = hn::LoadU(ds, l), l1 = hn::LoadU(ds, l + lanes), l2 = hn::LoadU(ds, l + 2 * lanes),
         l3 = hn::LoadU(ds, l + 3 * lanes);
    AddFour(load(0, i), load(1, i), load(2, i), load(3, i), c0, h0, h1, h2, h3, l0, l1, l2, l3);
    if constexpr (kGroups > 1) {
      AddFour(load(4, i), load(5, i), load(6, i), load(7, i), c1, h0, h1, h2, h3, l0, l1, l2, l3);
    }
    hn::StoreU(h0, ds, h);
    hn::StoreU(h1, ds, h + lanes);
    hn::StoreU(h2, ds, h + 2 * lanes);
    hn::StoreU(h3, ds, h + 3 * lanes);
    hn::StoreU(l0, ds, l);
    hn::StoreU(l1, ds, l + lanes);
    hn::StoreU(l2, ds, l + 2 * lanes);
    hn::StoreU(l3, ds, l + 3 * lanes);
  }
}

// What sums stand for: (256 · high + low) · scale, without the 128 that was added to every weight.
struct Finish {
  using DF = hn::RebindToFloat<SumTag>;
  explicit Finish(const QuantizedRows& c)
      : high_offset(128 * c.high_sums[0]), low_offset(128 * c.low_sums[0]), scale(c.scales[0]) {}
  HWY_INLINE hn::Vec<DF> operator()(SumVec high, SumVec low) const {
    const SumTag ds;
    const DF df;
    const auto h = hn::ConvertTo(df, hn::Sub(high, hn::Set(ds, high_offset)));
    const auto l = hn::ConvertTo(df, hn::Sub(low, hn::Set(ds, low_offset)));
    return hn::Mul(hn::MulAdd(h, hn::Set(df, 256.0f), l), hn::Set(df, scale));
  }
  int32_t high_offset, low_offset;
  float scale;
};

void SumIntegerRowsImpl(const QuantizedRows& c, const uint32_t* active, const TypedView& w,
                        RowFetcher& fetcher, int32_t* sums, float* y) {
  constexpr size_t kRows = 8;
  const size_t cols = SumCols(w.cols);
  int32_t* const high = sums;
  int32_t* const low = sums + cols;
  const uint8_t* rows[kRows];
  size_t j = 0;
  for (; j + kRows <= c.cols; j += kRows) {
    for (size_t r = 0; r < kRows; ++r) rows[r] = w.RowBytes(active[j + r]);
    AddRows<2>(rows, CoefficientsAt(c, j), CoefficientsAt(c, j + 4), cols, fetcher, high, low);
  }
  for (; j < c.cols; j += 4) {
    for (size_t r = 0; r < 4; ++r) rows[r] = w.RowBytes(active[std::min(j + r, c.cols - 1)]);
    const FourCoefficients c0 = CoefficientsAt(c, j);
    AddRows<1>(rows, c0, c0, cols, fetcher, high, low);
  }
  const SumTag ds;
  const Finish finish(c);
  for (size_t i = 0; i < cols; i += hn::Lanes(ds)) {
    hn::StoreU(finish(hn::LoadU(ds, high + i), hn::LoadU(ds, low + i)), Finish::DF(), y + i);
    hn::StoreU(hn::Zero(ds), ds, high + i);
    hn::StoreU(hn::Zero(ds), ds, low + i);
  }
}

// The columns of one vector of bytes, or of two neighbouring ones, for all listed rows: two share
// the work of finding a row.
template <bool kAdd, bool kTwo>
HWY_INLINE void SumBlock(bool begins_line, const QuantizedRows& c,
                         const uint32_t* HWY_RESTRICT active, const uint8_t* HWY_RESTRICT column,
                         size_t row_bytes, const Finish& finish, RowFetcher& fetcher,
                         float* HWY_RESTRICT y) {
  const SumTag ds;
  const ByteTag du8;
  const Finish::DF df;
  const size_t lanes = hn::Lanes(ds), bytes = hn::Lanes(du8);
  const auto flip = hn::Set(du8, 0x80);
  SumVec h0 = hn::Zero(ds), h1 = h0, h2 = h0, h3 = h0, l0 = h0, l1 = h0, l2 = h0, l3 = h0;
  SumVec g0 = h0, g1 = h0, g2 = h0, g3 = h0, m0 = h0, m1 = h0, m2 = h0, m3 = h0;
  const auto add = [&](size_t j, size_t r1, size_t r2, size_t r3) HWY_ATTR {
    const uint8_t* const p0 = column + active[j] * row_bytes;
    const uint8_t* const p1 = column + active[r1] * row_bytes;
    const uint8_t* const p2 = column + active[r2] * row_bytes;
    const uint8_t* const p3 = column + active[r3] * row_bytes;
    const auto load = [&](const uint8_t* p) HWY_ATTR { return hn::Xor(hn::LoadU(du8, p), flip); };
    const FourCoefficients four = CoefficientsAt(c, j);
    AddFour(load(p0), load(p1), load(p2), load(p3), four, h0, h1, h2, h3, l0, l1, l2, l3);
    if constexpr (kTwo) {
      AddFour(load(p0 + bytes), load(p1 + bytes), load(p2 + bytes), load(p3 + bytes), four, g0, g1,
              g2, g3, m0, m1, m2, m3);
    }
  };
  constexpr size_t kLines = kTwo ? 2 : 1;
  const size_t whole = c.cols / 4 * 4;
  size_t j = 0;
  while (j < whole) {
    const size_t left = (whole - j) / 4;
    const RowFetcher::Lines lines = fetcher.Take(begins_line ? kLines * left : 0);
    if (lines.count == 0) {
      for (; j < whole; j += 4) add(j, j + 1, j + 2, j + 3);
      break;
    }
    for (size_t i = 0; i < lines.count; i += kLines, j += 4) {
      for (size_t line = i; line < i + kLines; ++line) lines.Fetch(line);
      add(j, j + 1, j + 2, j + 3);
    }
  }
  // The coefficients beyond the last are zero.
  const size_t last = c.cols - 1;
  if (j < c.cols) add(j, HWY_MIN(j + 1, last), HWY_MIN(j + 2, last), last);
  const auto put = [&](SumVec high, SumVec low, float* out) HWY_ATTR {
    const auto sum = finish(high, low);
    hn::StoreU(kAdd ? hn::Add(hn::LoadU(df, out), sum) : sum, df, out);
  };
  put(h0, l0, y);
  put(h1, l1, y + lanes);
  put(h2, l2, y + 2 * lanes);
  put(h3, l3, y + 3 * lanes);
  if constexpr (kTwo) {
    put(g0, m0, y + 4 * lanes);
    put(g1, m1, y + 5 * lanes);
    put(g2, m2, y + 6 * lanes);
    put(g3, m3, y + 7 * lanes);
  }
}

template <bool kAdd>
void SumBlocks(const QuantizedRows& c, const uint32_t* active, const TypedView& w, size_t col_begin,
               size_t col_end, RowFetcher& fetcher, float* y) {
  constexpr bool kPairs = HWY_MAX_LANES_D(SumTag) >= 16;  // else there are registers for one
  const Finish finish(c);
  const size_t bytes = hn::Lanes(ByteTag());
  size_t i = col_begin;
  for (; kPairs && i + 2 * bytes <= col_end; i += 2 * bytes) {
    SumBlock<kAdd, kPairs>(true, c, active, w.RowBytes(0) + i, w.stride, finish, fetcher, y + i);
  }
  for (; i < col_end; i += bytes) {
    SumBlock<kAdd, false>(i % kAlignment == 0, c, active, w.RowBytes(0) + i, w.stride, finish,
                          fetcher, y + i);
  }
}

void SumIntegerColumnsImpl(const QuantizedRows& c, const uint32_t* active, const TypedView& w,
                           size_t col_begin, size_t col_end, bool add, RowFetcher& fetcher,
                           float* y) {
  const auto sum = add ? SumBlocks<true> : SumBlocks<false>;
  sum(c, active, w, col_begin, col_end, fetcher, y);
}

void ToColumnOrderImpl(size_t cols, float* y) {
  const hn::FixedTag<float, 4> d4;
  const size_t lanes = hn::Lanes(SumTag());
  HWY_ALIGN float block[4 * hn::MaxLanes(SumTag())];
  // A vector of bytes covers 4 · lanes columns; its 128-bit blocks 16 each, 4 in each of q0 to q3.
  for (size_t first = 0; first < SumCols(cols); first += 4 * lanes) {
    std::memcpy(block, y + first, 4 * lanes * sizeof(float));
    for (size_t b = 0; b < lanes / 4; ++b) {
      for (size_t q = 0; q < 4; ++q) {
        hn::StoreU(hn::LoadU(d4, block + q * lanes + 4 * b), d4, y + first + 16 * b + 4 * q);
      }
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace firesteel::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace firesteel::kernels {

HWY_EXPORT(SumIntegerRowsImpl);
HWY_EXPORT(SumIntegerColumnsImpl);
HWY_EXPORT(ToColumnOrderImpl);

void QuantizeCoefficients(float* coefficients, const uint32_t* active, const TypedView& w,
                          const QuantizedRows& out) {
  HWY_DASSERT(w.dtype == DType::kI8 && out.rows == 1 && out.cols <= kMaxCoefficients);
  for (size_t j = 0; j < out.cols; ++j) coefficients[j] *= w.row_scales[active[j]];
  QuantizeActivations(coefficients, out, 0);
}

void SumIntegerRows(const QuantizedRows& c, const uint32_t* active, const TypedView& w,
                    RowFetcher& fetcher, int32_t* sums, float* y) {
  HWY_DASSERT(w.dtype == DType::kI8 && SumCols(w.cols) <= w.stride);
  HWY_DYNAMIC_DISPATCH(SumIntegerRowsImpl)(c, active, w, fetcher, sums, y);
}

void SumIntegerColumns(const QuantizedRows& c, const uint32_t* active, const TypedView& w,
                       size_t col_begin, size_t col_end, bool add, RowFetcher& fetcher, float* y) {
  HWY_DASSERT(w.dtype == DType::kI8 && col_end <= SumCols(w.cols) && col_end <= w.stride);
  HWY_DASSERT(col_begin % kAlignment == 0 && col_end % kAlignment == 0);
  HWY_DYNAMIC_DISPATCH(SumIntegerColumnsImpl)(c, active, w, col_begin, col_end, add, fetcher, y);
}

void ToColumnOrder(size_t cols, float* y) { HWY_DYNAMIC_DISPATCH(ToColumnOrderImpl)(cols, y); }

}  // namespace firesteel::kernels
#endif  // HWY_ONCE
