#include "kernels/amx.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "hwy/targets.h"
#include "kernels/amx-inl.h"
#include "kernels/simd_target.h"

#if FIRESTEEL_HAVE_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace firesteel::kernels {

namespace {

// The first word of a column; the next ones are kTileColumns apart.
int32_t* ColumnOf(size_t column, size_t depth, int32_t* tiles) {
  return tiles + column / kTileColumns * depth * kTileWords * kTileColumns + column % kTileColumns;
}

// Writes `bytes`, a multiple of four, to a column of tiles, zeros behind them.
void SetColumn(const void* data, size_t bytes, size_t column, size_t depth, int32_t* tiles) {
  const auto* words = static_cast<const int32_t*>(data);
  const size_t count = bytes / sizeof(int32_t);
  int32_t* const out = ColumnOf(column, depth, tiles);
  for (size_t i = 0; i < count; ++i) out[i * kTileColumns] = words[i];
  for (size_t i = count; i < depth * kTileWords; ++i) out[i * kTileColumns] = 0;
}

}  // namespace

void SetTileColumn(const QuantizedRows& x, size_t row, const TileColumns& tiles) {
  SetColumn(x.Low(row), x.plane, row, tiles.depth, tiles.words);
  static_assert(kHighBlock == 4 * kTileWords, "a tile each");
  const auto* const words = reinterpret_cast<const int32_t*>(x.High(row));
  int32_t* const column = ColumnOf(row, tiles.depth, tiles.high);
  uint64_t* const before = tiles.high_blocks + row * tiles.HighWords();
  for (size_t i = 0; i < tiles.HighWords(); ++i) before[i] |= x.HighBlocks(row)[i];
  ForHighBlocks(before, tiles.HighWords(), [&](size_t block) {
    for (size_t k = block * kTileWords; k < (block + 1) * kTileWords; ++k) {
      column[k * kTileColumns] = words[k];
    }
  });
  std::copy_n(x.HighBlocks(row), tiles.HighWords(), before);
}

void SetTileColumn(const BF16* x, size_t cols, size_t column, const TileColumns& tiles) {
  constexpr size_t kWord = sizeof(int32_t);
  SetColumn(x, (cols * sizeof(BF16) + kWord - 1) / kWord * kWord, column, tiles.depth, tiles.words);
}

#if FIRESTEEL_HAVE_AMX
namespace {

// From so many tokens on, weights are multiplied panel by panel.
constexpr size_t kManyTokens = 24;

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

// The blocks of the high plane that some of up to 32 tokens has.
struct HighBlocks {
  HighBlocks(const QuantizedRows& x, size_t first) {
    const size_t end = std::min(first + 2 * kTileColumns, x.rows);
    for (size_t t = first; t < end; ++t) {
      for (size_t i = 0; i < x.HighWords(); ++i) words[i] |= x.HighBlocks(t)[i];
    }
    for (size_t i = 0; i < x.HighWords(); ++i) {
      if (words[i] != 0) num_words = i + 1;
    }
  }
  uint64_t words[kMaxQuantizedCols / kHighBlock / 64] = {};
  size_t num_words = 0;  // 0: none
};

// The same for the tiles of the high plane that are listed.
FIRESTEEL_AMX void MultiplyHighRows(const uint8_t* w, size_t row_stride, const int32_t* x,
                                    const HighBlocks& blocks, Sums& sums) {
  _tile_zero(0);
  ForHighBlocks(blocks.words, blocks.num_words, [&](size_t i) FIRESTEEL_AMX {
    _tile_loadd(4, w + i * 64, row_stride);
    _tile_loadd(6, x + i * kTileWordsTotal, 64);
    _tile_dpbssd(0, 4, 6);
  });
  _tile_stored(0, sums.values, 64);
}

// Scales the sums of a tile, whose rows are row, row + step, row + 2 · step …, for up to 16 tokens
// from `first` on. `high` is null where all of that plane is zero.
FIRESTEEL_AMX void Finish(const Sums& low, const Sums* high, const QuantizedRows& x, size_t first,
                          const float* row_scales, size_t row, size_t step, const MatView& y) {
  __m512i rows[16], columns[16];
  for (size_t i = 0; i < 16; ++i) {
    __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(low.values[i]));
    if (high != nullptr) {
      const __m512 upper = _mm512_cvtepi32_ps(_mm512_load_si512(high->values[i]));
      sum = _mm512_fmadd_ps(upper, _mm512_set1_ps(256.0f), sum);
    }
    rows[i] = _mm512_castps_si512(sum);
  }
  Transpose(rows, columns);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i offsets = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(step)));
  const __m512 scales = _mm512_i32gather_ps(offsets, row_scales + row, sizeof(float));
  const size_t tokens = std::min(kTileColumns, x.rows - first);
  for (size_t i = 0; i < tokens; ++i) {
    const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(x.scales[first + i]));
    const __m512 product = _mm512_mul_ps(_mm512_castsi512_ps(columns[i]), scale);
    _mm512_i32scatter_ps(y.Row(first + i) + row, offsets, product, sizeof(float));
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
  const bool two = x.rows > kTileColumns;
  static_assert(kManyTokens <= 2 * kTileColumns);
  const HighBlocks high_blocks(x, 0);
  const TileConfig config;
  _tile_loadconfig(&config);
  for (size_t row = row_begin; row < row_begin + step; ++row) {
    const uint8_t* const weights = w.RowBytes(row);
    Sums low[2];
    const auto multiply = two ? MultiplyRows<true> : MultiplyRows<false>;
    multiply(weights, stride, tiles.words, tiles.words + block_words, depth, low);
    for (size_t block = 0; block < (two ? 2u : 1u); ++block) {
      Sums high;
      if (high_blocks.num_words > 0) {
        MultiplyHighRows(weights, stride, tiles.high + block * block_words, high_blocks, high);
      }
      Finish(low[block], high_blocks.num_words > 0 ? &high : nullptr, x, block * kTileColumns,
             w.row_scales, row, step, y);
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

FIRESTEEL_AMX inline void StoreSums(Sums (&sums)[4]) {
  _tile_stored(0, sums[0].values, 64);
  _tile_stored(1, sums[1].values, 64);
  _tile_stored(2, sums[2].values, 64);
  _tile_stored(3, sums[3].values, 64);
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
// otherwise be waited for. Calls between() four times, for work of the vector units.
template <bool kIntegers, class BetweenFn>
FIRESTEEL_AMX void MultiplyPanel(const Panel& panel, const int32_t* x, const int32_t* x1,
                                 size_t ahead_begin, size_t ahead_end, const MatView& y,
                                 const BetweenFn& between, Sums (&sums)[4]) {
  const uint8_t* const lower =
      panel.num_rows > kTileRows ? panel.rows + kTileRows * panel.row_stride : panel.rows;
  size_t calls = 0;
  ZeroSums();
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
    for (; 5 * i >= (calls + 1) * panel.depth && calls < 4; ++calls) between();
  }
  for (; calls < 4; ++calls) between();
  StoreSums(sums);
}

// Sums of the tiles of the high plane that are listed. Requires the configuration of the panel.
FIRESTEEL_AMX void MultiplyHighPanel(const Panel& panel, const int32_t* x, const int32_t* x1,
                                     const HighBlocks& blocks, Sums (&sums)[4]) {
  const uint8_t* const lower =
      panel.num_rows > kTileRows ? panel.rows + kTileRows * panel.row_stride : panel.rows;
  ZeroSums();
  ForHighBlocks(blocks.words, blocks.num_words, [&](size_t i) FIRESTEEL_AMX {
    _tile_loadd(4, panel.rows + i * 64, panel.row_stride);
    _tile_loadd(6, x + i * kTileWordsTotal, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, x1 + i * kTileWordsTotal, 64);
    _tile_dpbssd(1, 4, 7);
    _tile_loadd(5, lower + i * 64, panel.row_stride);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  });
  StoreSums(sums);
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

constexpr size_t kPairTokens = 2 * kTileColumns;

// The sums of a panel with a pair of blocks of columns, and where they go.
struct PanelSums {
  Sums low[4];
  Sums high[4];  // of integers, if `any_high`
  bool any_high;
  size_t row;       // of the weights: the panel's first
  size_t num_rows;  // of the panel
  size_t begin;     // tokens
  size_t end;
  MatView y;  // of those tokens and rows
};

// What is to be made of the sums of 16 rows and a block of columns, tile 2 · half + block.
struct Integers {
  static constexpr bool kIntegers = true;

  FIRESTEEL_AMX void AddHigh(const Panel& panel, size_t pair, PanelSums& sums) const {
    const HighBlocks& blocks = high_blocks[pair];
    sums.any_high = blocks.num_words > 0;
    if (!sums.any_high) return;
    const size_t block_words = tiles.depth * kTileWordsTotal;
    const int32_t* const words = tiles.high + 2 * pair * block_words;
    MultiplyHighPanel(panel, words, words + block_words, blocks, sums.high);
  }

  FIRESTEEL_AMX void Scale(const PanelSums& sums, size_t half, size_t block,
                           __m512i (&rows)[16]) const {
    const size_t tile = 2 * half + block;
    const size_t token = sums.begin / kPairTokens * kPairTokens + block * kTileColumns;
    const size_t tokens = std::min(kTileColumns, sums.end - token);
    const auto valid = static_cast<__mmask16>((1u << tokens) - 1);
    const __m512 token_scales = _mm512_maskz_loadu_ps(valid, scales + token);
    const size_t count = std::min(kTileRows, sums.num_rows - half * kTileRows);
    for (size_t i = 0; i < 16; ++i) {
      __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums.low[tile].values[i]));
      if (sums.any_high) {
        const __m512 upper = _mm512_cvtepi32_ps(_mm512_load_si512(sums.high[tile].values[i]));
        sum = _mm512_fmadd_ps(upper, _mm512_set1_ps(256.0f), sum);
      }
      const float row_scale = i < count ? row_scales[sums.row + half * kTileRows + i] : 0.0f;
      const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(row_scale), token_scales);
      rows[i] = _mm512_castps_si512(_mm512_mul_ps(sum, scale));
    }
  }

  const TileColumns& tiles;
  const HighBlocks* high_blocks;  // of each pair of blocks of columns
  const float* scales;
  const float* row_scales;
};

struct Floats {
  static constexpr bool kIntegers = false;

  FIRESTEEL_AMX void AddHigh(const Panel& /*panel*/, size_t /*pair*/, PanelSums& /*sums*/) const {}
  FIRESTEEL_AMX void Scale(const PanelSums& sums, size_t half, size_t block,
                           __m512i (&rows)[16]) const {
    for (size_t i = 0; i < 16; ++i) {
      rows[i] = _mm512_load_si512(sums.low[2 * half + block].values[i]);
    }
  }
};

// Brings one of the four tiles of a panel's sums to y.
template <class Product>
FIRESTEEL_AMX void StoreTile(const Product& product, const PanelSums& sums, size_t tile) {
  const size_t half = tile / 2, block = tile % 2;
  const size_t block_first = sums.begin / kPairTokens * kPairTokens + block * kTileColumns;
  const size_t from = std::max(sums.begin, block_first);
  const size_t to = std::min(sums.end, block_first + kTileColumns);
  if (half * kTileRows >= sums.num_rows || from >= to) return;
  __m512i rows[16];
  product.Scale(sums, half, block, rows);
  StoreColumns(rows, std::min(kTileRows, sums.num_rows - half * kTileRows), from - block_first,
               to - block_first,
               {sums.y.Row(from - sums.begin) + half * kTileRows, 0, 0, sums.y.stride});
}

// Many tokens. A panel of weights is multiplied with all of a group of tokens before the next: it
// comes from memory once for them, and they stay in L2.
template <class Product>
FIRESTEEL_AMX void MultiplyMany(const Product& product, const TileColumns& tiles,
                                size_t token_begin, size_t token_end, const TypedView& w,
                                size_t row_begin, size_t row_end, const MatView& y) {
  constexpr size_t kGroupBytes = size_t{1280} << 10;
  const size_t row_stride = BytesOf(w.dtype, w.stride);
  // The activations may be longer than the weights: by what pads them, or by another matrix's part.
  const size_t depth = std::min(tiles.depth, row_stride / kAlignment);
  const size_t block_words = tiles.depth * kTileWordsTotal;
  const size_t group = std::max<size_t>(1, kGroupBytes / (2 * depth * 64 * kTileColumns));
  const size_t pairs_end = (token_end + kPairTokens - 1) / kPairTokens;
  size_t configured = kPanelRows;
  TileConfig config = ConfigOf(configured);
  _tile_loadconfig(&config);
  // While the matrix unit multiplies a panel with a pair of blocks, the vector units bring what
  // came of the one before to y.
  PanelSums turns[2];
  PanelSums* before = nullptr;
  size_t stored = 0;  // tiles of it
  const auto store_next = [&]() FIRESTEEL_AMX {
    if (before != nullptr) StoreTile(product, *before, stored++);
  };
  for (size_t first = token_begin / kPairTokens; first < pairs_end; first += group) {
    const size_t count = std::min(group, pairs_end - first);
    for (size_t row = row_begin; row < row_end; row += kPanelRows) {
      const Panel panel{w.RowBytes(row), row_stride, std::min(kPanelRows, row_end - row), depth};
      if (panel.num_rows != configured) {
        configured = panel.num_rows;
        config = ConfigOf(configured);
        _tile_loadconfig(&config);
      }
      for (size_t i = 0; i < count; ++i) {
        const size_t begin = std::max(token_begin, (first + i) * kPairTokens);
        const size_t end = std::min(token_end, (first + i + 1) * kPairTokens);
        const int32_t* const words = tiles.words + 2 * (first + i) * block_words;
        const MatView out{y.Row(begin) + row, end - begin, panel.num_rows, y.stride};
        PanelSums& sums = turns[before == turns ? 1 : 0];
        MultiplyPanel<Product::kIntegers>(panel, words, words + block_words, kPanelRows * i / count,
                                          kPanelRows * (i + 1) / count, out, store_next, sums.low);
        product.AddHigh(panel, first + i, sums);
        sums.row = row;
        sums.num_rows = panel.num_rows;
        sums.begin = begin;
        sums.end = end;
        sums.y = out;
        before = &sums;
        stored = 0;
      }
    }
  }
  for (size_t tile = 0; tile < 4; ++tile) store_next();
  _tile_release();
}

// Puts the columns [col_begin, col_end) of w in the order of right operands: [columns / 16, rows /
// 64, 16 groups of four rows, 16 columns, four rows], where 64 columns have the order that comes of
// interleaving bytes within 128 bits. Behind the last row it is repeated.
FIRESTEEL_AMX void Interleave(const TypedView& w, size_t col_begin, size_t col_end,
                              int8_t* scratch) {
  constexpr size_t kAheadRows = 32;
  const size_t depth = (w.rows + 63) / 64;
  const size_t tile_column = depth * kTileWordsTotal * sizeof(int32_t);
  for (size_t four = 0; four < 16 * depth; ++four) {
    const uint8_t* rows[4];
    for (size_t i = 0; i < 4; ++i) rows[i] = w.RowBytes(std::min(4 * four + i, w.rows - 1));
    for (size_t col = col_begin; col < col_end; col += 64) {
      __m512i r[4];
      for (size_t i = 0; i < 4; ++i) {
        const uint8_t* const ahead = rows[i] + col + kAheadRows * w.stride;
        _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T0);
        r[i] = _mm512_loadu_si512(rows[i] + col);
      }
      const __m512i low01 = _mm512_unpacklo_epi8(r[0], r[1]);
      const __m512i high01 = _mm512_unpackhi_epi8(r[0], r[1]);
      const __m512i low23 = _mm512_unpacklo_epi8(r[2], r[3]);
      const __m512i high23 = _mm512_unpackhi_epi8(r[2], r[3]);
      int8_t* const out = scratch + (col - col_begin) / 16 * tile_column + four * 64;
      _mm512_store_si512(out, _mm512_unpacklo_epi16(low01, low23));
      _mm512_store_si512(out + tile_column, _mm512_unpackhi_epi16(low01, low23));
      _mm512_store_si512(out + 2 * tile_column, _mm512_unpacklo_epi16(high01, high23));
      _mm512_store_si512(out + 3 * tile_column, _mm512_unpackhi_epi16(high01, high23));
    }
  }
}

// The sums of two blocks of columns for up to kAmxSumRows tokens, and where they go.
struct ColumnSums {
  Sums sums[4];
  size_t first;  // token
  size_t end;
  size_t col;
};

// Scales the sums of a quarter of the tokens and brings them to `out`.
FIRESTEEL_AMX void StoreQuarter(const ColumnSums& from, size_t quarter, const float* scales,
                                bool add, const MatView& out) {
  constexpr size_t kRows = kAmxSumRows / 4;
  for (size_t row = quarter * kRows; row < (quarter + 1) * kRows; ++row) {
    const size_t t = from.first + row;
    if (t >= from.end) return;
    const __m512 scale = _mm512_set1_ps(scales[t]);
    for (size_t half = 0; half < 2; ++half) {
      const Sums& tile = from.sums[row / kTileRows * 2 + half];
      float* const y = out.Row(t) + from.col + 16 * half;
      const __m512i exact = _mm512_load_si512(tile.values[row % kTileRows]);
      const __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), scale);
      _mm512_storeu_ps(y, add ? _mm512_add_ps(_mm512_loadu_ps(y), sum) : sum);
    }
  }
}

FIRESTEEL_AMX void SumColumns(const ByteRows& c, const TypedView& w, size_t col_begin,
                              size_t col_end, bool add, int8_t* scratch, const MatView& out) {
  const size_t depth = (w.rows + 63) / 64;
  const size_t tile_column = depth * kTileWordsTotal * sizeof(int32_t);
  Interleave(w, col_begin, col_end, scratch);
  const TileConfig config;
  _tile_loadconfig(&config);
  // As for panels: the vector units are one turn behind.
  ColumnSums turns[2];
  ColumnSums* before = nullptr;
  // 32 columns of weights stay in L1 while the tokens pass.
  for (size_t col = col_begin; col < col_end; col += 32) {
    const int8_t* const w0 = scratch + (col - col_begin) / 16 * tile_column;
    for (size_t first = 0; first < c.rows; first += kAmxSumRows) {
      const size_t end = std::min(first + kAmxSumRows, c.rows);
      const int8_t* const c0 = c.Row(first);
      size_t stored = 0;
      ZeroSums();
      for (size_t i = 0; i < depth; ++i) {
        for (size_t t = first + 4 * i; t < std::min(first + 4 * i + 4, end); ++t) {
          __builtin_prefetch(out.Row(t) + col, 1);
          __builtin_prefetch(out.Row(t) + col + 16, 1);
        }
        _tile_loadd(4, c0 + i * 64, c.stride);
        _tile_loadd(6, w0 + i * 1024, 64);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(7, w0 + tile_column + i * 1024, 64);
        _tile_dpbssd(1, 4, 7);
        _tile_loadd(5, c0 + kTileRows * c.stride + i * 64, c.stride);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
        for (; before != nullptr && stored < 4 && 5 * i >= (stored + 1) * depth; ++stored) {
          StoreQuarter(*before, stored, c.scales, add, out);
        }
      }
      for (; before != nullptr && stored < 4; ++stored) {
        StoreQuarter(*before, stored, c.scales, add, out);
      }
      before = before == turns ? turns + 1 : turns;
      StoreSums(before->sums);
      before->first = first;
      before->end = end;
      before->col = col;
    }
  }
  for (size_t i = 0; before != nullptr && i < 4; ++i) {
    StoreQuarter(*before, i, c.scales, add, out);
  }
  _tile_release();
}

// Puts the columns [col_begin, col_end) of w in the order of right operands: [columns / 32, rows /
// 32, two halves of 16 columns, 16 pairs of rows, 16 columns, two rows]. Behind the last row it is
// repeated.
FIRESTEEL_AMX void InterleavePairs(const TypedView& w, size_t col_begin, size_t col_end,
                                   int8_t* scratch) {
  constexpr size_t kAheadRows = 8;
  const size_t depth = (w.rows + 31) / 32;
  const size_t row_bytes = BytesOf(w.dtype, w.stride);
  for (size_t pair = 0; pair < 16 * depth; ++pair) {
    const uint8_t* const row0 = w.RowBytes(std::min(2 * pair, w.rows - 1));
    const uint8_t* const row1 = w.RowBytes(std::min(2 * pair + 1, w.rows - 1));
    int8_t* out = scratch + pair / 16 * 2 * kTileBytes + pair % 16 * 64;
    for (size_t col = col_begin; col < col_end; col += 32) {
      const size_t at = BytesOf(w.dtype, col);
      const auto load = [&](const uint8_t* row) FIRESTEEL_AMX {
        _mm_prefetch(reinterpret_cast<const char*>(row + at + kAheadRows * row_bytes), _MM_HINT_T1);
        return _mm512_loadu_si512(row + at);
      };
      StorePairs(load(row0), load(row1), out);
      out += depth * 2 * kTileBytes;
    }
  }
}

// Adds to a tile of sums for each of up to 32 tokens and 32 columns, which stay in `out` between
// blocks of rows. kLower: there are more than 16 tokens.
template <bool kLower>
FIRESTEEL_AMX void SumTile(const uint8_t* c, size_t c_stride, const int8_t* w, size_t depth,
                           bool add, float* out, size_t out_stride) {
  const size_t stride = out_stride * sizeof(float);
  float* const lower = out + kTileRows * out_stride;
  ZeroSums();
  if (add) {
    _tile_loadd(0, out, stride);
    _tile_loadd(1, out + kTileColumns, stride);
    if constexpr (kLower) {
      _tile_loadd(2, lower, stride);
      _tile_loadd(3, lower + kTileColumns, stride);
    }
  }
  for (size_t i = 0; i < depth; ++i) {
    _tile_loadd(4, c + i * 64, c_stride);
    _tile_loadd(6, w + 2 * i * kTileBytes, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + (2 * i + 1) * kTileBytes, 64);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kLower) {
      _tile_loadd(5, c + kTileRows * c_stride + i * 64, c_stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, stride);
  _tile_stored(1, out + kTileColumns, stride);
  if constexpr (kLower) {
    _tile_stored(2, lower, stride);
    _tile_stored(3, lower + kTileColumns, stride);
  }
}

FIRESTEEL_AMX void SumPairs(const TypedView& c, const TypedView& w, size_t col_begin,
                            size_t col_end, bool add, int8_t* scratch, const MatView& out) {
  InterleavePairs(w, col_begin, col_end, scratch);
  const size_t depth = (w.rows + 31) / 32;
  const size_t c_stride = BytesOf(c.dtype, c.stride);
  size_t configured = 0;
  TileConfig config;
  for (size_t col = col_begin; col < col_end; col += 32) {
    const int8_t* const panel = scratch + (col - col_begin) / 32 * depth * 2 * kTileBytes;
    for (size_t first = 0; first < c.rows; first += kAmxSumRows) {
      const size_t tokens = std::min(kAmxSumRows, c.rows - first);
      if (tokens != configured) {
        configured = tokens;
        config = ConfigOf(tokens);
        _tile_loadconfig(&config);
      }
      const size_t next = std::min(first + 2 * kAmxSumRows, c.rows);
      for (size_t t = first + kAmxSumRows; t < next; ++t) {
        __builtin_prefetch(out.Row(t) + col, 1);
        __builtin_prefetch(out.Row(t) + col + kTileColumns, 1);
      }
      const auto sum = tokens > kTileRows ? SumTile<true> : SumTile<false>;
      sum(c.RowBytes(first), c_stride, panel, depth, add, out.Row(first) + col, out.stride);
    }
  }
  _tile_release();
}

// Columns of bf16 as two vectors of floats: the even and the odd ones.
struct TwoHalves {
  __m512 even, odd;
};

// A tile product takes pairs of rows. It adds what the first row of each of its 16 pairs gives, and
// apart from that the second ones, each sum with one rounding a product; then it adds both sums,
// and that to what the tile held.
template <size_t kPairs>
FIRESTEEL_AMX void SumColumnsInTileOrder(const float* c, const uint32_t* active, size_t num,
                                         const TypedView& w, size_t first, size_t col, bool add,
                                         RowFetcher& fetcher, float* out) {
  constexpr size_t kTileRowsOfWeights = 2 * kTileWords;
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  const __m512i evens =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
  TwoHalves sums[kPairs], in_pair[2][kPairs];
  for (size_t i = 0; i < kPairs; ++i) {
    const float* const at = out + 32 * i;
    const __m512 zero = _mm512_setzero_ps();
    const __m512 a = add ? _mm512_loadu_ps(at) : zero, b = add ? _mm512_loadu_ps(at + 16) : zero;
    sums[i] = {_mm512_permutex2var_ps(a, evens, b), _mm512_permutex2var_ps(a, odds, b)};
  }
  const auto add_row = [&](size_t j, TwoHalves(&to)[kPairs]) FIRESTEEL_AMX {
    const auto* const row = w.RowBytes(active[j]) + col * sizeof(BF16);
    const __m512 coefficient = _mm512_set1_ps(c[j]);
    fetcher.Next();
    for (size_t i = 0; i < kPairs; ++i) {
      const __m512i both = _mm512_loadu_si512(row + 64 * i);
      const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
      const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(both, upper));
      to[i] = {_mm512_fmadd_ps(coefficient, even, to[i].even),
               _mm512_fmadd_ps(coefficient, odd, to[i].odd)};
    }
  };
  for (size_t j = 0; j < num;) {
    const size_t tile = (active[j] - first) / kTileRowsOfWeights;
    for (size_t i = 0; i < kPairs; ++i) {
      in_pair[0][i] = in_pair[1][i] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    }
    for (; j < num && (active[j] - first) / kTileRowsOfWeights == tile; ++j) {
      if ((active[j] - first) % 2 == 0) {
        add_row(j, in_pair[0]);
      } else {
        add_row(j, in_pair[1]);
      }
    }
    for (size_t i = 0; i < kPairs; ++i) {
      const TwoHalves &a = in_pair[0][i], &b = in_pair[1][i];
      sums[i] = {_mm512_add_ps(sums[i].even, _mm512_add_ps(a.even, b.even)),
                 _mm512_add_ps(sums[i].odd, _mm512_add_ps(a.odd, b.odd))};
    }
  }
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (size_t i = 0; i < kPairs; ++i) {
    float* const at = out + 32 * i;
    _mm512_storeu_ps(at, _mm512_permutex2var_ps(sums[i].even, low, sums[i].odd));
    _mm512_storeu_ps(at + 16, _mm512_permutex2var_ps(sums[i].even, high, sums[i].odd));
  }
}

FIRESTEEL_AMX void SumListedInTileOrder(const float* c, const uint32_t* active, size_t num,
                                        const TypedView& w, size_t first, size_t col_begin,
                                        size_t col_end, bool add, RowFetcher& fetcher, float* out) {
  constexpr unsigned kDenormalsAreZeros = 0x8040;  // inputs and results, as in tiles
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | kDenormalsAreZeros);
  size_t col = col_begin;
  for (; col + 128 <= col_end; col += 128) {
    SumColumnsInTileOrder<4>(c, active, num, w, first, col, add, fetcher, out + col);
  }
  for (; col < col_end; col += 32) {
    SumColumnsInTileOrder<1>(c, active, num, w, first, col, add, fetcher, out + col);
  }
  _mm_setcsr(before);
}

}  // namespace

bool AmxAvailable() {
  static const bool allowed = CpuAndSystemAllow();
  return allowed && (hwy::SupportedTargets() & HWY_AVX3_SPR) != 0;
}

void AmxMatMul(const QuantizedRows& x, const TileColumns& tiles, const TypedView& w,
               size_t row_begin, size_t row_end, const MatView& y) {
  if (x.rows >= kManyTokens) {
    std::vector<HighBlocks> high_blocks;
    for (size_t t = 0; t < x.rows; t += kPairTokens) high_blocks.emplace_back(x, t);
    const Integers product{tiles, high_blocks.data(), x.scales, w.row_scales};
    return MultiplyMany(product, tiles, 0, x.rows, w, row_begin, row_end, y);
  }
  const size_t end = MultiplyFew(x, tiles, w, row_begin, row_end, y);
  QuantizedMatMul(x, w, end, row_end, y);  // the same bits
}

void AmxMatMul(const TileColumns& tiles, size_t token_begin, size_t token_end, const TypedView& w,
               size_t row_begin, size_t row_end, const MatView& y) {
  MultiplyMany(Floats(), tiles, token_begin, token_end, w, row_begin, row_end, y);
}

void AmxSumColumns(const ByteRows& c, const TypedView& w, size_t col_begin, size_t col_end,
                   bool add, int8_t* scratch, const MatView& out) {
  HWY_DASSERT(w.dtype == DType::kI8 && w.rows <= c.stride && col_end <= w.stride);
  HWY_DASSERT(col_begin % kAlignment == 0 && col_end % kAlignment == 0);
  SumColumns(c, w, col_begin, col_end, add, scratch, out);
}

void AmxSumColumns(const TypedView& c, const TypedView& w, size_t col_begin, size_t col_end,
                   bool add, int8_t* scratch, const MatView& out) {
  HWY_DASSERT(w.dtype == DType::kBF16 && c.dtype == DType::kBF16);
  HWY_DASSERT(w.rows <= c.stride && col_end <= w.stride);
  HWY_DASSERT(col_begin % 32 == 0 && col_end % 32 == 0);
  HWY_DASSERT(col_end - col_begin <= kAmxPairCols);
  if (col_begin == col_end) return;
  constexpr size_t kTileRowsOfWeights = 2 * kTileWords;
  const size_t fit = kAmxPairBytes / ((col_end - col_begin) * sizeof(BF16));
  const size_t block = fit / kTileRowsOfWeights * kTileRowsOfWeights;
  for (size_t first = 0; first < w.rows; first += block) {
    TypedView rows = w;
    rows.data = w.RowBytes(first);
    rows.rows = std::min(block, w.rows - first);
    TypedView coefficients = c;
    coefficients.data = c.RowBytes(0) + BytesOf(DType::kBF16, first);
    SumPairs(coefficients, rows, col_begin, col_end, add || first > 0, scratch, out);
  }
}

void SumInTileOrder(const float* c, const uint32_t* active, size_t num, const TypedView& w,
                    size_t first, size_t col_begin, size_t col_end, bool add, RowFetcher& fetcher,
                    float* out) {
  HWY_DASSERT(w.dtype == DType::kBF16 && col_begin % 32 == 0 && col_end % 32 == 0);
  SumListedInTileOrder(c, active, num, w, first, col_begin, col_end, add, fetcher, out);
}

#else  // FIRESTEEL_HAVE_AMX

bool AmxAvailable() { return false; }
void AmxMatMul(const QuantizedRows&, const TileColumns&, const TypedView&, size_t, size_t,
               const MatView&) {}
void AmxMatMul(const TileColumns&, size_t, size_t, const TypedView&, size_t, size_t,
               const MatView&) {}
void AmxSumColumns(const ByteRows&, const TypedView&, size_t, size_t, bool, int8_t*,
                   const MatView&) {}
void AmxSumColumns(const TypedView&, const TypedView&, size_t, size_t, bool, int8_t*,
                   const MatView&) {}
void SumInTileOrder(const float*, const uint32_t*, size_t, const TypedView&, size_t, size_t, size_t,
                    bool, RowFetcher&, float*) {}

#endif

}  // namespace firesteel::kernels
