// A weighted sum of rows, shared by the sparse down projection and by attention's values.
//
// Columns are independent and each adds its rows in the given order, so neither the range of
// columns nor the number of rows taken at once changes a bit. Eight rows share one load and one
// store of the sums, and are eight streams that the hardware prefetcher follows.

#if defined(FIRESTEEL_KERNELS_WEIGHTED_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FIRESTEEL_KERNELS_WEIGHTED_ROWS_INL_H_
#undef FIRESTEEL_KERNELS_WEIGHTED_ROWS_INL_H_
#else
#define FIRESTEEL_KERNELS_WEIGHTED_ROWS_INL_H_
#endif

#include <cstddef>

#include "hwy/highway.h"
#include "kernels/dot-inl.h"

HWY_BEFORE_NAMESPACE();
namespace firesteel::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// y[c] += Σ_j coefficients[j] · row(j)[c] for kRows rows.
template <size_t kRows, class DF, class RowFn>
HWY_INLINE void AddRowGroup(DF df, const float* HWY_RESTRICT coefficients, const RowFn& row,
                            size_t first, size_t cols, float* HWY_RESTRICT y) {
  static_assert(kRows == 1 || kRows == 8);
  using V = hn::Vec<DF>;
  const size_t lanes = hn::Lanes(df);
  const float* c = coefficients + first;
  const auto last = [](size_t j) { return kRows == 1 ? 0 : j; };
  const V a0 = hn::Set(df, c[0]), a1 = hn::Set(df, c[last(1)]), a2 = hn::Set(df, c[last(2)]),
          a3 = hn::Set(df, c[last(3)]), a4 = hn::Set(df, c[last(4)]), a5 = hn::Set(df, c[last(5)]),
          a6 = hn::Set(df, c[last(6)]), a7 = hn::Set(df, c[last(7)]);
  const auto *r0 = row(first), *r1 = row(first + last(1)), *r2 = row(first + last(2)),
             *r3 = row(first + last(3)), *r4 = row(first + last(4)), *r5 = row(first + last(5)),
             *r6 = row(first + last(6)), *r7 = row(first + last(7));
  const auto sum = [&](V s, const auto& load) HWY_ATTR {
    s = hn::MulAdd(a0, load(r0), s);
    if constexpr (kRows > 1) {
      s = hn::MulAdd(a1, load(r1), s);
      s = hn::MulAdd(a2, load(r2), s);
      s = hn::MulAdd(a3, load(r3), s);
      s = hn::MulAdd(a4, load(r4), s);
      s = hn::MulAdd(a5, load(r5), s);
      s = hn::MulAdd(a6, load(r6), s);
      s = hn::MulAdd(a7, load(r7), s);
    }
    return s;
  };
  size_t i = 0;
  for (; i + lanes <= cols; i += lanes) {
    const auto load = [&](const auto* r) HWY_ATTR { return LoadF32(df, r + i); };
    hn::StoreU(sum(hn::LoadU(df, y + i), load), df, y + i);
  }
  if (const size_t n = cols - i; n != 0) {
    const auto load = [&](const auto* r) HWY_ATTR { return LoadF32N(df, r + i, n); };
    hn::StoreN(sum(hn::LoadN(df, y + i, n), load), df, y + i, n);
  }
}

// y[c] = Σ_j coefficients[j] · row(j)[c] for c < cols, j < num in rising order; zeros if num = 0.
template <class DF, class RowFn>
HWY_INLINE void WeightedRows(DF df, const float* coefficients, size_t num, const RowFn& row,
                             size_t cols, float* HWY_RESTRICT y) {
  for (size_t i = 0; i < cols; ++i) y[i] = 0.0f;
  size_t j = 0;
  for (; j + 8 <= num; j += 8) AddRowGroup<8>(df, coefficients, row, j, cols, y);
  for (; j < num; ++j) AddRowGroup<1>(df, coefficients, row, j, cols, y);
}

}  // namespace HWY_NAMESPACE
}  // namespace firesteel::kernels
HWY_AFTER_NAMESPACE();

#endif  // FIRESTEEL_KERNELS_WEIGHTED_ROWS_INL_H_
