// Memory for activations that were rounded to integers.

#ifndef FIRESTEEL_RUNTIME_MODEL_QUANTIZED_INPUT_H_
#define FIRESTEEL_RUNTIME_MODEL_QUANTIZED_INPUT_H_

#include <cstddef>

#include "kernels/amx.h"
#include "kernels/quantized.h"
#include "runtime/checkpoint/weights.h"

namespace firesteel {

/// Owns what kernels::QuantizedRows views and, where asked for, the same in the order of AMX tiles.
/// Movable. Writing distinct rows is thread-safe.
class QuantizedInput {
 public:
  QuantizedInput() = default;
  /// The first `tiled_rows` rows may be put in tiles.
  QuantizedInput(size_t rows, size_t cols, size_t tiled_rows) : rows_(rows), cols_(cols) {
    // Two planes, a nibble offset for four elements, three numbers a row; in an order that
    // keeps each aligned.
    plane_ = (cols + kernels::kQuantizedPadding - 1) / kernels::kQuantizedPadding *
             kernels::kQuantizedPadding;
    tiles_ = Matrix(1, kernels::TileColumns::Words(2 * tiled_rows, plane_ / 4) * sizeof(int32_t),
                    kernels::DType::kI8);
    memory_ = Matrix(1, rows * (3 * plane_ + 3 * sizeof(float)), kernels::DType::kI8);
  }

  kernels::QuantizedRows view() {
    auto* const planes = static_cast<int8_t*>(memory_.MutableRow(0));
    auto* const offsets = reinterpret_cast<int32_t*>(planes + rows_ * 2 * plane_);
    int32_t* const high_sums = offsets + rows_ * plane_ / 4;
    int32_t* const low_sums = high_sums + rows_;
    auto* const scales = reinterpret_cast<float*>(low_sums + rows_);
    return {planes, offsets, scales, high_sums, low_sums, rows_, cols_, plane_};
  }

  kernels::TileColumns tiles() {
    return {static_cast<int32_t*>(tiles_.MutableRow(0)), plane_ / kernels::kAlignment};
  }

  /// Copies a row that was rounded, one of `num_rows`, to its columns of the tiles.
  void Tile(size_t row, size_t num_rows) {
    kernels::SetTileColumns(view(), row, num_rows, tiles());
  }

 private:
  Matrix memory_;
  Matrix tiles_;
  size_t rows_ = 0;
  size_t cols_ = 0;
  size_t plane_ = 0;
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_MODEL_QUANTIZED_INPUT_H_
