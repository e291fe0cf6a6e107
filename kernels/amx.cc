#include "kernels/amx.h"

#include <algorithm>
#include <cstring>

#include "hwy/targets.h"
#include "kernels/simd_target.h"

#if HWY_ARCH_X86_64 && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define FIRESTEEL_HAVE_AMX 1
#define FIRESTEEL_AMX                                                                             \
  __attribute__((                                                                                 \
      target("amx-tile,amx-int8,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma," \
             "prfchw")))
#else
#define FIRESTEEL_HAVE_AMX 0
#endif

namespace firesteel::kernels {

namespace {

// From so many tokens on, each plane of 16 tokens has a tile of its own.
constexpr size_t kManyTokens = 24;

// The column of a token's plane: 0 is the high one. Eight tokens that decode together share a tile;
// for prompts the planes lie apart, which halves the work that is left after the products.
size_t ColumnOf(size_t token, size_t plane, size_t num_tokens) {
  if (num_tokens < kManyTokens) return 2 * token + plane;
  return (token / kTileColumns * 2 + plane) * kTileColumns + token % kTileColumns;
}

}  // namespace

void SetTileColumns(const QuantizedRows& x, size_t row, size_t num_rows, const TileColumns& tiles) {
  constexpr size_t kTile = kTileWords * kTileColumns;
  const size_t count = x.plane / sizeof(int32_t);
  for (size_t plane = 0; plane < 2; ++plane) {
    const auto* words = reinterpret_cast<const int32_t*>(plane == 0 ? x.High(row) : x.Low(row));
    const size_t column = ColumnOf(row, plane, num_rows);
    int32_t* out =
        tiles.words + column / kTileColumns * tiles.depth * kTile + column % kTileColumns;
    for (size_t i = 0; i < count; ++i) out[i * kTileColumns] = words[i];
    const size_t padded = (count + kTileWords - 1) / kTileWords * kTileWords;
    for (size_t i = count; i < padded; ++i) out[i * kTileColumns] = 0;
  }
}

#if FIRESTEEL_HAVE_AMX
namespace {

// Rows of a tile of weights.
constexpr size_t kTileRows = 16;
constexpr size_t kTileWordsTotal = kTileWords * kTileColumns;

// The operand of ldtilecfg: eight tiles of 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

bool CpuAndSystemAllow() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
  if ((d & kTile) == 0 || (d & kInt8) == 0) return false;
  // The tiles' registers are large, so Linux saves them only for those who ask.
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// The sums of 16 rows of weights × 16 columns.
struct alignas(64) Sums {
  int32_t values[kTileRows][kTileColumns];
};

// How far ahead of a tile's rows the next bytes are fetched: the hardware prefetcher stops at the
// end of a page and starts slowly in the next one.
constexpr size_t kAhead = 1024;

// Sums of 16 rows, `row_stride` bytes apart, with one or two blocks of columns.
template <bool kTwo>
FIRESTEEL_AMX void MultiplyRows(const uint8_t* w, size_t row_stride, const int32_t* x,
                                const int32_t* x1, size_t depth, Sums* sums) {
  _tile_zero(0);
  if constexpr (kTwo) _tile_zero(1);
  for (size_t i = 0; i < depth; ++i) {
    for (size_t row = 0; row < kTileRows; ++row) {
      const uint8_t* const ahead = w + row * row_stride + i * 64 + kAhead;
      _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
    }
    _tile_loadd(4, w + i * 64, row_stride);
    _tile_loadd(6, x + i * kTileWordsTotal, 64);
    _tile_dpbssd(0, 4, 6);
    if constexpr (kTwo) {
      _tile_loadd(7, x1 + i * kTileWordsTotal, 64);
      _tile_dpbssd(1, 4, 7);
    }
  }
  _tile_stored(0, sums[0].values, 64);
  if constexpr (kTwo) _tile_stored(1, sums[1].values, 64);
}

// out[c][r] = in[r][c].
FIRESTEEL_AMX inline void Transpose(const __m512i (&in)[16], __m512i (&out)[16]) {
  __m512i a[16], b[16];
  for (size_t i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(in[i], in[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(in[i], in[i + 1]);
  }
  for (size_t i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // a[4g + c] holds, in its 128-bit part p, rows 4g … 4g + 3 of column 4p + c.
  for (size_t c = 0; c < 4; ++c) {
    const __m512i low02 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88);
    const __m512i low13 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xDD);
    const __m512i high02 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
    const __m512i high13 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xDD);
    out[c] = _mm512_shuffle_i32x4(low02, high02, 0x88);
    out[4 + c] = _mm512_shuffle_i32x4(low13, high13, 0x88);
    out[8 + c] = _mm512_shuffle_i32x4(low02, high02, 0xDD);
    out[12 + c] = _mm512_shuffle_i32x4(low13, high13, 0xDD);
  }
}

// Scales the sums of a tile, whose rows are row, row + step, row + 2 · step …, for up to 8 tokens
// from `first` on.
FIRESTEEL_AMX void Finish(const Sums& sums, const QuantizedRows& x, size_t first,
                          const float* row_scales, size_t row, size_t step, const MatView& y) {
  __m512i rows[16], columns[16];
  for (size_t i = 0; i < 16; ++i) rows[i] = _mm512_load_si512(sums.values[i]);
  Transpose(rows, columns);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i offsets = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(step)));
  const __m512 scales = _mm512_i32gather_ps(offsets, row_scales + row, sizeof(float));
  const size_t tokens = std::min(kTileColumns / 2, x.rows - first);
  for (size_t i = 0; i < tokens; ++i) {
    const __m512 high = _mm512_cvtepi32_ps(columns[2 * i]);
    const __m512 low = _mm512_cvtepi32_ps(columns[2 * i + 1]);
    const __m512 product = _mm512_fmadd_ps(high, _mm512_set1_ps(256.0f), low);
    const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(x.scales[first + i]));
    _mm512_i32scatter_ps(y.Row(first + i) + row, offsets, _mm512_mul_ps(product, scale),
                         sizeof(float));
  }
}

// A few tokens, whose products take no longer than reading the weights does. Returns the end of the
// rows that were multiplied.
FIRESTEEL_AMX size_t MultiplyFew(const QuantizedRows& x, const TileColumns& tiles,
                                 const TypedView& w, size_t row_begin, size_t row_end,
                                 const MatView& y) {
  // The rows of a tile are sixteen streams through memory, one of each sixteenth of the range: the
  // CPU's prefetcher follows them better than rows that lie next to each other.
  const size_t step = (row_end - row_begin) / kTileRows;
  const size_t stride = step * w.stride;
  // The activations may be padded by one tile more than the weights.
  const size_t depth = std::min(tiles.depth, w.stride / kAlignment);
  const size_t block_words = tiles.depth * kTileWordsTotal;
  const size_t blocks = (2 * x.rows + kTileColumns - 1) / kTileColumns;
  const TileConfig config;
  _tile_loadconfig(&config);
  for (size_t row = row_begin; row < row_begin + step; ++row) {
    for (size_t block = 0; block < blocks; block += 2) {
      Sums sums[2];
      const bool two = block + 2 <= blocks;
      const int32_t* const words = tiles.words + block * block_words;
      const auto multiply = two ? MultiplyRows<true> : MultiplyRows<false>;
      multiply(w.RowBytes(row), stride, words, words + block_words, depth, sums);
      for (size_t i = 0; i < (two ? 2u : 1u); ++i) {
        Finish(sums[i], x, (block + i) * kTileColumns / 2, w.row_scales, row, step, y);
      }
    }
  }
  _tile_release();
  return row_begin + step * kTileRows;
}

// Rows of weights that are multiplied together.
constexpr size_t kPanelRows = 2 * kTileRows;

// A panel of weights, and the next one, which is on its way.
struct Panel {
  const uint8_t* rows;
  size_t row_stride;
  const float* row_scales;
  size_t depth;  // tiles along k
};

// Sums of a panel with 16 tokens: the upper 16 rows with the high and the low plane, then the lower
// ones. Meanwhile fetches rows [ahead_begin, ahead_end) of the next panel into L2 and, to be
// written, the lines of y that the sums are for: both would otherwise be waited for.
FIRESTEEL_AMX void MultiplyPanel(const Panel& panel, const int32_t* high, const int32_t* low,
                                 size_t ahead_begin, size_t ahead_end, const MatView& y,
                                 Sums (&sums)[4]) {
  const uint8_t* const lower = panel.rows + kTileRows * panel.row_stride;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (size_t i = 0; i < panel.depth; ++i) {
    for (size_t row = ahead_begin; row < ahead_end; ++row) {
      const uint8_t* const ahead = panel.rows + (kPanelRows + row) * panel.row_stride + i * 64;
      _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
    }
    for (size_t token = 2 * i; token < std::min(2 * i + 2, y.rows); ++token) {
      __builtin_prefetch(y.Row(token), 1);
      __builtin_prefetch(y.Row(token) + kTileRows, 1);
    }
    _tile_loadd(4, panel.rows + i * 64, panel.row_stride);
    _tile_loadd(6, high + i * kTileWordsTotal, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, low + i * kTileWordsTotal, 64);
    _tile_dpbssd(1, 4, 7);
    _tile_loadd(5, lower + i * 64, panel.row_stride);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, sums[0].values, 64);
  _tile_stored(1, sums[1].values, 64);
  _tile_stored(2, sums[2].values, 64);
  _tile_stored(3, sums[3].values, 64);
}

// Puts together and scales the sums of 16 rows with the planes of 16 tokens; y has the tokens there
// are.
FIRESTEEL_AMX void FinishPlanes(const Sums& high, const Sums& low, __m512 token_scales,
                                const float* row_scales, const MatView& y) {
  __m512i rows[16], columns[16];
  for (size_t i = 0; i < 16; ++i) {
    const __m512 h = _mm512_cvtepi32_ps(_mm512_load_si512(high.values[i]));
    const __m512 l = _mm512_cvtepi32_ps(_mm512_load_si512(low.values[i]));
    const __m512 product = _mm512_fmadd_ps(h, _mm512_set1_ps(256.0f), l);
    const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(row_scales[i]), token_scales);
    rows[i] = _mm512_castps_si512(_mm512_mul_ps(product, scale));
  }
  Transpose(rows, columns);
  for (size_t t = 0; t < y.rows; ++t) {
    _mm512_storeu_ps(y.Row(t), _mm512_castsi512_ps(columns[t]));
  }
}

// Many tokens. A panel of weights is multiplied with all of a group of tokens before the next: it
// comes from memory once for them, and they stay in L2.
FIRESTEEL_AMX size_t MultiplyMany(const QuantizedRows& x, const TileColumns& tiles,
                                  const TypedView& w, size_t row_begin, size_t row_end,
                                  const MatView& y) {
  constexpr size_t kGroupBytes = size_t{1280} << 10;
  const size_t depth = std::min(tiles.depth, w.stride / kAlignment);
  const size_t block_words = tiles.depth * kTileWordsTotal;
  const size_t blocks = (x.rows + kTileColumns - 1) / kTileColumns;
  const size_t group = std::max<size_t>(1, kGroupBytes / (2 * block_words * sizeof(int32_t)));
  const size_t end = row_begin + (row_end - row_begin) / kPanelRows * kPanelRows;
  const TileConfig config;
  _tile_loadconfig(&config);
  for (size_t first = 0; first < blocks; first += group) {
    const size_t count = std::min(group, blocks - first);
    for (size_t row = row_begin; row < end; row += kPanelRows) {
      const Panel panel{w.RowBytes(row), w.stride, w.row_scales + row, depth};
      for (size_t b = 0; b < count; ++b) {
        const size_t token = (first + b) * kTileColumns;
        const size_t tokens = std::min(kTileColumns, x.rows - token);
        const int32_t* const words = tiles.words + 2 * (first + b) * block_words;
        MatView out{y.Row(token) + row, tokens, kPanelRows, y.stride};
        Sums sums[4];
        MultiplyPanel(panel, words, words + block_words, kPanelRows * b / count,
                      kPanelRows * (b + 1) / count, out, sums);
        const auto valid = static_cast<__mmask16>((1u << tokens) - 1);
        const __m512 scales = _mm512_maskz_loadu_ps(valid, x.scales + token);
        FinishPlanes(sums[0], sums[1], scales, panel.row_scales, out);
        out.data += kTileRows;
        FinishPlanes(sums[2], sums[3], scales, panel.row_scales + kTileRows, out);
      }
    }
  }
  _tile_release();
  return end;
}

}  // namespace

bool AmxAvailable() {
  static const bool allowed = CpuAndSystemAllow();
  return allowed && (hwy::SupportedTargets() & HWY_AVX3_SPR) != 0;
}

void AmxMatMul(const QuantizedRows& x, const TileColumns& tiles, const TypedView& w,
               size_t row_begin, size_t row_end, const MatView& y) {
  const auto multiply = x.rows < kManyTokens ? MultiplyFew : MultiplyMany;
  const size_t end = multiply(x, tiles, w, row_begin, row_end, y);
  QuantizedMatMul(x, w, end, row_end, y);  // the same bits
}

#else  // FIRESTEEL_HAVE_AMX

bool AmxAvailable() { return false; }
void AmxMatMul(const QuantizedRows&, const TileColumns&, const TypedView&, size_t, size_t,
               const MatView&) {}

#endif

}  // namespace firesteel::kernels
