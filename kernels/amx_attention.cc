#include "kernels/amx_attention.h"

#include "hwy/base.h"
#include "kernels/amx-inl.h"

namespace firesteel::kernels {

#if FIRESTEEL_HAVE_AMX
namespace {

constexpr size_t kTileDims = 2 * kTileWords;
static_assert(kKvBlockTokens == 2 * kTileColumns && kTileQueries == 2 * kTileRows);

FIRESTEEL_AMX void Split(const float* x, size_t n, BF16* high, BF16* low) {
  for (size_t i = 0; i < n; i += 16) {
    const auto valid = static_cast<__mmask16>(n - i < 16 ? (1u << (n - i)) - 1 : 0xFFFFu);
    const __m512 values = _mm512_maskz_loadu_ps(valid, x + i);
    // C's casts: these vectors are of one size, and a call would need AVX of its own.
    const auto upper = (__m256i)_mm512_cvtneps_pbh(values);
    const __m512 rounded = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(upper), 16));
    const __m512 rest = _mm512_sub_ps(values, rounded);
    const auto lower = (__m256i)_mm512_cvtneps_pbh(rest);
    _mm256_mask_storeu_epi16(high + i, valid, upper);
    _mm256_mask_storeu_epi16(low + i, valid, lower);
  }
}

// The tiles: 0 and 1 sums of the first 16 queries with one and the other half of a pair of right
// operands, 2 and 3 those of the other queries; 4 and 5 factors, 6 and 7 right operands.
FIRESTEEL_AMX inline void AddProducts(const BF16* x, size_t stride) {
  _tile_loadd(4, x, stride * sizeof(BF16));
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(5, x + kTileRows * stride, stride * sizeof(BF16));
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// The products of a pair of tiles, one behind the other, with columns of x.
FIRESTEEL_AMX inline void AddSplitProducts(const SplitRows& x, size_t column,
                                           const std::byte* tiles) {
  _tile_loadd(6, tiles, 64);
  _tile_loadd(7, tiles + kTileBytes, 64);
  AddProducts(x.high + column, x.stride);
  AddProducts(x.low + column, x.stride);
}

FIRESTEEL_AMX inline void StoreSums(const MatView& out, size_t column) {
  const size_t stride = out.stride * sizeof(float);
  _tile_stored(0, out.Row(0) + column, stride);
  _tile_stored(1, out.Row(0) + column + kTileColumns, stride);
  _tile_stored(2, out.Row(kTileRows) + column, stride);
  _tile_stored(3, out.Row(kTileRows) + column + kTileColumns, stride);
}

FIRESTEEL_AMX void Dots(const SplitRows& x, const std::byte* tiles, size_t blocks, size_t dims,
                        const MatView& out) {
  const TileConfig config;
  _tile_loadconfig(&config);
  for (size_t block = 0; block < blocks; ++block) {
    ZeroSums();
    for (size_t dim = 0; dim < dims; dim += kTileDims) {
      AddSplitProducts(x, dim, tiles);
      tiles += 2 * kTileBytes;
    }
    StoreSums(out, block * kKvBlockTokens);
  }
  _tile_release();
}

FIRESTEEL_AMX void Values(const SplitRows& x, const std::byte* tiles, size_t blocks, size_t dims,
                          const MatView& out) {
  const TileConfig config;
  _tile_loadconfig(&config);
  for (size_t column = 0; column < dims; column += 2 * kTileColumns) {
    ZeroSums();
    for (size_t block = 0; block < blocks; ++block) {
      const std::byte* const values = tiles + block * BlockTileBytes(dims);
      AddSplitProducts(x, block * kKvBlockTokens, values + column / kTileColumns * kTileBytes);
    }
    StoreSums(out, column);
  }
  _tile_release();
}

// [dims / 32, halves of the positions, 16 pairs of dimensions, 16 positions], each a word of two
// neighbouring dimensions. A row of the block's predictor keys has slots s and s + 16 in a word.
FIRESTEEL_AMX void TilePredictor(const AttentionShape& shape, const std::byte* block,
                                 std::byte* out) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  constexpr size_t kRowBytes = kKvBlockTokens * sizeof(BF16);
  for (size_t pair = 0; pair < shape.predictor_dim / 2; ++pair) {
    const __m512i even = _mm512_loadu_si512(block + 2 * pair * kRowBytes);
    const __m512i odd = _mm512_loadu_si512(block + (2 * pair + 1) * kRowBytes);
    std::byte* const to = out + pair / kTileWords * 2 * kTileBytes + pair % kTileWords * 64;
    _mm512_store_si512(
        to, _mm512_or_si512(_mm512_andnot_si512(upper, even), _mm512_slli_epi32(odd, 16)));
    _mm512_store_si512(to + kTileBytes,
                       _mm512_or_si512(_mm512_srli_epi32(even, 16), _mm512_and_si512(upper, odd)));
  }
}

// The same order, of keys that lie one behind the other.
FIRESTEEL_AMX void TileRest(const AttentionShape& shape, const std::byte* block, std::byte* out) {
  const size_t dims = shape.head_dim - shape.predictor_dim;
  const std::byte* const keys = block + kKvBlockTokens * shape.predictor_dim * sizeof(BF16);
  for (size_t dim = 0; dim < dims; dim += kTileDims) {
    for (size_t half = 0; half < 2; ++half) {
      __m512i rows[16], columns[16];
      for (size_t i = 0; i < 16; ++i) {
        const size_t slot = half * kTileColumns + i;
        rows[i] = _mm512_loadu_si512(keys + (slot * dims + dim) * sizeof(BF16));
      }
      Transpose(rows, columns);
      for (size_t i = 0; i < 16; ++i) _mm512_store_si512(out + i * 64, columns[i]);
      out += kTileBytes;
    }
  }
}

// [dims / 16, 16 pairs of positions, 16 columns], each a word of two neighbouring positions.
FIRESTEEL_AMX void TileValueRows(const AttentionShape& shape, const std::byte* block, size_t slots,
                                 std::byte* out) {
  const size_t dims = shape.head_dim;
  const std::byte* const values = block + kKvBlockTokens * dims * sizeof(BF16);
  for (size_t pair = 0; pair < kTileWords; ++pair) {
    const std::byte* const row = values + 2 * pair * dims * sizeof(BF16);
    for (size_t dim = 0; dim < dims; dim += kTileDims) {
      const auto load = [&](size_t slot) FIRESTEEL_AMX {
        return slot < slots ? _mm512_loadu_si512(row + ((slot & 1) * dims + dim) * sizeof(BF16))
                            : _mm512_setzero_si512();
      };
      StorePairs(load(2 * pair), load(2 * pair + 1),
                 out + dim / kTileColumns * kTileBytes + pair * 64);
    }
  }
}

}  // namespace

void SplitToBF16(const float* x, size_t n, BF16* high, BF16* low) { Split(x, n, high, low); }
void TilePredictorKeys(const AttentionShape& shape, const std::byte* block, std::byte* out) {
  HWY_DASSERT(shape.kv_dtype == DType::kBF16 && shape.predictor_dim % kTileDims == 0);
  TilePredictor(shape, block, out);
}
void TileRestOfKeys(const AttentionShape& shape, const std::byte* block, std::byte* out) {
  HWY_DASSERT(shape.kv_dtype == DType::kBF16 && shape.head_dim % kTileDims == 0);
  TileRest(shape, block, out);
}
void TileValues(const AttentionShape& shape, const std::byte* block, size_t slots, std::byte* out) {
  HWY_DASSERT(shape.kv_dtype == DType::kBF16 && shape.head_dim % kTileDims == 0);
  TileValueRows(shape, block, slots, out);
}
void AmxDots(const SplitRows& x, const std::byte* tiles, size_t blocks, size_t dims,
             const MatView& out) {
  Dots(x, tiles, blocks, dims, out);
}
void AmxValues(const SplitRows& x, const std::byte* tiles, size_t blocks, size_t dims,
               const MatView& out) {
  Values(x, tiles, blocks, dims, out);
}

#else  // FIRESTEEL_HAVE_AMX

void SplitToBF16(const float*, size_t, BF16*, BF16*) {}
void TilePredictorKeys(const AttentionShape&, const std::byte*, std::byte*) {}
void TileRestOfKeys(const AttentionShape&, const std::byte*, std::byte*) {}
void TileValues(const AttentionShape&, const std::byte*, size_t, std::byte*) {}
void AmxDots(const SplitRows&, const std::byte*, size_t, size_t, const MatView&) {}
void AmxValues(const SplitRows&, const std::byte*, size_t, size_t, const MatView&) {}

#endif

}  // namespace firesteel::kernels
