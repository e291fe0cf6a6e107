// Tiles of dot products, shared by every kernel that multiplies rows.
//
// One rule makes results independent of how work is cut: a dot product has one f32 vector
// accumulator, lane i of which adds up the elements i, i + N, i + 2N, … in rising order (N lanes;
// pairs of elements where the CPU has a bf16 dot product), the ragged end is filled with zeros, and
// the lanes are added by one fixed tree. A tile of several tokens and rows only puts independent
// sums side by side, so as to hide the latency of the multiply-add (4 cycles, two a cycle) and to
// use each loaded vector several times.

// Included once per target, hence the toggle instead of a plain guard.
#if defined(FIRESTEEL_KERNELS_DOT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FIRESTEEL_KERNELS_DOT_INL_H_
#undef FIRESTEEL_KERNELS_DOT_INL_H_
#else
#define FIRESTEEL_KERNELS_DOT_INL_H_
#endif

#include <cstddef>
#include <type_traits>

#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "kernels/row_fetcher.h"
#include "kernels/tensor.h"

HWY_BEFORE_NAMESPACE();
namespace firesteel::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// At most 16 lanes, so that buffers of partial sums have a known size on scalable vectors too.
using DotTag = hn::CappedTag<float, 16>;

// Tokens × rows of the largest tile: accumulators + rows + one token must fit the registers.
inline constexpr size_t kTileTokens = 4;
#if HWY_ARCH_ARM_A64 || (HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3)
inline constexpr size_t kTileRows = 4;  // 32 registers
#elif HWY_NATIVE_FMA
inline constexpr size_t kTileRows = 3;  // 16 registers
#else
inline constexpr size_t kTileRows = 2;  // 16 registers, of which a product needs one more
#endif

template <class DF>
HWY_INLINE hn::Vec<DF> LoadF32(DF df, const float* p) {
  return hn::LoadU(df, p);
}
template <class DF>
HWY_INLINE hn::Vec<DF> LoadF32(DF df, const BF16* p) {
  const hn::Rebind<hwy::bfloat16_t, DF> dbf;
  return hn::PromoteTo(df, hn::LoadU(dbf, reinterpret_cast<const hwy::bfloat16_t*>(p)));
}
template <class DF>
HWY_INLINE hn::Vec<DF> LoadF32(DF df, const int8_t* p) {
  const hn::Rebind<int8_t, DF> d8;
  const hn::RebindToSigned<DF> di;
  return hn::ConvertTo(df, hn::PromoteTo(di, hn::LoadU(d8, p)));
}

// How far ahead of a lone sequence's reads its weights are fetched, in bytes of each of four
// streams: the hardware prefetcher stops at the end of a page and starts slowly in the next one.
inline constexpr size_t kStreamAhead = 1024;

// The first n < Lanes(df) elements, zeros behind them; reads nothing past them.
template <class DF>
HWY_INLINE hn::Vec<DF> LoadF32N(DF df, const float* p, size_t n) {
  return hn::LoadN(df, p, n);
}
template <class DF>
HWY_INLINE hn::Vec<DF> LoadF32N(DF df, const BF16* p, size_t n) {
  const hn::Rebind<hwy::bfloat16_t, DF> dbf;
  return hn::PromoteTo(df, hn::LoadN(dbf, reinterpret_cast<const hwy::bfloat16_t*>(p), n));
}
template <class DF>
HWY_INLINE hn::Vec<DF> LoadF32N(DF df, const int8_t* p, size_t n) {
  const hn::Rebind<int8_t, DF> d8;
  const hn::RebindToSigned<DF> di;
  return hn::ConvertTo(df, hn::PromoteTo(di, hn::LoadN(d8, p, n)));
}

// One step of a dot product: elements promoted exactly to f32.
struct PromotedStep {
  template <class DF>
  static HWY_INLINE size_t Elements(DF df) {
    return hn::Lanes(df);
  }
  template <class DF, typename T>
  static HWY_INLINE hn::Vec<DF> Load(DF df, const T* p) {
    return LoadF32(df, p);
  }
  template <class DF, typename T>
  static HWY_INLINE hn::Vec<DF> LoadPart(DF df, const T* p, size_t n) {
    return LoadF32N(df, p, n);
  }
  template <class DF, class V>
  static HWY_INLINE V Add(DF, V a, V b, V sum) {
    return hn::MulAdd(a, b, sum);
  }
};

// One step of a dot product of bf16 with bf16: two products a lane, the even element's first. Where
// the CPU has an instruction for that, it takes it, except on AVX3_SPR: Sapphire Rapids issues one
// vdpbf16ps (32 products) in two cycles but four vector FMAs (64 products), which moreover do not
// flush denormals. Zen 4 issues one of either in a cycle. (By the names of the targets, since
// HWY_NATIVE_DOT_BF16 holds of NEON_WITHOUT_AES with some compilers, where the sum of odd elements
// comes apart.) On other targets with registers for both, a shift and a mask make two vectors of
// floats, half the work of promoting each half of a vector by itself.
#define FIRESTEEL_DOT_BF16 (HWY_TARGET == HWY_AVX3_ZEN4 || HWY_TARGET == HWY_NEON_BF16)
#if FIRESTEEL_DOT_BF16 || (HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3)
struct PairStep {
  template <class DF>
  using Tag = hn::Repartition<hwy::bfloat16_t, DF>;

  template <class DF>
  static HWY_INLINE size_t Elements(DF df) {
    return 2 * hn::Lanes(df);
  }
  template <class DF>
  static HWY_INLINE hn::Vec<Tag<DF>> Load(DF, const BF16* p) {
    return hn::LoadU(Tag<DF>(), reinterpret_cast<const hwy::bfloat16_t*>(p));
  }
  template <class DF>
  static HWY_INLINE hn::Vec<Tag<DF>> LoadPart(DF, const BF16* p, size_t n) {
    return hn::LoadN(Tag<DF>(), reinterpret_cast<const hwy::bfloat16_t*>(p), n);
  }
  template <class DF, class VBF, class V>
  static HWY_INLINE V Add(DF df, VBF a, VBF b, V sum) {
#if FIRESTEEL_DOT_BF16
    V unused = hn::Zero(df);
    return hn::ReorderWidenMulAccumulate(df, a, b, sum, unused);
#else
    sum = hn::MulAdd(hn::PromoteEvenTo(df, a), hn::PromoteEvenTo(df, b), sum);
    return hn::MulAdd(hn::PromoteOddTo(df, a), hn::PromoteOddTo(df, b), sum);
#endif
  }
};
using BF16Step = PairStep;
#else
using BF16Step = PromotedStep;
#endif
#undef FIRESTEEL_DOT_BF16

// The sum of each of four vectors, in the four lanes of the result. The tree is the same for each
// of them: (l0 + l2) + (l1 + l3) within every 128 bits, then halves onto each other. Costs 8
// shuffles for four sums of 16 lanes, where four separate reductions cost 16.
template <class DF, class V>
HWY_INLINE auto FoldTo128(DF /*df*/, V v) {
  if constexpr (HWY_MAX_LANES_D(DF) <= 4) {
    return v;
  } else {
    const hn::Half<DF> half;
    return FoldTo128(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)));
  }
}

using FourTag = hn::FixedTag<float, 4>;
using Four = hn::Vec<FourTag>;

#if HWY_HAVE_SCALABLE
template <class DF, class V>
HWY_INLINE Four SumsOf(DF df, V a, V b, V c, V d) {
  HWY_ALIGN float sums[4] = {hn::ReduceSum(df, a), hn::ReduceSum(df, b), hn::ReduceSum(df, c),
                             hn::ReduceSum(df, d)};
  return hn::Load(FourTag(), sums);
}
#else
template <class DF, class V>
HWY_INLINE Four SumsOf(DF df, V a, V b, V c, V d) {
  const hn::Repartition<double, DF> dd;
  // Each 128 bits: a0 b0 a1 b1 + a2 b2 a3 b3.
  const V ab = hn::Add(hn::InterleaveLower(df, a, b), hn::InterleaveUpper(df, a, b));
  const V cd = hn::Add(hn::InterleaveLower(df, c, d), hn::InterleaveUpper(df, c, d));
  const auto ab2 = hn::BitCast(dd, ab);
  const auto cd2 = hn::BitCast(dd, cd);
  const V abcd = hn::Add(hn::BitCast(df, hn::InterleaveLower(dd, ab2, cd2)),
                         hn::BitCast(df, hn::InterleaveUpper(dd, ab2, cd2)));
  return FoldTo128(df, abcd);
}
#endif

template <class DF, class V>
HWY_INLINE void StoreSums(DF df, V a, V b, V c, V d, size_t count, float* HWY_RESTRICT out) {
  const Four sums = SumsOf(df, a, b, c, d);
  if (count == 4) {
    hn::StoreU(sums, FourTag(), out);
  } else {
    hn::StoreN(sums, FourTag(), out, count);
  }
}

// How a step loads its elements: whole vectors, or the ragged end of a row.
template <class Step>
struct LoadWhole {
  template <class DF, typename T>
  HWY_INLINE auto operator()(DF df, const T* p) const {
    return Step::Load(df, p);
  }
};
template <class Step>
struct LoadRagged {
  template <class DF, typename T>
  HWY_INLINE auto operator()(DF df, const T* p) const {
    return Step::LoadPart(df, p, n);
  }
  size_t n;
};

// Up to four rows of weights.
template <typename TW>
struct RowPointers {
  const TW* HWY_RESTRICT r0;
  const TW* HWY_RESTRICT r1;
  const TW* HWY_RESTRICT r2;
  const TW* HWY_RESTRICT r3;
};

// row(first), … for kRows rows; the rest are copies that nobody reads.
template <size_t kRows, class RowFn>
HWY_INLINE auto PointersTo(const RowFn& row, size_t first) {
  using TW = std::remove_cv_t<std::remove_pointer_t<decltype(row(first))>>;
  return RowPointers<TW>{row(first), row(first + (kRows > 1 ? 1 : 0)),
                         row(first + (kRows > 2 ? 2 : 0)), row(first + (kRows > 3 ? 3 : 0))};
}

// Four accumulators of one token, by name: vectors of SVE cannot be array elements.
template <size_t kRows, class Step, class DF, class V, class VA>
HWY_INLINE void AddToken(DF df, VA a, VA b0, VA b1, VA b2, VA b3, V& c0, V& c1, V& c2, V& c3) {
  c0 = Step::Add(df, a, b0, c0);
  if constexpr (kRows > 1) c1 = Step::Add(df, a, b1, c1);
  if constexpr (kRows > 2) c2 = Step::Add(df, a, b2, c2);
  if constexpr (kRows > 3) c3 = Step::Add(df, a, b3, c3);
}

// One step of all sums of a tile, at element i of the rows and of the tokens x, x1, x2, x3.
template <size_t kTokens, size_t kRows, class Step, class DF, typename TX, typename TW,
          class Loader, class V>
HWY_INLINE void AddStep(DF df, const Loader& load, size_t i, const TX* x, const TX* x1,
                        const TX* x2, const TX* x3, const RowPointers<TW>& w, V& c00, V& c01,
                        V& c02, V& c03, V& c10, V& c11, V& c12, V& c13, V& c20, V& c21, V& c22,
                        V& c23, V& c30, V& c31, V& c32, V& c33) {
  const auto b0 = load(df, w.r0 + i);
  auto b1 = b0, b2 = b0, b3 = b0;
  if constexpr (kRows > 1) b1 = load(df, w.r1 + i);
  if constexpr (kRows > 2) b2 = load(df, w.r2 + i);
  if constexpr (kRows > 3) b3 = load(df, w.r3 + i);
  AddToken<kRows, Step>(df, load(df, x + i), b0, b1, b2, b3, c00, c01, c02, c03);
  if constexpr (kTokens > 1) {
    AddToken<kRows, Step>(df, load(df, x1 + i), b0, b1, b2, b3, c10, c11, c12, c13);
  }
  if constexpr (kTokens > 2) {
    AddToken<kRows, Step>(df, load(df, x2 + i), b0, b1, b2, b3, c20, c21, c22, c23);
  }
  if constexpr (kTokens > 3) {
    AddToken<kRows, Step>(df, load(df, x3 + i), b0, b1, b2, b3, c30, c31, c32, c33);
  }
}

template <size_t kRows, class DF, class V>
HWY_INLINE void LoadPartials(DF df, const float* p, V& c0, V& c1, V& c2, V& c3) {
  const size_t n = hn::Lanes(df);
  c0 = hn::Load(df, p);
  if constexpr (kRows > 1) c1 = hn::Load(df, p + n);
  if constexpr (kRows > 2) c2 = hn::Load(df, p + 2 * n);
  if constexpr (kRows > 3) c3 = hn::Load(df, p + 3 * n);
}

template <size_t kRows, class DF, class V>
HWY_INLINE void StorePartials(DF df, V c0, V c1, V c2, V c3, float* p) {
  const size_t n = hn::Lanes(df);
  hn::Store(c0, df, p);
  if constexpr (kRows > 1) hn::Store(c1, df, p + n);
  if constexpr (kRows > 2) hn::Store(c2, df, p + 2 * n);
  if constexpr (kRows > 3) hn::Store(c3, df, p + 3 * n);
}

// Which part of the sum over k a tile computes, where k is cut into blocks that fit the L1 cache.
// Sums that are not complete wait in `partial` as whole vectors, so that cutting k changes no bit.
struct TilePart {
  // To the sums of a tile that lies `floats` further on.
  HWY_INLINE void Advance(size_t floats) {
    if (partial != nullptr) partial += floats;
  }

  bool first = true;
  bool last = true;
  float* partial = nullptr;   // [tokens, rows of the panel, lanes]; null if both first and last
  size_t partial_stride = 0;  // floats from one token to the next
};

// y[t · y_stride + r] = Σ_k x[t · x_stride + k] · w_r[k] for kTokens × kRows sums. Every k but that
// of the last part is a multiple of Step::Elements. If kAhead, the rows `ahead` are fetched into
// the cache meanwhile: rows are too short for the hardware prefetcher to run ahead of them.
template <size_t kTokens, size_t kRows, class Step, bool kAhead, typename TX, typename TW>
HWY_NOINLINE void DotTile(const TX* HWY_RESTRICT x, size_t x_stride, const RowPointers<TW>& w,
                          [[maybe_unused]] const RowPointers<TW>& ahead, size_t k,
                          const TilePart& part, float* HWY_RESTRICT y, size_t y_stride) {
  static_assert(kTokens <= 4 && kRows <= 4);
  const DotTag df;
  using V = hn::Vec<DotTag>;
  const TX* HWY_RESTRICT x1 = kTokens > 1 ? x + x_stride : x;
  const TX* HWY_RESTRICT x2 = kTokens > 2 ? x1 + x_stride : x;
  const TX* HWY_RESTRICT x3 = kTokens > 3 ? x2 + x_stride : x;

  V c00 = hn::Zero(df), c01 = c00, c02 = c00, c03 = c00;
  V c10 = c00, c11 = c00, c12 = c00, c13 = c00;
  V c20 = c00, c21 = c00, c22 = c00, c23 = c00;
  V c30 = c00, c31 = c00, c32 = c00, c33 = c00;
  if (!part.first) {
    const float* p = part.partial;
    LoadPartials<kRows>(df, p, c00, c01, c02, c03);
    if constexpr (kTokens > 1)
      LoadPartials<kRows>(df, p += part.partial_stride, c10, c11, c12, c13);
    if constexpr (kTokens > 2)
      LoadPartials<kRows>(df, p += part.partial_stride, c20, c21, c22, c23);
    if constexpr (kTokens > 3)
      LoadPartials<kRows>(df, p += part.partial_stride, c30, c31, c32, c33);
  }

  const size_t step = Step::Elements(df);
  size_t i = 0;
  if constexpr (kAhead) {
    // A line of each row to come for every line of the rows at hand.
    const size_t line = HWY_MAX(step, kAlignment / sizeof(TW));
    for (; i + line <= k; i += line) {
      hwy::Prefetch(ahead.r0 + i);
      if constexpr (kRows > 1) hwy::Prefetch(ahead.r1 + i);
      if constexpr (kRows > 2) hwy::Prefetch(ahead.r2 + i);
      if constexpr (kRows > 3) hwy::Prefetch(ahead.r3 + i);
      for (size_t v = 0; v < line; v += step) {
        AddStep<kTokens, kRows, Step>(df, LoadWhole<Step>(), i + v, x, x1, x2, x3, w, c00, c01, c02,
                                      c03, c10, c11, c12, c13, c20, c21, c22, c23, c30, c31, c32,
                                      c33);
      }
    }
  }
  for (; i + step <= k; i += step) {
    AddStep<kTokens, kRows, Step>(df, LoadWhole<Step>(), i, x, x1, x2, x3, w, c00, c01, c02, c03,
                                  c10, c11, c12, c13, c20, c21, c22, c23, c30, c31, c32, c33);
  }
  if (i != k) {
    AddStep<kTokens, kRows, Step>(df, LoadRagged<Step>{k - i}, i, x, x1, x2, x3, w, c00, c01, c02,
                                  c03, c10, c11, c12, c13, c20, c21, c22, c23, c30, c31, c32, c33);
  }

  if (part.last) {
    StoreSums(df, c00, c01, c02, c03, kRows, y);
    if constexpr (kTokens > 1) StoreSums(df, c10, c11, c12, c13, kRows, y += y_stride);
    if constexpr (kTokens > 2) StoreSums(df, c20, c21, c22, c23, kRows, y += y_stride);
    if constexpr (kTokens > 3) StoreSums(df, c30, c31, c32, c33, kRows, y += y_stride);
  } else {
    float* p = part.partial;
    StorePartials<kRows>(df, c00, c01, c02, c03, p);
    if constexpr (kTokens > 1)
      StorePartials<kRows>(df, c10, c11, c12, c13, p += part.partial_stride);
    if constexpr (kTokens > 2)
      StorePartials<kRows>(df, c20, c21, c22, c23, p += part.partial_stride);
    if constexpr (kTokens > 3)
      StorePartials<kRows>(df, c30, c31, c32, c33, p += part.partial_stride);
  }
}

// out[j] = x · row(j) for j in [0, num), where row(j) is a pointer to k elements: one token, four
// rows at a time, as a row's latency is hidden by its neighbours. Fetches 8 KiB ahead, which at
// 10 GB/s is several times the latency of memory.
template <class Step, typename TX, class RowFn>
HWY_INLINE void DotRows(const TX* x, size_t k, size_t num, const RowFn& row, float* out) {
  const TilePart whole;
  const size_t row_bytes = HWY_MAX(k * sizeof(*row(0)), size_t{1});
  const size_t distance = 4 * hwy::DivCeil(size_t{2048}, row_bytes);
  size_t j = 0;
  for (; j + 4 <= num; j += 4) {
    const auto ahead = PointersTo<4>(row, j + distance + 4 <= num ? j + distance : j);
    DotTile<1, 4, Step, true>(x, 0, PointersTo<4>(row, j), ahead, k, whole, out + j, 0);
  }
  for (; j < num; ++j) {
    const auto w = PointersTo<1>(row, j);
    DotTile<1, 1, Step, false>(x, 0, w, w, k, whole, out + j, 0);
  }
}

// The same for rows that lie one behind the other, as a range of a matrix does: row(j) is the j-th
// of num. Four streams, one from each quarter of the range: neighbouring rows, often two to a page,
// would be one stream to the hardware prefetcher.
template <class Step, typename TX, class RowFn>
HWY_INLINE void DotStreams(const TX* x, size_t k, size_t num, const RowFn& row, float* out) {
  const size_t quarter = num / 4;
  for (size_t j = 0; j < quarter; ++j) {
    const auto w = PointersTo<4>([&](size_t i) { return row(j + i * quarter); }, 0);
    constexpr size_t kAhead = kStreamAhead / sizeof(*w.r0);
    const decltype(w) ahead{w.r0 + kAhead, w.r1 + kAhead, w.r2 + kAhead, w.r3 + kAhead};
    HWY_ALIGN float sums[4];
    DotTile<1, 4, Step, true>(x, 0, w, ahead, k, TilePart(), sums, 0);
    for (size_t i = 0; i < 4; ++i) out[j + i * quarter] = sums[i];
  }
  const size_t rest = 4 * quarter;
  DotRows<Step>(x, k, num - rest, [&](size_t j) { return row(rest + j); }, out + rest);
}

}  // namespace HWY_NAMESPACE
}  // namespace firesteel::kernels
HWY_AFTER_NAMESPACE();

#endif  // FIRESTEEL_KERNELS_DOT_INL_H_
