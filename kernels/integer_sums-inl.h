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

}  // namespace HWY_NAMESPACE
}  // namespace firesteel::kernels
HWY_AFTER_NAMESPACE();

#endif  // FIRESTEEL_KERNELS_INTEGER_SUMS_INL_H_
