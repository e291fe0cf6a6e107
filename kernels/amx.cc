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

// Writes `bytes`, a multiple of four, to a column, zeros behind them.
void SetColumn(const void* data, size_t bytes, size_t column, const TileColumns& tiles) {
  const auto* words = static_cast<const int32_t*>(data);
  const size_t count = bytes / sizeof(int32_t);
  int32_t* const out = tiles.words +
                       column / kTileColumns * tiles.depth * kTileWords * kTileColumns +
                       column % kTileColumns;
  for (size_t i = 0; i < count; ++i) out[i * kTileColumns] = words[i];
  for (size_t i = count; i < tiles.depth * kTileWords; ++i) out[i * kTileColumns] = 0;
}

}  // namespace

void SetTileColumns(const QuantizedRows& x, size_t row, size_t num_rows, const TileColumns& tiles) {
  for (size_t plane = 0; plane < 2; ++plane) {
    const int8_t* const bytes = plane == 0 ? x.High(row) : x.Low(row);
    SetColumn(bytes, x.plane, ColumnOf(row, plane, num_rows), tiles);
  }
}

void SetTileColumn(const BF16* x, size_t cols, size_t column, const TileColumns& tiles) {
  constexpr size_t kWord = sizeof(int32_t);
  SetColumn(x, (cols * sizeof(BF16) + kWord - 1) / kWord * kWord, column, tiles);
}

#if FIRESTEEL_HAVE_AMX
namespace {

// Rows of a tile of weights.
constexpr size_t kTileRows = 16;
constexpr size_t kTileWordsTotal = kTileWords * kTileColumns;

// The operand of ldtilecfg: eight tiles of up to 16 rows of 64 bytes.
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
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tiles, int8
  if ((d & kNeeded) != kNeeded) return false;
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
  size_t row_stride;  // bytes
  size_t num_rows;    // at most kPanelRows
  size_t depth;       // tiles along k
};

// The tiles of a panel: 0 and 1 sums of its upper rows with one and the other block of columns, 2
// and 3 those of its lower rows; 4 and 5 weights, 6 and 7 columns.
TileConfig ConfigOf(size_t num_rows) {
  TileConfig config;
  const auto upper = static_cast<uint8_t>(std::min(num_rows, kTileRows));
  // A tile has a row at least: where there is none, it is that of the upper ones, for nobody.
  const auto lower = static_cast<uint8_t>(num_rows > kTileRows ? num_rows - kTileRows : 1);
  config.rows[0] = config.rows[1] = config.rows[4] = upper;
  config.rows[2] = config.rows[3] = config.rows[5] = lower;
  return config;
}

// Adds the product of two tiles to a third.
template <bool kIntegers, int kSum, int kWeights, int kColumns>
FIRESTEEL_AMX inline void AddProduct() {
  if constexpr (kIntegers) {
    _tile_dpbssd(kSum, kWeights, kColumns);
  } else {
    _tile_dpbf16ps(kSum, kWeights, kColumns);
  }
}

// Sums of a panel with two blocks of columns. Meanwhile fetches rows [ahead_begin, ahead_end) of
// the next panel into L2 and, to be written, the lines of y that the sums are for: both would
// otherwise be waited for.
template <bool kIntegers>
FIRESTEEL_AMX void MultiplyPanel(const Panel& panel, const int32_t* x, const int32_t* x1,
                                 size_t ahead_begin, size_t ahead_end, const MatView& y,
                                 Sums (&sums)[4]) {
  const uint8_t* const lower =
      panel.num_rows > kTileRows ? panel.rows + kTileRows * panel.row_stride : panel.rows;
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
    _tile_loadd(6, x + i * kTileWordsTotal, 64);
    AddProduct<kIntegers, 0, 4, 6>();
    _tile_loadd(7, x1 + i * kTileWordsTotal, 64);
    AddProduct<kIntegers, 1, 4, 7>();
    _tile_loadd(5, lower + i * 64, panel.row_stride);
    AddProduct<kIntegers, 2, 5, 6>();
    AddProduct<kIntegers, 3, 5, 7>();
  }
  _tile_stored(0, sums[0].values, 64);
  _tile_stored(1, sums[1].values, 64);
  _tile_stored(2, sums[2].values, 64);
  _tile_stored(3, sums[3].values, 64);
}

// Stores the first num_rows ≤ 16 columns of rows [row_begin, row_end) of a transposed tile.
FIRESTEEL_AMX inline void StoreColumns(const __m512i (&rows)[16], size_t num_rows, size_t row_begin,
                                       size_t row_end, const MatView& y) {
  __m512i columns[16];
  Transpose(rows, columns);
  const auto valid = static_cast<__mmask16>((1u << num_rows) - 1);
  for (size_t t = row_begin; t < row_end; ++t) {
    _mm512_mask_storeu_ps(y.Row(t - row_begin), valid, _mm512_castsi512_ps(columns[t]));
  }
}

// What is to be made of the sums of a panel with a pair of blocks of columns: of 16 tokens, whose
// high planes are one block and whose low ones the other.
struct PlanesOfTokens {
  static constexpr bool kIntegers = true;
  static constexpr size_t kTokens = kTileColumns;

  FIRESTEEL_AMX void Finish(const Sums (&sums)[4], size_t row, size_t num_rows, size_t begin,
                            size_t end, const MatView& y) const {
    const auto valid = static_cast<__mmask16>((1u << (end - begin)) - 1);
    const __m512 token_scales = _mm512_maskz_loadu_ps(valid, scales + begin);
    for (size_t half = 0; half * kTileRows < num_rows; ++half) {
      const Sums& high = sums[2 * half];
      const Sums& low = sums[2 * half + 1];
      const size_t count = std::min(kTileRows, num_rows - half * kTileRows);
      __m512i rows[16];
      for (size_t i = 0; i < 16; ++i) {
        const __m512 h = _mm512_cvtepi32_ps(_mm512_load_si512(high.values[i]));
        const __m512 l = _mm512_cvtepi32_ps(_mm512_load_si512(low.values[i]));
        const __m512 product = _mm512_fmadd_ps(h, _mm512_set1_ps(256.0f), l);
        const float row_scale = i < count ? row_scales[row + half * kTileRows + i] : 0.0f;
        const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(row_scale), token_scales);
        rows[i] = _mm512_castps_si512(_mm512_mul_ps(product, scale));
      }
      StoreColumns(rows, count, 0, end - begin, {y.data + half * kTileRows, 0, 0, y.stride});
    }
  }

  const float* scales;
  const float* row_scales;
};

// Of 32 tokens.
struct Tokens {
  static constexpr bool kIntegers = false;
  static constexpr size_t kTokens = 2 * kTileColumns;

  FIRESTEEL_AMX void Finish(const Sums (&sums)[4], size_t /*row*/, size_t num_rows, size_t begin,
                            size_t end, const MatView& y) const {
    const size_t first = begin / kTokens * kTokens;  // of the pair
    for (size_t half = 0; half * kTileRows < num_rows; ++half) {
      for (size_t block = 0; block < 2; ++block) {
        const size_t block_first = first + block * kTileColumns;
        const size_t from = std::max(begin, block_first);
        const size_t to = std::min(end, block_first + kTileColumns);
        if (from >= to) continue;
        __m512i rows[16];
        for (size_t i = 0; i < 16; ++i) {
          rows[i] = _mm512_load_si512(sums[2 * half + block].values[i]);
        }
        StoreColumns(rows, std::min(kTileRows, num_rows - half * kTileRows), from - block_first,
                     to - block_first, {y.Row(from - begin) + half * kTileRows, 0, 0, y.stride});
      }
    }
  }
};

// Many tokens. A panel of weights is multiplied with all of a group of tokens before the next: it
// comes from memory once for them, and they stay in L2.
template <class Product>
FIRESTEEL_AMX void MultiplyMany(const Product& product, const TileColumns& tiles,
                                size_t token_begin, size_t token_end, const TypedView& w,
                                size_t row_begin, size_t row_end, const MatView& y) {
  constexpr size_t kGroupBytes = size_t{1280} << 10;
  constexpr size_t kTokens = Product::kTokens;
  const size_t row_stride = BytesOf(w.dtype, w.stride);
  // The activations may be longer than the weights: by what pads them, or by another matrix's part.
  const size_t depth = std::min(tiles.depth, row_stride / kAlignment);
  const size_t block_words = tiles.depth * kTileWordsTotal;
  const size_t group = std::max<size_t>(1, kGroupBytes / (2 * depth * 64 * kTileColumns));
  const size_t pairs_end = (token_end + kTokens - 1) / kTokens;
  size_t configured = kPanelRows;
  TileConfig config = ConfigOf(configured);
  _tile_loadconfig(&config);
  for (size_t first = token_begin / kTokens; first < pairs_end; first += group) {
    const size_t count = std::min(group, pairs_end - first);
    for (size_t row = row_begin; row < row_end; row += kPanelRows) {
      const Panel panel{w.RowBytes(row), row_stride, std::min(kPanelRows, row_end - row), depth};
      if (panel.num_rows != configured) {
        configured = panel.num_rows;
        config = ConfigOf(configured);
        _tile_loadconfig(&config);
      }
      for (size_t i = 0; i < count; ++i) {
        const size_t begin = std::max(token_begin, (first + i) * kTokens);
        const size_t end = std::min(token_end, (first + i + 1) * kTokens);
        const int32_t* const words = tiles.words + 2 * (first + i) * block_words;
        const MatView out{y.Row(begin) + row, end - begin, panel.num_rows, y.stride};
        Sums sums[4];
        MultiplyPanel<Product::kIntegers>(panel, words, words + block_words, kPanelRows * i / count,
                                          kPanelRows * (i + 1) / count, out, sums);
        product.Finish(sums, row, panel.num_rows, begin, end, out);
      }
    }
  }
  _tile_release();
}

}  // namespace

bool AmxAvailable() {
  static const bool allowed = CpuAndSystemAllow();
  return allowed && (hwy::SupportedTargets() & HWY_AVX3_SPR) != 0;
}

void AmxMatMul(const QuantizedRows& x, const TileColumns& tiles, const TypedView& w,
               size_t row_begin, size_t row_end, const MatView& y) {
  if (x.rows >= kManyTokens) {
    return MultiplyMany(PlanesOfTokens{x.scales, w.row_scales}, tiles, 0, x.rows, w, row_begin,
                        row_end, y);
  }
  const size_t end = MultiplyFew(x, tiles, w, row_begin, row_end, y);
  QuantizedMatMul(x, w, end, row_end, y);  // the same bits
}

void AmxMatMul(const TileColumns& tiles, size_t token_begin, size_t token_end, const TypedView& w,
               size_t row_begin, size_t row_end, const MatView& y) {
  MultiplyMany(Tokens(), tiles, token_begin, token_end, w, row_begin, row_end, y);
}

#else  // FIRESTEEL_HAVE_AMX

bool AmxAvailable() { return false; }
void AmxMatMul(const QuantizedRows&, const TileColumns&, const TypedView&, size_t, size_t,
               const MatView&) {}
void AmxMatMul(const TileColumns&, size_t, size_t, const TypedView&, size_t, size_t,
               const MatView&) {}

#endif

}  // namespace firesteel::kernels
