// Products of tokens with 8-bit weights on AMX, the matrix unit of Intel's server CPUs.
//
// Weights are read where they are, row by row, as the left operand; what is brought into the order
// that the unit wants is the activations, once for all matrices that read them. So a batch that
// decodes takes hardly longer than one sequence, and a prompt needs no packed copy of the weights.

#ifndef FIRESTEEL_KERNELS_AMX_H_
#define FIRESTEEL_KERNELS_AMX_H_

#include <cstddef>
#include <cstdint>

#include "kernels/quantized.h"
#include "kernels/tensor.h"

namespace firesteel::kernels {

/// Columns of a tile: a plane of a token each.
inline constexpr size_t kTileColumns = 16;
/// Four-byte words (neighbours along k) of a tile's column.
inline constexpr size_t kTileWords = 16;

/// Activations in the order of tiles: [columns / kTileColumns, words / kTileWords, kTileWords,
/// kTileColumns], zeros where a column ends within a tile. Memory of somebody else.
struct TileColumns {
  int32_t* words = nullptr;
  size_t depth = 0;  // tiles along k

  /// Words that `tokens` tokens need, whose planes have `words` words each.
  static size_t Words(size_t tokens, size_t words) {
    return (tokens + kTileColumns - 1) / kTileColumns * 2 * kTileColumns *
           ((words + kTileWords - 1) / kTileWords * kTileWords);
  }
};

/// Whether the CPU has AMX with int8, the operating system lets this process use it, and
/// the SIMD target in use is the one of such CPUs. Thread-safe.
bool AmxAvailable();

/// Writes the planes of a row of x to its columns, in the order of a product of `num_rows` rows.
/// Thread-safe for distinct rows.
void SetTileColumns(const QuantizedRows& x, size_t row, size_t num_rows, const TileColumns& tiles);

/// y[t, n] for every row t of x and for n in [row_begin, row_end), with the bits of
/// QuantizedMatMul. w kI8; `tiles` holds the x.rows rows of x. Requires AmxAvailable(). Thread-safe
/// for disjoint row ranges of one y.
void AmxMatMul(const QuantizedRows& x, const TileColumns& tiles, const TypedView& w,
               size_t row_begin, size_t row_end, const MatView& y);

}  // namespace firesteel::kernels

#endif  // FIRESTEEL_KERNELS_AMX_H_
