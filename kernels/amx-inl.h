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

/// Words of a whole tile.
inline constexpr size_t kTileWordsTotal = kTileWords * kTileColumns;

/// The operand of ldtilecfg: eight tiles of up to 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

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
