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
  const size_t row_bytes = BytesOf(DType::kI4, w.stride);
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

}  // namespace HWY_NAMESPACE
}  // namespace firesteel::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace firesteel::kernels {

HWY_EXPORT(MaskedMatVecImpl);
HWY_EXPORT(AddSparseVecMatImpl);

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

}  // namespace firesteel::kernels
#endif  // HWY_ONCE
