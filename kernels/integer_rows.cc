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

// The coefficients of four neighbours of a list, a byte each. Behind the last one there are zeros.
HWY_INLINE int32_t FourAt(const QuantizedRows& c, size_t at) {
  int32_t four;
  std::memcpy(&four, c.Low(0) + at, sizeof(four));
  return four;
}

// Adds four rows to the sums of their columns, which have names: vectors of SVE cannot be members.
HWY_INLINE void AddFour(BytesVec r0, BytesVec r1, BytesVec r2, BytesVec r3, int32_t four,
                        SumVec& s0, SumVec& s1, SumVec& s2, SumVec& s3) {
  const SumTag ds;
  const auto c = hn::BitCast(SignedByteTag(), hn::Set(ds, four));
  BytesVec q0, q1, q2, q3;
  Interleave(r0, r1, r2, r3, q0, q1, q2, q3);
  s0 = hn::SumOfMulQuadAccumulate(ds, q0, c, s0);
  s1 = hn::SumOfMulQuadAccumulate(ds, q1, c, s1);
  s2 = hn::SumOfMulQuadAccumulate(ds, q2, c, s2);
  s3 = hn::SumOfMulQuadAccumulate(ds, q3, c, s3);
}

// Adds kGroups × 4 rows to the sums of all columns.
template <size_t kGroups>
HWY_INLINE void AddRows(const uint8_t* const* HWY_RESTRICT rows, int32_t c0,
                        [[maybe_unused]] int32_t c1, size_t cols, RowFetcher& fetcher,
                        int32_t* HWY_RESTRICT sums) {
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
    int32_t* const s = sums + i;
    auto s0 = hn::LoadU(ds, s), s1 = hn::LoadU(ds, s + lanes), s2 = hn::LoadU(ds, s + 2 * lanes),
         s3 = hn::LoadU(ds, s + 3 * lanes);
    AddFour(load(0, i), load(1, i), load(2, i), load(3, i), c0, s0, s1, s2, s3);
    if constexpr (kGroups > 1) {
      AddFour(load(4, i), load(5, i), load(6, i), load(7, i), c1, s0, s1, s2, s3);
    }
    hn::StoreU(s0, ds, s);
    hn::StoreU(s1, ds, s + lanes);
    hn::StoreU(s2, ds, s + 2 * lanes);
    hn::StoreU(s3, ds, s + 3 * lanes);
  }
}

// What sums stand for, without the 128 that was added to every weight.
struct Finish {
  using DF = hn::RebindToFloat<SumTag>;
  explicit Finish(const QuantizedRows& c) : offset(128 * c.low_sums[0]), scale(c.scales[0]) {}
  HWY_INLINE hn::Vec<DF> operator()(SumVec sum) const {
    const DF df;
    const auto exact = hn::ConvertTo(df, hn::Sub(sum, hn::Set(SumTag(), offset)));
    return hn::Mul(exact, hn::Set(df, scale));
  }
  int32_t offset;
  float scale;
};

void SumIntegerRowsImpl(const QuantizedRows& c, const uint32_t* active, const TypedView& w,
                        RowFetcher& fetcher, int32_t* sums, float* y) {
  constexpr size_t kRows = 8;
  const size_t cols = SumCols(w.cols);
  const uint8_t* rows[kRows];
  size_t j = 0;
  for (; j + kRows <= c.cols; j += kRows) {
    for (size_t r = 0; r < kRows; ++r) rows[r] = w.RowBytes(active[j + r]);
    AddRows<2>(rows, FourAt(c, j), FourAt(c, j + 4), cols, fetcher, sums);
  }
  for (; j < c.cols; j += 4) {
    for (size_t r = 0; r < 4; ++r) rows[r] = w.RowBytes(active[std::min(j + r, c.cols - 1)]);
    AddRows<1>(rows, FourAt(c, j), 0, cols, fetcher, sums);
  }
  const SumTag ds;
  const Finish finish(c);
  for (size_t i = 0; i < cols; i += hn::Lanes(ds)) {
    hn::StoreU(finish(hn::LoadU(ds, sums + i)), Finish::DF(), y + i);
    hn::StoreU(hn::Zero(ds), ds, sums + i);
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
  SumVec a0 = hn::Zero(ds), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0;
  const auto add = [&](size_t j, size_t r1, size_t r2, size_t r3) HWY_ATTR {
    const uint8_t* const p0 = column + active[j] * row_bytes;
    const uint8_t* const p1 = column + active[r1] * row_bytes;
    const uint8_t* const p2 = column + active[r2] * row_bytes;
    const uint8_t* const p3 = column + active[r3] * row_bytes;
    const auto load = [&](const uint8_t* p) HWY_ATTR { return hn::Xor(hn::LoadU(du8, p), flip); };
    const int32_t four = FourAt(c, j);
    AddFour(load(p0), load(p1), load(p2), load(p3), four, a0, a1, a2, a3);
    if constexpr (kTwo) {
      AddFour(load(p0 + bytes), load(p1 + bytes), load(p2 + bytes), load(p3 + bytes), four, b0, b1,
              b2, b3);
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
  const auto put = [&](SumVec low, size_t i) HWY_ATTR {
    const auto sum = finish(low);
    hn::StoreU(kAdd ? hn::Add(hn::LoadU(df, y + i), sum) : sum, df, y + i);
  };
  put(a0, 0);
  put(a1, lanes);
  put(a2, 2 * lanes);
  put(a3, 3 * lanes);
  if constexpr (kTwo) {
    put(b0, 4 * lanes);
    put(b1, 5 * lanes);
    put(b2, 6 * lanes);
    put(b3, 7 * lanes);
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
  QuantizeToBytes(coefficients, out, 0);
}

void SpreadCoefficients(const QuantizedRows& c, const uint32_t* active, size_t first,
                        const ByteRows& out, size_t row) {
  int8_t* const all = out.Row(row);
  std::memset(all, 0, out.stride);
  for (size_t j = 0; j < c.cols; ++j) all[active[j] - first] = c.Low(0)[j];
  out.scales[row] = c.scales[0];
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
