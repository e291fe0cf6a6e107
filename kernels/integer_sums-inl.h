// Sums of products of bytes, shared by the kernels whose weights are integers.

// Included once per target, hence the toggle instead of a plain guard.
#if defined(FIRESTEEL_KERNELS_INTEGER_SUMS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FIRESTEEL_KERNELS_INTEGER_SUMS_INL_H_
#undef FIRESTEEL_KERNELS_INTEGER_SUMS_INL_H_
#else
#define FIRESTEEL_KERNELS_INTEGER_SUMS_INL_H_
#endif

#include <cstddef>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/dot-inl.h"

HWY_BEFORE_NAMESPACE();
namespace firesteel::kernels {
namespace HWY_NAMESPACE {

// Lanes of sums; each adds up the products of four neighbouring bytes.
using SumTag = hn::CappedTag<int32_t, 16>;
using ByteTag = hn::Repartition<uint8_t, SumTag>;
using SignedByteTag = hn::Repartition<int8_t, SumTag>;
using SumVec = hn::Vec<SumTag>;

// The sum of each of four vectors of sums, in four lanes. Integers: the order does not matter.
#if HWY_HAVE_SCALABLE
HWY_INLINE hn::Vec<hn::FixedTag<int32_t, 4>> SumsOfFour(SumVec a, SumVec b, SumVec c, SumVec d) {
  const SumTag ds;
  HWY_ALIGN int32_t sums[4] = {hn::ReduceSum(ds, a), hn::ReduceSum(ds, b), hn::ReduceSum(ds, c),
                               hn::ReduceSum(ds, d)};
  return hn::Load(hn::FixedTag<int32_t, 4>(), sums);
}
#else
HWY_INLINE hn::Vec<hn::FixedTag<int32_t, 4>> SumsOfFour(SumVec a, SumVec b, SumVec c, SumVec d) {
  const SumTag ds;
  const hn::Repartition<int64_t, SumTag> d64;
  const SumVec ab = hn::Add(hn::InterleaveLower(ds, a, b), hn::InterleaveUpper(ds, a, b));
  const SumVec cd = hn::Add(hn::InterleaveLower(ds, c, d), hn::InterleaveUpper(ds, c, d));
  const auto ab2 = hn::BitCast(d64, ab);
  const auto cd2 = hn::BitCast(d64, cd);
  const SumVec abcd = hn::Add(hn::BitCast(ds, hn::InterleaveLower(d64, ab2, cd2)),
                              hn::BitCast(ds, hn::InterleaveUpper(d64, ab2, cd2)));
  return FoldTo128(ds, abcd);
}
#endif

// Up to four rows of a tile: their bytes, and those of the rows to fetch meanwhile.
struct TileRows {
  const uint8_t* HWY_RESTRICT r0;
  const uint8_t* HWY_RESTRICT r1;
  const uint8_t* HWY_RESTRICT r2;
  const uint8_t* HWY_RESTRICT r3;

  // row(j) for j in [first, first + count), the last one again for those beyond.
  template <class RowFn>
  static HWY_INLINE TileRows Of(const RowFn& row, size_t first, size_t count) {
    return {row(first), row(first + (count > 1 ? 1 : 0)), row(first + (count > 2 ? 2 : count - 1)),
            row(first + (count > 3 ? 3 : count - 1))};
  }

  HWY_INLINE TileRows Further(size_t bytes) const {
    return {r0 + bytes, r1 + bytes, r2 + bytes, r3 + bytes};
  }

  // Asks for a line of each, which need not be there to be read.
  HWY_INLINE void Fetch(size_t at) const {
    FetchToL2(r0 + at);
    FetchToL2(r1 + at);
    FetchToL2(r2 + at);
    FetchToL2(r3 + at);
  }
};

// What a tile does for those to come, called at each vector of its rows.
struct FetchNothing {
  HWY_INLINE void operator()(size_t /*byte*/) const {}
};
struct FetchFurther {  // in the same streams
  explicit FetchFurther(const TileRows& rows) : ahead(rows.Further(kStreamAhead)) {}
  HWY_INLINE void operator()(size_t byte) const { ahead.Fetch(byte); }
  TileRows ahead;
};

// a, b, c, d as rows of a 4 × 4 matrix: to its columns.
HWY_INLINE void Transpose(Four& a, Four& b, Four& c, Four& d) {
  const FourTag df;
  const hn::Repartition<double, FourTag> dd;
  const auto ab_lower = hn::BitCast(dd, hn::InterleaveLower(df, a, b));
  const auto ab_upper = hn::BitCast(dd, hn::InterleaveUpper(df, a, b));
  const auto cd_lower = hn::BitCast(dd, hn::InterleaveLower(df, c, d));
  const auto cd_upper = hn::BitCast(dd, hn::InterleaveUpper(df, c, d));
  a = hn::BitCast(df, hn::InterleaveLower(dd, ab_lower, cd_lower));
  b = hn::BitCast(df, hn::InterleaveUpper(dd, ab_lower, cd_lower));
  c = hn::BitCast(df, hn::InterleaveLower(dd, ab_upper, cd_upper));
  d = hn::BitCast(df, hn::InterleaveUpper(dd, ab_upper, cd_upper));
}

// A range of rows as four streams, one from each quarter. sum_of(row, quarter) gives the sums of
// the rows row, row + quarter, …; store(row, sums) takes those of four neighbours. Sixteen rows at
// a time, inlined: a call and an epilogue a tile take as long as half of its products. Returns how
// many rows it took; what is left has less than four of each quarter.
template <class SumFn, class StoreFn>
HWY_INLINE size_t Stream(size_t row_begin, size_t row_end, const SumFn& sum_of,
                         const StoreFn& store) {
  const size_t quarter = (row_end - row_begin) / 16 * 4;
  for (size_t row = row_begin; row < row_begin + quarter; row += 4) {
    Four a = sum_of(row, quarter), b = sum_of(row + 1, quarter), c = sum_of(row + 2, quarter),
         d = sum_of(row + 3, quarter);
    Transpose(a, b, c, d);
    store(row, a);
    store(row + quarter, b);
    store(row + 2 * quarter, c);
    store(row + 3 * quarter, d);
  }
  return 4 * quarter;
}

}  // namespace HWY_NAMESPACE
}  // namespace firesteel::kernels
HWY_AFTER_NAMESPACE();

#endif  // FIRESTEEL_KERNELS_INTEGER_SUMS_INL_H_
