#include "kernels/matmul.h"

#include <algorithm>
#include <type_traits>

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/matmul.cc"
#include "hwy/foreach_target.h"
// The rest is compiled once per target, so it has to follow foreach_target.h.
#include "hwy/highway.h"
#include "kernels/dot-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace firesteel::kernels {
namespace HWY_NAMESPACE {

// Blocks of prefill. A panel of 12 rows (a multiple of 2, 3 and 4 tile rows) × 512 elements in f32
// is 24 KiB and four tokens of it are 8 KiB: both stay in a 48 KiB L1. bf16 tokens are promoted
// once a panel, which is worth panels of twice the rows, in L2. 64 tokens share a panel once it is
// promoted. On the stack: at most 56 KiB of blocks and 96 KiB of partial sums.
template <typename TX>
inline constexpr size_t kPanelRows = std::is_same_v<TX, float> ? 12 : 24;
inline constexpr size_t kPanelDepth = 512;
inline constexpr size_t kPanelTokens = 64;
// From here on a panel is worth its promotion.
inline constexpr size_t kMinPanelTokens = 24;

// kTokens × num_rows sums; row(n) points to the elements of row n that `part` covers. If kAhead,
// the next rows are fetched meanwhile, num_ahead of them being row(num_rows) and on.
template <size_t kTokens, class Step, bool kAhead, typename TX, class RowFn>
HWY_INLINE void TileRow(const TX* x, size_t x_stride, const RowFn& row, size_t num_rows,
                        size_t num_ahead, size_t k, TilePart part, float* y, size_t y_stride) {
  const size_t lanes = hn::Lanes(DotTag());
  size_t n = 0;
  for (; n + kTileRows <= num_rows; n += kTileRows) {
    const auto w = PointersTo<kTileRows>(row, n);
    const bool more = kAhead && n + 2 * kTileRows <= num_rows + num_ahead;
    const auto ahead = PointersTo<kTileRows>(row, more ? n + kTileRows : n);
    DotTile<kTokens, kTileRows, Step, kAhead>(x, x_stride, w, ahead, k, part, y + n, y_stride);
    part.Advance(kTileRows * lanes);
  }
  for (; n < num_rows; ++n) {
    const auto w = PointersTo<1>(row, n);
    DotTile<kTokens, 1, Step, false>(x, x_stride, w, w, k, part, y + n, y_stride);
    part.Advance(lanes);
  }
}

// All tokens of x, in tiles of 4, 2 and 1; the first tile fetches ahead.
template <class Step, typename TX, class RowFn>
HWY_NOINLINE void TokenTiles(const TX* x, size_t x_stride, size_t tokens, const RowFn& row,
                             size_t num_rows, size_t num_ahead, size_t k, TilePart part, float* y,
                             size_t y_stride) {
  const auto tile = [&]<size_t kTokens, bool kAhead>() HWY_ATTR {
    TileRow<kTokens, Step, kAhead>(x, x_stride, row, num_rows, num_ahead, k, part, y, y_stride);
    x += kTokens * x_stride;
    y += kTokens * y_stride;
    part.Advance(kTokens * part.partial_stride);
    tokens -= kTokens;
  };
  if (num_ahead != 0 && tokens >= 4) tile.template operator()<4, true>();
  while (tokens >= 4) tile.template operator()<4, false>();
  if (tokens >= 2) tile.template operator()<2, true>();
  if (tokens == 1) tile.template operator()<1, true>();
}

// Few tokens: bound by reading w, which is promoted on the way.
template <class Step, typename TX, typename TW>
void MatMulDirect(const TypedView& x, const TypedView& w, size_t row_begin, size_t row_end,
                  const MatView& y) {
  const TX* x0 = x.Row<TX>(0);
  if (x.rows == 1) {
    DotStreams<Step>(
        x0, x.cols, row_end - row_begin, [&](size_t r) { return w.Row<TW>(row_begin + r); },
        y.Row(0) + row_begin);
    return;
  }
  for (size_t n = row_begin; n < row_end; n += kTileRows) {
    const size_t rows = std::min(kTileRows, row_end - n);
    TokenTiles<Step>(
        x0, x.stride, x.rows, [&](size_t r) { return w.Row<TW>(n + r); }, rows,
        std::min(kTileRows, row_end - n - rows), x.cols, TilePart(), y.Row(0) + n, y.stride);
  }
}

// Copies n elements to f32, the rest of the last vector zero; `to` is aligned.
template <typename T>
HWY_INLINE void PromoteRow(const T* HWY_RESTRICT from, size_t n, float* HWY_RESTRICT to) {
  const DotTag df;
  const size_t lanes = hn::Lanes(df);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) hn::Store(LoadF32(df, from + i), df, to + i);
  if (i != n) hn::Store(LoadF32N(df, from + i, n - i), df, to + i);
}

// The blocks of x and w that a tile of prefill works on, in f32.
template <typename TX>
struct PromotedBlocks {
  HWY_ALIGN float w[kPanelRows<TX> * kPanelDepth];
  HWY_ALIGN float x[std::is_same_v<TX, float> ? 1 : kTileTokens * kPanelDepth];
};

// All tokens of xk with a promoted panel: each tile of bf16 tokens is promoted too, once for 12
// rows.
template <typename TX>
void PromotedPanel(const TX* xk, size_t x_stride, size_t tokens, size_t rows, size_t depth,
                   PromotedBlocks<TX>& blocks, const TilePart& part, float* y, size_t y_stride) {
  const auto row = [&](size_t r) -> const float* { return blocks.w + r * kPanelDepth; };
  if constexpr (std::is_same_v<TX, float>) {
    TokenTiles<PromotedStep>(xk, x_stride, tokens, row, rows, 0, depth, part, y, y_stride);
  } else {
    TilePart tile = part;
    for (size_t t = 0; t < tokens; t += kTileTokens) {
      const size_t count = std::min(kTileTokens, tokens - t);
      for (size_t i = 0; i < count; ++i) {
        PromoteRow(xk + (t + i) * x_stride, depth, blocks.x + i * kPanelDepth);
      }
      TokenTiles<PromotedStep>(static_cast<const float*>(blocks.x), kPanelDepth, count, row, rows,
                               0, depth, tile, y + t * y_stride, y_stride);
      tile.Advance(kTileTokens * tile.partial_stride);
    }
  }
}

// Many tokens: bound by the multiply-adds. Blocks of k are promoted once for 64 tokens, unless the
// CPU multiplies bf16 itself, when the rows are read where they are.
template <class Step, typename TX, typename TW>
void MatMulPanels(const TypedView& x, const TypedView& w, size_t row_begin, size_t row_end,
                  const MatView& y) {
  const size_t lanes = hn::Lanes(DotTag());
  constexpr size_t kRows = kPanelRows<TX>;
  constexpr bool kPromote = std::is_same_v<Step, PromotedStep>;
  [[maybe_unused]] std::conditional_t<kPromote, PromotedBlocks<TX>, char> blocks;
  HWY_ALIGN float partial[kPanelTokens * kRows * HWY_MAX_LANES_D(DotTag)];
  for (size_t t = 0; t < x.rows; t += kPanelTokens) {
    const size_t tokens = std::min(kPanelTokens, x.rows - t);
    for (size_t n = row_begin; n < row_end; n += kRows) {
      const size_t rows = std::min(kRows, row_end - n);
      for (size_t k = 0; k < x.cols; k += kPanelDepth) {
        const size_t depth = std::min(kPanelDepth, x.cols - k);
        const TilePart part = {.first = k == 0,
                               .last = k + depth == x.cols,
                               .partial = partial,
                               .partial_stride = kRows * lanes};
        const TX* xk = x.Row<TX>(t) + k;
        float* yn = y.Row(t) + n;
        const auto row = [&](size_t r) { return w.Row<TW>(n + r) + k; };
        if constexpr (kPromote) {
          for (size_t r = 0; r < rows; ++r) PromoteRow(row(r), depth, blocks.w + r * kPanelDepth);
          PromotedPanel(xk, x.stride, tokens, rows, depth, blocks, part, yn, y.stride);
        } else {
          TokenTiles<Step>(xk, x.stride, tokens, row, rows, 0, depth, part, yn, y.stride);
        }
      }
    }
  }
}

template <class Step, typename TX, typename TW>
void MatMulTyped(const TypedView& x, const TypedView& w, size_t row_begin, size_t row_end,
                 const MatView& y) {
  if (x.rows < kMinPanelTokens || x.cols == 0) {
    MatMulDirect<Step, TX, TW>(x, w, row_begin, row_end, y);
  } else {
    MatMulPanels<Step, TX, TW>(x, w, row_begin, row_end, y);
  }
}

void MatMulImpl(const TypedView& x, const TypedView& w, size_t row_begin, size_t row_end,
                const MatView& y) {
  if (x.dtype == DType::kBF16) {
    MatMulTyped<BF16Step, BF16, BF16>(x, w, row_begin, row_end, y);
  } else if (w.dtype == DType::kBF16) {
    MatMulTyped<PromotedStep, float, BF16>(x, w, row_begin, row_end, y);
  } else {
    MatMulTyped<PromotedStep, float, float>(x, w, row_begin, row_end, y);
  }
}

// In integers, as the CPU's own instruction would flush denormals.
void RoundToBF16Impl(const float* x, size_t n, BF16* out) {
  const hn::ScalableTag<uint32_t> du;
  const hn::Rebind<uint16_t, decltype(du)> du16;
  const size_t lanes = hn::Lanes(du);
  const auto* from = reinterpret_cast<const uint32_t*>(x);
  auto* to = reinterpret_cast<uint16_t*>(out);
  const auto round = [&](auto u) HWY_ATTR {
    const auto odd = hn::And(hn::ShiftRight<16>(u), hn::Set(du, 1));
    const auto rounded = hn::Add(u, hn::Add(odd, hn::Set(du, 0x7FFF)));
    const auto nan = hn::Gt(hn::And(u, hn::Set(du, 0x7FFFFFFF)), hn::Set(du, 0x7F800000));
    const auto quiet = hn::Or(u, hn::Set(du, 0x00400000));
    return hn::TruncateTo(du16, hn::ShiftRight<16>(hn::IfThenElse(nan, quiet, rounded)));
  };
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) hn::StoreU(round(hn::LoadU(du, from + i)), du16, to + i);
  if (i != n) hn::StoreN(round(hn::LoadN(du, from + i, n - i)), du16, to + i, n - i);
}

}  // namespace HWY_NAMESPACE
}  // namespace firesteel::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace firesteel::kernels {

HWY_EXPORT(MatMulImpl);
HWY_EXPORT(RoundToBF16Impl);

void MatMul(const TypedView& x, const TypedView& w, size_t row_begin, size_t row_end,
            const MatView& y) {
  HWY_DASSERT(x.cols == w.cols);
  HWY_DASSERT(row_begin <= row_end && row_end <= w.rows && w.rows <= y.cols);
  HWY_DASSERT(x.rows <= y.rows);
  HWY_DASSERT(x.dtype == DType::kF32 || w.dtype == DType::kBF16);
  HWY_DYNAMIC_DISPATCH(MatMulImpl)(x, w, row_begin, row_end, y);
}

void RoundToBF16(const float* x, size_t n, BF16* out) {
  HWY_DYNAMIC_DISPATCH(RoundToBF16Impl)(x, n, out);
}

}  // namespace firesteel::kernels
#endif  // HWY_ONCE
