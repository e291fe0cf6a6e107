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
#include <type_traits>

#include "hwy/highway.h"
#include "kernels/dot-inl.h"

HWY_BEFORE_NAMESPACE();
namespace firesteel::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

inline constexpr size_t kGroupRows = 8;

// sum + Σ_j a_j · rows[j] at column i. The coefficients have names: vectors of SVE cannot be array
// elements.
template <size_t kRows, class DF, class V, typename TW, class Loader>
HWY_INLINE V AddRows(DF df, const Loader& load, const TW* const* HWY_RESTRICT rows, size_t i, V sum,
                     V a0, V a1, V a2, V a3, V a4, V a5, V a6, V a7) {
  sum = hn::MulAdd(a0, load(df, rows[0] + i), sum);
  if constexpr (kRows > 1) {
    sum = hn::MulAdd(a1, load(df, rows[1] + i), sum);
    sum = hn::MulAdd(a2, load(df, rows[2] + i), sum);
    sum = hn::MulAdd(a3, load(df, rows[3] + i), sum);
  }
  if constexpr (kRows > 4) {
    sum = hn::MulAdd(a4, load(df, rows[4] + i), sum);
    sum = hn::MulAdd(a5, load(df, rows[5] + i), sum);
    sum = hn::MulAdd(a6, load(df, rows[6] + i), sum);
    sum = hn::MulAdd(a7, load(df, rows[7] + i), sum);
  }
  return sum;
}

// y[c] += Σ_j coefficients[j] · rows[j][c] for kRows rows and c < cols; meanwhile fetches the rows
// `ahead`.
template <size_t kRows, class DF, typename TW>
HWY_INLINE void AddRowGroup(DF df, const float* c, const TW* const* HWY_RESTRICT rows,
                            [[maybe_unused]] const TW* const* HWY_RESTRICT ahead, size_t cols,
                            float* HWY_RESTRICT y) {
  static_assert(kRows == 1 || kRows == 4 || kRows == kGroupRows);
  using V = hn::Vec<DF>;
  const size_t lanes = hn::Lanes(df);
  const auto at = [](size_t j) { return j < kRows ? j : 0; };
  const V a0 = hn::Set(df, c[0]), a1 = hn::Set(df, c[at(1)]), a2 = hn::Set(df, c[at(2)]),
          a3 = hn::Set(df, c[at(3)]), a4 = hn::Set(df, c[at(4)]), a5 = hn::Set(df, c[at(5)]),
          a6 = hn::Set(df, c[at(6)]), a7 = hn::Set(df, c[at(7)]);
  using Step = PromotedStep;
  const auto add = [&](size_t i) HWY_ATTR {
    hn::StoreU(AddRows<kRows>(df, LoadWhole<Step>(), rows, i, hn::LoadU(df, y + i), a0, a1, a2, a3,
                              a4, a5, a6, a7),
               df, y + i);
  };
  size_t i = 0;
  if constexpr (kRows > 1) {
    // One line of each row to come for every line of the rows at hand.
    const size_t line = HWY_MAX(lanes, kAlignment / sizeof(TW));
    for (; i + line <= cols; i += line) {
      for (size_t j = 0; j < kRows; ++j) FetchToL2(ahead[j] + i);
      for (size_t v = 0; v < line; v += lanes) add(i + v);
    }
  }
  for (; i + lanes <= cols; i += lanes) add(i);
  if (const size_t n = cols - i; n != 0) {
    hn::StoreN(AddRows<kRows>(df, LoadRagged<Step>{n}, rows, i, hn::LoadN(df, y + i, n), a0, a1, a2,
                              a3, a4, a5, a6, a7),
               df, y + i, n);
  }
}

// y[c] += Σ_j coefficient(j) · row(j)[c] for c < cols, j < num in rising order.
template <class DF, class CoefficientFn, class RowFn>
HWY_INLINE void AddWeightedRows(DF df, const CoefficientFn& coefficient, size_t num,
                                const RowFn& row, size_t cols, float* HWY_RESTRICT y) {
  using TW = std::remove_cv_t<std::remove_pointer_t<decltype(row(0))>>;
  float c[kGroupRows];
  const TW* rows[2][kGroupRows];  // this group's and the next one's, in turn
  const auto take = [&](const TW** group, size_t first) {
    for (size_t r = 0; r < kGroupRows; ++r) group[r] = row(first + r);
  };
  size_t j = 0;
  if (num >= kGroupRows) take(rows[0], 0);
  for (; j + kGroupRows <= num; j += kGroupRows) {
    const size_t at = j / kGroupRows % 2;
    const bool more = j + 2 * kGroupRows <= num;
    if (more) take(rows[1 - at], j + kGroupRows);
    for (size_t r = 0; r < kGroupRows; ++r) c[r] = coefficient(j + r);
    AddRowGroup<kGroupRows>(df, c, rows[at], rows[more ? 1 - at : at], cols, y);
  }
  if (j + 4 <= num) {
    for (size_t r = 0; r < 4; ++r) {
      rows[0][r] = row(j + r);
      c[r] = coefficient(j + r);
    }
    AddRowGroup<4>(df, c, rows[0], rows[0], cols, y);
    j += 4;
  }
  for (; j < num; ++j) {
    const TW* last = row(j);
    c[0] = coefficient(j);
    AddRowGroup<1>(df, c, &last, &last, cols, y);
  }
}

// y[c] = Σ_j coefficients[j] · row(j)[c] for c < cols, j < num in rising order; zeros if num = 0.
template <class DF, class RowFn>
HWY_INLINE void WeightedRows(DF df, const float* coefficients, size_t num, const RowFn& row,
                             size_t cols, float* HWY_RESTRICT y) {
  for (size_t i = 0; i < cols; ++i) y[i] = 0.0f;
  AddWeightedRows(df, [&](size_t j) { return coefficients[j]; }, num, row, cols, y);
}

}  // namespace HWY_NAMESPACE
}  // namespace firesteel::kernels
HWY_AFTER_NAMESPACE();

#endif  // FIRESTEEL_KERNELS_WEIGHTED_ROWS_INL_H_
