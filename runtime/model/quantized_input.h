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
    // Planes high and low, a nibble offset for four elements, three numbers a row; in an order that
    // keeps each aligned.
    stride_ = (cols + kernels::kQuantizedPadding - 1) / kernels::kQuantizedPadding *
              kernels::kQuantizedPadding;
    memory_ = Matrix(1, rows * (3 * stride_ + 3 * sizeof(float)), kernels::DType::kI8);
  }

  kernels::QuantizedRows view() {
    auto* const high = static_cast<int8_t*>(memory_.MutableRow(0));
    int8_t* const low = high + rows_ * stride_;
    auto* const offsets = reinterpret_cast<int32_t*>(low + rows_ * stride_);
    int32_t* const high_sums = offsets + rows_ * stride_ / 4;
    int32_t* const low_sums = high_sums + rows_;
    auto* const scales = reinterpret_cast<float*>(low_sums + rows_);
    return {high, low, offsets, scales, high_sums, low_sums, rows_, cols_, stride_};
  }

 private:
  Matrix memory_;
  size_t rows_ = 0;
  size_t cols_ = 0;
  size_t stride_ = 0;
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_MODEL_QUANTIZED_INPUT_H_
