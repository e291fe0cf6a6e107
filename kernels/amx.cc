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

void SetTileColumn(const TileColumns& tiles, size_t column, const int32_t* words, size_t count) {
  constexpr size_t kTile = kTileWords * kTileColumns;
  int32_t* out = tiles.words + column / kTileColumns * tiles.depth * kTile + column % kTileColumns;
  for (size_t i = 0; i < count; ++i) out[i * kTileColumns] = words[i];
  const size_t padded = (count + kTileWords - 1) / kTileWords * kTileWords;
  for (size_t i = count; i < padded; ++i) out[i * kTileColumns] = 0;
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
FIRESTEEL_AMX void Transpose(const int32_t (*in)[kTileColumns], int32_t (*out)[kTileRows]) {
  __m512i a[16], b[16];
  for (size_t i = 0; i < 16; ++i) a[i] = _mm512_load_si512(in[i]);
  for (size_t i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
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
    _mm512_store_si512(out[c], _mm512_shuffle_i32x4(low02, high02, 0x88));
    _mm512_store_si512(out[4 + c], _mm512_shuffle_i32x4(low13, high13, 0x88));
    _mm512_store_si512(out[8 + c], _mm512_shuffle_i32x4(low02, high02, 0xDD));
    _mm512_store_si512(out[12 + c], _mm512_shuffle_i32x4(low13, high13, 0xDD));
  }
}

// Scales the sums of a tile, whose rows are row, row + step, row + 2 · step …, for up to 8 tokens
// from `first` on.
FIRESTEEL_AMX void Finish(const Sums& sums, const QuantizedRows& x, size_t first,
                          const float* row_scales, size_t row, size_t step, const MatView& y) {
  Sums columns;
  Transpose(sums.values, columns.values);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i offsets = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(step)));
  const __m512 scales = _mm512_i32gather_ps(offsets, row_scales + row, sizeof(float));
  const size_t tokens = std::min(kTileColumns / 2, x.rows - first);
  for (size_t i = 0; i < tokens; ++i) {
    const __m512 high = _mm512_cvtepi32_ps(_mm512_load_si512(columns.values[2 * i]));
    const __m512 low = _mm512_cvtepi32_ps(_mm512_load_si512(columns.values[2 * i + 1]));
    const __m512 product = _mm512_fmadd_ps(high, _mm512_set1_ps(256.0f), low);
    const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(x.scales[first + i]));
    _mm512_i32scatter_ps(y.Row(first + i) + row, offsets, _mm512_mul_ps(product, scale),
                         sizeof(float));
  }
}

}  // namespace

bool AmxAvailable() {
  static const bool allowed = CpuAndSystemAllow();
  return allowed && (hwy::SupportedTargets() & HWY_AVX3_SPR) != 0;
}

FIRESTEEL_AMX void AmxMatMul(const QuantizedRows& x, const TileColumns& tiles, const TypedView& w,
                             size_t row_begin, size_t row_end, const MatView& y) {
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
  QuantizedMatMul(x, w, row_begin + step * kTileRows, row_end, y);  // the same bits
}

#else  // FIRESTEEL_HAVE_AMX

bool AmxAvailable() { return false; }
void AmxMatMul(const QuantizedRows&, const TileColumns&, const TypedView&, size_t, size_t,
               const MatView&) {}

#endif

}  // namespace firesteel::kernels
