#include "kernels/sparse_ffn.h"

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

template <typename TW>
void SparseVecMatTyped(const float* coefficients, const uint32_t* active, size_t num_active,
                       const TypedView& w, size_t col_begin, size_t col_end, float* y) {
  WeightedRows(
      hn::ScalableTag<float>(), coefficients, num_active,
      [&](size_t j) { return w.Row<TW>(active[j]) + col_begin; }, col_end - col_begin,
      y + col_begin);
}

void SparseVecMatImpl(const float* coefficients, const uint32_t* active, size_t num_active,
                      const TypedView& w, size_t col_begin, size_t col_end, float* y) {
  if (w.dtype == DType::kBF16) {
    SparseVecMatTyped<BF16>(coefficients, active, num_active, w, col_begin, col_end, y);
  } else {
    SparseVecMatTyped<float>(coefficients, active, num_active, w, col_begin, col_end, y);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace firesteel::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace firesteel::kernels {

HWY_EXPORT(MaskedMatVecImpl);
HWY_EXPORT(SparseVecMatImpl);

void MaskedMatVec(const TypedView& x, const TypedView& w, const uint32_t* active, size_t begin,
                  size_t end, float* out) {
  HWY_DASSERT(x.rows == 1 && x.cols == w.cols && begin <= end);
  HWY_DASSERT(x.dtype == DType::kF32 || w.dtype == DType::kBF16);
  HWY_DYNAMIC_DISPATCH(MaskedMatVecImpl)(x, w, active, begin, end, out);
}

void SparseVecMat(const float* coefficients, const uint32_t* active, size_t num_active,
                  const TypedView& w, size_t col_begin, size_t col_end, float* y) {
  HWY_DASSERT(col_begin <= col_end && col_end <= w.cols);
  HWY_DYNAMIC_DISPATCH(SparseVecMatImpl)(coefficients, active, num_active, w, col_begin, col_end,
                                         y);
}

}  // namespace firesteel::kernels
#endif  // HWY_ONCE
