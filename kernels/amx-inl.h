// What all code for AMX needs: included by its .cc files only.

#ifndef FIRESTEEL_KERNELS_AMX_INL_H_
#define FIRESTEEL_KERNELS_AMX_INL_H_

#include <cstddef>
#include <cstdint>

#include "hwy/detect_compiler_arch.h"
#include "kernels/amx.h"

#if HWY_ARCH_X86_64 && defined(__linux__)
#include <immintrin.h>
#define FIRESTEEL_HAVE_AMX 1
#define FIRESTEEL_AMX                                                                    \
  __attribute__((                                                                        \
      target("amx-tile,amx-int8,amx-bf16,avx512f,avx512bf16,avx512bw,avx512dq,avx512vl," \
             "avx512vnni,avx2,fma,prfchw")))
#else
#define FIRESTEEL_HAVE_AMX 0
#endif

#if FIRESTEEL_HAVE_AMX
namespace firesteel::kernels {

/// Rows of a tile.
inline constexpr size_t kTileRows = 16;
/// Words and bytes of a whole tile.
inline constexpr size_t kTileWordsTotal = kTileWords * kTileColumns;
inline constexpr size_t kTileBytes = kTileWordsTotal * sizeof(int32_t);

/// The operand of ldtilecfg: eight tiles of up to 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

/// The four tiles that sums are collected in.
FIRESTEEL_AMX inline void ZeroSums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

/// Interleaves 32 columns of two rows of bf16: pairs of the first 16 columns to `out`, those of the
/// others to the same row of the next tile.
FIRESTEEL_AMX inline void StorePairs(__m512i even, __m512i odd, void* out) {
  const __m512i upper = _mm512_set1_epi32(16 << 16 | 16);
  const __m512i columns = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  // A word's lower half is an element of the first row, its upper half that of the second one.
  const __m512i first = _mm512_or_si512(
      columns, _mm512_slli_epi32(_mm512_add_epi32(columns, _mm512_set1_epi32(32)), 16));
  const __m512i second = _mm512_add_epi16(first, upper);
  auto* const to = static_cast<uint8_t*>(out);
  _mm512_store_si512(to, _mm512_permutex2var_epi16(even, first, odd));
  _mm512_store_si512(to + kTileBytes, _mm512_permutex2var_epi16(even, second, odd));
}

/// out[c][r] = in[r][c].
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

}  // namespace firesteel::kernels
#endif  // FIRESTEEL_HAVE_AMX

#endif  // FIRESTEEL_KERNELS_AMX_INL_H_
