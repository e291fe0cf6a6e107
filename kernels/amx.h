// Products of a few tokens with 8-bit weights on AMX, the matrix unit of Intel's server CPUs.
//
// Weights are read where they are, row by row, as the left operand; what is brought into the order
// that the unit wants is the activations, once for all matrices that read them. So a batch that
// decodes takes hardly longer than one sequence. (Prompts are another matter: there, packing blocks
// of the weights pays, see runtime/gemm.)

#ifndef FIRESTEEL_KERNELS_AMX_H_
#define FIRESTEEL_KERNELS_AMX_H_

#include <cstddef>
#include <cstdint>

#include "kernels/quantized.h"
#include "kernels/tensor.h"

namespace firesteel::kernels {

/// Columns of a tile: two planes of 8 tokens.
inline constexpr size_t kTileColumns = 16;
/// Four-byte words (neighbours along k) of a tile's column.
inline constexpr size_t kTileWords = 16;

/// Activations in the order of tiles: [columns / kTileColumns, words / kTileWords, kTileWords,
/// kTileColumns], zeros where a column ends within a tile. Memory of somebody else.
struct TileColumns {
  int32_t* words = nullptr;
  size_t depth = 0;  // tiles along k

  /// Words that `columns` columns of `words` words each need.
  static size_t Words(size_t columns, size_t words) {
    return (columns + kTileColumns - 1) / kTileColumns * kTileColumns *
           ((words + kTileWords - 1) / kTileWords * kTileWords);
  }
};

/// Whether the CPU has AMX with int8, the operating system lets this process use it, and
/// the SIMD target in use is the one of such CPUs. Thread-safe.
bool AmxAvailable();

/// Writes `count` words to one column, and zeros behind them to the end of its last tile.
/// Thread-safe for distinct columns.
void SetTileColumn(const TileColumns& tiles, size_t column, const int32_t* words, size_t count);

/// y[t, n] for every row t of x and for n in [row_begin, row_end), with the bits of
/// QuantizedMatMul. w kI8; `tiles` holds the planes of x: row t's high one in column 2t, its low
/// one in column 2t + 1. Requires AmxAvailable(). Thread-safe for disjoint row ranges of one y.
void AmxMatMul(const QuantizedRows& x, const TileColumns& tiles, const TypedView& w,
               size_t row_begin, size_t row_end, const MatView& y);

}  // namespace firesteel::kernels

#endif  // FIRESTEEL_KERNELS_AMX_H_
