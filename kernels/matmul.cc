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
// is 24 KiB and four tokens of it are 8 KiB: both stay in a 48 KiB L1. 64 tokens share a panel once
// it is promoted.
inline constexpr size_t kPanelRows = 12;
inline constexpr size_t kPanelDepth = 512;
inline constexpr size_t kPanelTokens = 64;
// From here on a panel is worth its promotion.
inline constexpr size_t kMinPanelTokens = 8;

// kTokens × [row_begin, row_end) sums; row(n) points to the elements of row n that `part` covers.
template <size_t kTokens, class Step, typename TX, class RowFn>
HWY_INLINE void TileRow(const TX* x, size_t x_stride, const RowFn& row, size_t num_rows, size_t k,
                        TilePart part, float* y, size_t y_stride) {
  const size_t lanes = hn::Lanes(DotTag());
  size_t n = 0;
  for (; n + kTileRows <= num_rows; n += kTileRows) {
    const auto* w0 = row(n);
    DotTile<kTokens, kTileRows, Step>(x, x_stride, w0, row(n + (kTileRows > 1 ? 1 : 0)),
                                      row(n + (kTileRows > 2 ? 2 : 0)),
                                      row(n + (kTileRows > 3 ? 3 : 0)), k, part, y + n, y_stride);
    part.partial += kTileRows * lanes;
  }
  for (; n < num_rows; ++n) {
    const auto* w0 = row(n);
    DotTile<kTokens, 1, Step>(x, x_stride, w0, w0, w0, w0, k, part, y + n, y_stride);
    part.partial += lanes;
  }
}

// All tokens of x, in tiles of 4, 2 and 1.
template <class Step, typename TX, class RowFn>
HWY_NOINLINE void TokenTiles(const TX* x, size_t x_stride, size_t tokens, const RowFn& row,
                             size_t num_rows, size_t k, TilePart part, float* y, size_t y_stride) {
  const auto tile = [&]<size_t kTokens>() HWY_ATTR {
    TileRow<kTokens, Step>(x, x_stride, row, num_rows, k, part, y, y_stride);
    x += kTokens * x_stride;
    y += kTokens * y_stride;
    part.partial += kTokens * part.partial_stride;
  };
  for (; tokens >= 4; tokens -= 4) tile.template operator()<4>();
  if (tokens >= 2) tile.template operator()<2>();
  if (tokens % 2 == 1) tile.template operator()<1>();
}

// Few tokens: bound by reading w, which is promoted on the way.
template <class Step, typename TX, typename TW>
void MatMulDirect(const TypedView& x, const TypedView& w, size_t row_begin, size_t row_end,
                  const MatView& y) {
  for (size_t n = row_begin; n < row_end; n += kTileRows) {
    TokenTiles<Step>(
        x.Row<TX>(0), x.stride, x.rows, [&](size_t r) { return w.Row<TW>(n + r); },
        std::min(kTileRows, row_end - n), x.cols, TilePart(), y.Row(0) + n, y.stride);
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
struct PromotedBlocks {
  HWY_ALIGN float w[kPanelRows * kPanelDepth];
  HWY_ALIGN float x[kTileTokens * kPanelDepth];
};

// All tokens of xk with a promoted panel: each tile of bf16 tokens is promoted too, once for 12
// rows.
template <typename TX>
void PromotedPanel(const TX* xk, size_t x_stride, size_t tokens, size_t rows, size_t depth,
                   PromotedBlocks& blocks, const TilePart& part, float* y, size_t y_stride) {
  const auto row = [&](size_t r) -> const float* { return blocks.w + r * kPanelDepth; };
  if constexpr (std::is_same_v<TX, float>) {
    TokenTiles<PromotedStep>(xk, x_stride, tokens, row, rows, depth, part, y, y_stride);
  } else {
    TilePart tile = part;
    for (size_t t = 0; t < tokens; t += kTileTokens) {
      const size_t count = std::min(kTileTokens, tokens - t);
      for (size_t i = 0; i < count; ++i) {
        PromoteRow(xk + (t + i) * x_stride, depth, blocks.x + i * kPanelDepth);
      }
      TokenTiles<PromotedStep>(static_cast<const float*>(blocks.x), kPanelDepth, count, row, rows,
                               depth, tile, y + t * y_stride, y_stride);
      tile.partial += kTileTokens * tile.partial_stride;
    }
  }
}

// Many tokens: bound by the multiply-adds. Blocks of k are promoted once for 64 tokens, unless the
// CPU multiplies bf16 itself, when the rows are read where they are.
template <class Step, typename TX, typename TW>
void MatMulPanels(const TypedView& x, const TypedView& w, size_t row_begin, size_t row_end,
                  const MatView& y) {
  const size_t lanes = hn::Lanes(DotTag());
  constexpr bool kPromote = std::is_same_v<Step, PromotedStep>;
  [[maybe_unused]] std::conditional_t<kPromote, PromotedBlocks, char> blocks;
  HWY_ALIGN float partial[kPanelTokens * kPanelRows * HWY_MAX_LANES_D(DotTag)];
  for (size_t t = 0; t < x.rows; t += kPanelTokens) {
    const size_t tokens = std::min(kPanelTokens, x.rows - t);
    for (size_t n = row_begin; n < row_end; n += kPanelRows) {
      const size_t rows = std::min(kPanelRows, row_end - n);
      for (size_t k = 0; k < x.cols; k += kPanelDepth) {
        const size_t depth = std::min(kPanelDepth, x.cols - k);
        const TilePart part = {.first = k == 0,
                               .last = k + depth == x.cols,
                               .partial = partial,
                               .partial_stride = kPanelRows * lanes};
        const TX* xk = x.Row<TX>(t) + k;
        float* yn = y.Row(t) + n;
        if constexpr (kPromote) {
          for (size_t r = 0; r < rows; ++r) {
            PromoteRow(w.Row<TW>(n + r) + k, depth, blocks.w + r * kPanelDepth);
          }
          PromotedPanel(xk, x.stride, tokens, rows, depth, blocks, part, yn, y.stride);
        } else {
          TokenTiles<Step>(
              xk, x.stride, tokens, [&](size_t r) { return w.Row<TW>(n + r) + k; }, rows, depth,
              part, yn, y.stride);
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
