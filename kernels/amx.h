// Products of tokens with weights of 8 bits or in bf16 on AMX, the matrix unit of Intel's server
// CPUs.
//
// Weights are read where they are, row by row, as the left operand; what is brought into the order
// that the unit wants is the activations, once for all matrices that read them. So a batch that
// decodes takes hardly longer than one sequence, and a prompt needs no packed copy of the weights.

#ifndef FIRESTEEL_KERNELS_AMX_H_
#define FIRESTEEL_KERNELS_AMX_H_

#include <cstddef>
#include <cstdint>

#include "kernels/integer_rows.h"
#include "kernels/quantized.h"
#include "kernels/row_fetcher.h"
#include "kernels/tensor.h"

namespace firesteel::kernels {

/// Columns of a tile: a token each.
inline constexpr size_t kTileColumns = 16;
/// Four-byte words of a tile's column: four bytes or two bf16, neighbours along k.
inline constexpr size_t kTileWords = 16;

/// Activations in the order of tiles: [columns / kTileColumns, words / kTileWords, kTileWords,
/// kTileColumns], zeros where a column ends within a tile. Memory of somebody else.
struct TileColumns {
  int32_t* words = nullptr;         // integers: the low plane
  size_t depth = 0;                 // tiles along k
  int32_t* high = nullptr;          // integers: the high plane in the same order
  uint64_t* high_blocks = nullptr;  // [columns, HighWords()]: bits of the tiles along k in which a
                                    // column of `high` may be not zero

  size_t HighWords() const { return (depth + 63) / 64; }
  /// The columns from `first` on, a multiple of kTileColumns.
  TileColumns From(size_t first) const {
    const size_t offset = first * depth * kTileWords;
    if (high == nullptr) return {words + offset, depth};
    return {words + offset, depth, high + offset, high_blocks + first * HighWords()};
  }
  /// Tiles along k for columns of `words` words.
  static size_t Depth(size_t words) { return (words + kTileWords - 1) / kTileWords; }
  /// Memory that `columns` columns of `words` words each need: tiles go in pairs.
  static size_t Words(size_t columns, size_t words) {
    return (columns + 2 * kTileColumns - 1) / (2 * kTileColumns) * 2 * kTileColumns *
           (Depth(words) * kTileWords);
  }
};

/// Whether the CPU has AMX with int8 and bf16, the operating system lets this process use it, and
/// the SIMD target in use is the one of such CPUs. Thread-safe.
bool AmxAvailable();

/// Writes both planes of a row of x to the column of its number; of the high plane, which most
/// blocks do not have, what is not zero or was not. Thread-safe for distinct rows.
void SetTileColumn(const QuantizedRows& x, size_t row, const TileColumns& tiles);

/// Writes x [cols], padded with anything to a multiple of kAlignment bytes, to a column.
/// Thread-safe for distinct columns.
void SetTileColumn(const BF16* x, size_t cols, size_t column, const TileColumns& tiles);

/// y[t, n] for every row t of x and for n in [row_begin, row_end), with the bits of
/// QuantizedMatMul. w kI8; `tiles` holds the x.rows rows of x. Requires AmxAvailable(). Thread-safe
/// for disjoint row ranges of one y.
void AmxMatMul(const QuantizedRows& x, const TileColumns& tiles, const TypedView& w,
               size_t row_begin, size_t row_end, const MatView& y);

/// y[t, n] = Σ_k x_t[k] · w[n, k] in f32 for tokens t in [token_begin, token_end), each of them a
/// column of `tiles`, and for n in [row_begin, row_end).
///
/// w kBF16, its rows padded with zeros to kAlignment bytes; the columns may be longer than its
/// rows. Bits depend on x_t, w[n, :] and the number of columns of w alone, and are not those of
/// MatMul; denormals count as zero. Requires AmxAvailable(). Thread-safe for disjoint row ranges of
/// one y.
void AmxMatMul(const TileColumns& tiles, size_t token_begin, size_t token_end, const TypedView& w,
               size_t row_begin, size_t row_end, const MatView& y);

/// Rows of memory that AmxSumColumns reads together.
inline constexpr size_t kAmxSumRows = 2 * kTileColumns;
/// Bytes of scratch that AmxSumColumns needs for `rows` rows of weights in 8 bits and `cols`
/// columns.
constexpr size_t AmxSumBytes(size_t rows, size_t cols) {
  return (rows + kAlignment - 1) / kAlignment * kAlignment * cols;
}
/// The same for any rows in bf16, and at most kAmxPairCols columns: what a core brings into the
/// order of tiles at a time stays in its L2 cache, as do the sums of some hundred tokens beside it.
inline constexpr size_t kAmxPairBytes = size_t{504} << 10;
inline constexpr size_t kAmxPairCols = kAmxPairBytes / (2 * kTileWords * sizeof(BF16));

/// Sums of weighted rows for many tokens, whether their coefficients are zero or not: out[t, i] =
/// or (if `add`) += Σ_j c[t, j] · w[j, i] for every row t of c and for i in [col_begin, col_end),
/// multiples of kAlignment, with the bits and in the order of columns of SumIntegerColumns.
///
/// w kI8 [F, D] in rows that are padded to kAlignment bytes; c.stride ≥ F. There is memory behind c
/// for as many rows as make a multiple of kAmxSumRows. `scratch` [AmxSumBytes(F, col_end −
/// col_begin)], aligned to kAlignment. Requires AmxAvailable(). Thread-safe for disjoint columns of
/// one out.
void AmxSumColumns(const ByteRows& c, const TypedView& w, size_t col_begin, size_t col_end,
                   bool add, int8_t* scratch, const MatView& out);

/// The same for bf16: c [R, F] and w [F, D] kBF16, in rows that are padded to kAlignment bytes,
/// those of c with zeros; col_begin and col_end are multiples of kAlignment / 2. Columns stay in
/// their order. Bits depend on a row of c and on w alone, which is finite; denormals count as zero.
void AmxSumColumns(const TypedView& c, const TypedView& w, size_t col_begin, size_t col_end,
                   bool add, int8_t* scratch, const MatView& out);

/// The same sums, to the bit, for one token, of those rows alone whose coefficients are not zero:
/// out[i] = or (if `add`) += Σ_j c[j] · w[active[j], i] for i in [col_begin, col_end). c [num] are
/// bf16 as floats; active [num] are rows of w, rising, of which `first` began the matrix that the
/// tiles were cut from. For a few tokens, which need few of the rows. Does on the vector units what
/// TDPBF16PS is documented to do (Intel's manual), in the same order. Asks `fetcher` for as many
/// lines as it reads. Thread-safe for disjoint columns.
void SumInTileOrder(const float* c, const uint32_t* active, size_t num, const TypedView& w,
                    size_t first, size_t col_begin, size_t col_end, bool add, RowFetcher& fetcher,
                    float* out);

}  // namespace firesteel::kernels

#endif  // FIRESTEEL_KERNELS_AMX_H_
