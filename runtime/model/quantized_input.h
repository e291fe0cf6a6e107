// Memory for activations that were rounded to integers.

#ifndef FIRESTEEL_RUNTIME_MODEL_QUANTIZED_INPUT_H_
#define FIRESTEEL_RUNTIME_MODEL_QUANTIZED_INPUT_H_

#include <cstddef>

#include "kernels/quantized.h"
#include "runtime/checkpoint/weights.h"

namespace firesteel {

/// Owns what kernels::QuantizedRows views. Movable. Writing distinct rows is thread-safe.
class QuantizedInput {
 public:
  QuantizedInput() = default;
  QuantizedInput(size_t rows, size_t cols) : rows_(rows), cols_(cols) {
    // Two planes, a nibble offset for four elements, three numbers a row; in an order that
    // keeps each aligned.
    plane_ = (cols + kernels::kQuantizedPadding - 1) / kernels::kQuantizedPadding *
             kernels::kQuantizedPadding;
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

 private:
  Matrix memory_;
  size_t rows_ = 0;
  size_t cols_ = 0;
  size_t plane_ = 0;
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_MODEL_QUANTIZED_INPUT_H_
