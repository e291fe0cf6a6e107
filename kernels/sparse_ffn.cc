#include "kernels/sparse_ffn.h"

#include <algorithm>
#include <cstring>

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/sparse_ffn.cc"
#include "hwy/foreach_target.h"
// The rest is compiled once per target, so it has to follow foreach_target.h.
#include "hwy/highway.h"
#include "kernels/dot-inl.h"
#include "kernels/weighted_rows-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace firesteel::kernels {
namespace HWY_NAMESPACE {

template <class Step, typename TX, typename TW>
void MaskedMatVecTyped(const TypedView& x, const TypedView& w, const uint32_t* active, size_t begin,
                       size_t end, float* out) {
  DotRows<Step>(
      x.Row<TX>(0), x.cols, end - begin, [&](size_t j) { return w.Row<TW>(active[begin + j]); },
      out + begin);
}

void MaskedMatVecImpl(const TypedView& x, const TypedView& w, const uint32_t* active, size_t begin,
                      size_t end, float* out) {
  if (x.dtype == DType::kBF16) {
    MaskedMatVecTyped<BF16Step, BF16, BF16>(x, w, active, begin, end, out);
  } else if (w.dtype == DType::kBF16) {
    MaskedMatVecTyped<PromotedStep, float, BF16>(x, w, active, begin, end, out);
  } else {
    MaskedMatVecTyped<PromotedStep, float, float>(x, w, active, begin, end, out);
  }
}

template <typename TW, class CoefficientFn>
void AddRowsTyped(const CoefficientFn& coefficient, const uint32_t* active, size_t num_active,
                  const TypedView& w, float* y) {
  AddWeightedRows(
      hn::ScalableTag<float>(), coefficient, num_active,
      [&](size_t j) { return w.Row<TW>(active[j]); }, w.cols, y);
}

// One group of columns of a 4-bit row times c: to y[0 … kI4Group / 2) from the lower halves of the
// bytes, to the rest from the upper ones.
HWY_INLINE void AddNibbleGroup(float c, const uint8_t* HWY_RESTRICT bytes, const BF16* scales,
                               float* HWY_RESTRICT y) {
  const hn::CappedTag<float, 16> df;
  const hn::RebindToSigned<decltype(df)> di;
  const hn::Rebind<uint8_t, decltype(df)> du8;
  constexpr size_t kHalf = kI4Group / 2;
  const size_t lanes = hn::Lanes(df);
  const auto c0 = hn::Set(df, c * ToF32(scales[0]));
  const auto c1 = hn::Set(df, c * ToF32(scales[1]));
  const auto eight = hn::Set(di, 8);
  for (size_t i = 0; i < kHalf; i += lanes) {
    const auto pairs = hn::PromoteTo(di, hn::LoadU(du8, bytes + i));
    const auto lower = hn::ConvertTo(df, hn::Sub(hn::And(pairs, hn::Set(di, 15)), eight));
    const auto upper = hn::ConvertTo(df, hn::Sub(hn::ShiftRight<4>(pairs), eight));
    hn::StoreU(hn::MulAdd(c0, lower, hn::LoadU(df, y + i)), df, y + i);
    hn::StoreU(hn::MulAdd(c1, upper, hn::LoadU(df, y + kHalf + i)), df, y + kHalf + i);
  }
}

void AddNibbleRows(const float* coefficients, const uint32_t* active, size_t num_active,
                   const TypedView& w, float* y) {
  // Far enough ahead to cover the latency of memory; a row is a few lines.
  constexpr size_t kAhead = 8;
  const size_t row_bytes = BytesOf(DType::kI4, hwy::RoundUpTo(w.cols, kI4Group));
  HWY_ALIGN float ragged[kI4Group];
  for (size_t j = 0; j < num_active; ++j) {
    const uint8_t* const row = w.RowBytes(active[j]);
    const BF16* const scales = w.BlockScales(active[j]);
    if (j + kAhead < num_active) {
      const uint8_t* const next = w.RowBytes(active[j + kAhead]);
      for (size_t i = 0; i < row_bytes; i += kAlignment) hwy::Prefetch(next + i);
    }
    for (size_t first = 0; first < w.cols; first += kI4Group) {
      const uint8_t* const bytes = row + first / 2;
      const BF16* const pair = scales + first / kI4Block;
      if (const size_t n = w.cols - first; n >= kI4Group) {
        AddNibbleGroup(coefficients[j], bytes, pair, y + first);
      } else {
        std::memcpy(ragged, y + first, n * sizeof(float));
        AddNibbleGroup(coefficients[j], bytes, pair, ragged);
        std::memcpy(y + first, ragged, n * sizeof(float));
      }
    }
  }
}

void AddSparseVecMatImpl(const float* coefficients, const uint32_t* active, size_t num_active,
                         const TypedView& w, float* y) {
  const auto plain = [&](size_t j) { return coefficients[j]; };
  const auto scaled = [&](size_t j) { return coefficients[j] * w.row_scales[active[j]]; };
  switch (w.dtype) {
    case DType::kF32:
      return AddRowsTyped<float>(plain, active, num_active, w, y);
    case DType::kBF16:
      return AddRowsTyped<BF16>(plain, active, num_active, w, y);
    case DType::kI8:
      return AddRowsTyped<int8_t>(scaled, active, num_active, w, y);
    case DType::kI4:
      return AddNibbleRows(coefficients, active, num_active, w, y);
  }
}

// Neighbouring columns as two vectors: of bf16, the even and the odd ones, which takes half the
// work of promoting either half of a vector by itself.
struct TwoVectors {
  using DF = hn::ScalableTag<float>;
  using V = hn::Vec<DF>;

  static HWY_INLINE void Load(const BF16* p, V& a, V& b) {
    const hn::Repartition<hwy::bfloat16_t, DF> dbf;
    const auto both = hn::LoadU(dbf, reinterpret_cast<const hwy::bfloat16_t*>(p));
    a = hn::PromoteEvenTo(DF(), both);
    b = hn::PromoteOddTo(DF(), both);
  }
  static HWY_INLINE void Load(const float* p, V& a, V& b) {
    a = hn::LoadU(DF(), p);
    b = hn::LoadU(DF(), p + hn::Lanes(DF()));
  }

  // y = or += the sums of columns of TW.
  template <typename TW>
  static HWY_INLINE void Store(V a, V b, bool add, float* y) {
    const DF df;
    constexpr bool kInterleaved = sizeof(TW) == sizeof(BF16);
    if (add) {
      V y0, y1;
      if constexpr (kInterleaved) {
        hn::LoadInterleaved2(df, y, y0, y1);
      } else {
        Load(y, y0, y1);
      }
      a = hn::Add(y0, a);
      b = hn::Add(y1, b);
    }
    if constexpr (kInterleaved) {
      hn::StoreInterleaved2(a, b, df, y);
    } else {
      hn::StoreU(a, df, y);
      hn::StoreU(b, df, y + hn::Lanes(df));
    }
  }
};

// 2 · kPairs vectors of columns of all listed rows.
template <size_t kPairs, typename TW>
HWY_INLINE void SumColumnBlock(const float* HWY_RESTRICT coefficients,
                               const uint32_t* HWY_RESTRICT active, size_t num_active,
                               const TW* HWY_RESTRICT column, size_t stride, bool add,
                               float* HWY_RESTRICT y) {
  static_assert(kPairs == 1 || kPairs == 4);
  const TwoVectors::DF df;
  using V = TwoVectors::V;
  const size_t two = 2 * hn::Lanes(df);
  V a0 = hn::Zero(df), b0 = a0, a1 = a0, b1 = a0, a2 = a0, b2 = a0, a3 = a0, b3 = a0;
  const auto add_row = [&](size_t j) HWY_ATTR {
    const TW* const row = column + active[j] * stride;
    const V c = hn::Set(df, coefficients[j]);
    const auto add_two = [&](const TW* p, V& a, V& b) HWY_ATTR {
      V wa, wb;
      TwoVectors::Load(p, wa, wb);
      a = hn::MulAdd(c, wa, a);
      b = hn::MulAdd(c, wb, b);
    };
    add_two(row, a0, b0);
    if constexpr (kPairs > 1) {
      add_two(row + two, a1, b1);
      add_two(row + 2 * two, a2, b2);
      add_two(row + 3 * two, a3, b3);
    }
  };
  // Far enough ahead for those who need a row first, whom it comes to from memory; the others'
  // loads from L2 do not get slower.
  constexpr size_t kAhead = 8;
  size_t j = 0;
  for (; j + kAhead < num_active; ++j) {
    const TW* const ahead = column + active[j + kAhead] * stride;
    for (size_t i = 0; i < kPairs; ++i) hwy::Prefetch(ahead + i * two);
    add_row(j);
  }
  for (; j < num_active; ++j) add_row(j);
  TwoVectors::Store<TW>(a0, b0, add, y);
  if constexpr (kPairs > 1) {
    TwoVectors::Store<TW>(a1, b1, add, y + two);
    TwoVectors::Store<TW>(a2, b2, add, y + 2 * two);
    TwoVectors::Store<TW>(a3, b3, add, y + 3 * two);
  }
}

// Up to kI4Group columns from `first` on, of any type.
void SumFewColumns(const float* coefficients, const uint32_t* active, size_t num_active,
                   const TypedView& w, size_t first, bool add, float* y) {
  TypedView part = w;
  part.data = w.RowBytes(0) + BytesOf(w.dtype, first);
  part.cols = HWY_MIN(kI4Group, w.cols - first);
  if (w.block_scales != nullptr) part.block_scales = w.block_scales + first / kI4Block;
  HWY_ALIGN float sums[kI4Group] = {};
  AddSparseVecMatImpl(coefficients, active, num_active, part, sums);
  for (size_t i = 0; i < part.cols; ++i) y[first + i] = add ? y[first + i] + sums[i] : sums[i];
}

template <typename TW>
void SumColumns(const float* coefficients, const uint32_t* active, size_t num_active,
                const TypedView& w, bool add, float* y) {
  const size_t two = 2 * hn::Lanes(TwoVectors::DF());
  size_t i = 0;
  for (; i + 4 * two <= w.cols; i += 4 * two) {
    SumColumnBlock<4>(coefficients, active, num_active, w.Row<TW>(0) + i, w.stride, add, y + i);
  }
  for (; i + two <= w.cols; i += two) {
    SumColumnBlock<1>(coefficients, active, num_active, w.Row<TW>(0) + i, w.stride, add, y + i);
  }
  if (i < w.cols) SumFewColumns(coefficients, active, num_active, w, i, add, y);
}

void SumSparseColumnsImpl(const float* coefficients, const uint32_t* active, size_t num_active,
                          const TypedView& w, bool add, float* y) {
  switch (w.dtype) {
    case DType::kF32:
      return SumColumns<float>(coefficients, active, num_active, w, add, y);
    case DType::kBF16:
      return SumColumns<BF16>(coefficients, active, num_active, w, add, y);
    case DType::kI8:
    case DType::kI4:
      for (size_t i = 0; i < w.cols; i += kI4Group) {
        SumFewColumns(coefficients, active, num_active, w, i, add, y);
      }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace firesteel::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace firesteel::kernels {

HWY_EXPORT(MaskedMatVecImpl);
HWY_EXPORT(AddSparseVecMatImpl);
HWY_EXPORT(SumSparseColumnsImpl);

void MaskedMatVec(const TypedView& x, const TypedView& w, const uint32_t* active, size_t begin,
                  size_t end, float* out) {
  HWY_DASSERT(x.rows == 1 && x.cols == w.cols && begin <= end);
  HWY_DASSERT(x.dtype == DType::kF32 || w.dtype == DType::kBF16);
  HWY_DYNAMIC_DISPATCH(MaskedMatVecImpl)(x, w, active, begin, end, out);
}

void FetchFirstRows(const TypedView& w, const uint32_t* active, size_t num_active) {
  const size_t row_bytes = BytesOf(w.dtype, w.stride);
  for (size_t j = 0; j < std::min<size_t>(8, num_active); ++j) {
    const uint8_t* const row = w.RowBytes(active[j]);
    for (size_t i = 0; i < row_bytes; i += kAlignment) hwy::Prefetch(row + i);
  }
}

void AddSparseVecMat(const float* coefficients, const uint32_t* active, size_t num_active,
                     const TypedView& w, float* y) {
  HWY_DYNAMIC_DISPATCH(AddSparseVecMatImpl)(coefficients, active, num_active, w, y);
}

void SumSparseColumns(const float* coefficients, const uint32_t* active, size_t num_active,
                      const TypedView& w, bool add, float* y) {
  HWY_DYNAMIC_DISPATCH(SumSparseColumnsImpl)(coefficients, active, num_active, w, add, y);
}

void SpreadCoefficients(const float* coefficients, const uint32_t* active, size_t num, size_t first,
                        BF16* row, size_t count) {
  std::memset(row, 0, count * sizeof(BF16));
  for (size_t j = 0; j < num; ++j) row[active[j] - first] = ToBF16(coefficients[j]);
}

}  // namespace firesteel::kernels
#endif  // HWY_ONCE
