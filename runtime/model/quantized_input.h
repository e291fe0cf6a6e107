// Memory for activations that were rounded to integers.

#ifndef FIRESTEEL_RUNTIME_MODEL_QUANTIZED_INPUT_H_
#define FIRESTEEL_RUNTIME_MODEL_QUANTIZED_INPUT_H_

#include <cstddef>
#include <cstdint>
#include <vector>

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
    memory_ = Matrix(1, kernels::QuantizedRows::Bytes(rows, cols), kernels::DType::kI8);
    const size_t words = kernels::TileColumns::Words(tiled_rows, view().plane / sizeof(int32_t));
    tiles_ = Matrix(2, words * sizeof(int32_t), kernels::DType::kI8);
    high_blocks_.resize(tiled_rows * view().HighWords());
  }

  kernels::QuantizedRows view() {
    return kernels::QuantizedRows::Place(memory_.MutableRow(0), rows_, cols_);
  }

  kernels::TileColumns tiles() {
    return {static_cast<int32_t*>(tiles_.MutableRow(0)), view().plane / kernels::kAlignment,
            static_cast<int32_t*>(tiles_.MutableRow(1)), high_blocks_.data()};
  }

  /// Copies a row that was rounded to its column of the tiles.
  void Tile(size_t row) { kernels::SetTileColumn(view(), row, tiles()); }

 private:
  Matrix memory_;
  Matrix tiles_;
  std::vector<uint64_t> high_blocks_;
  size_t rows_ = 0;
  size_t cols_ = 0;
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_MODEL_QUANTIZED_INPUT_H_
