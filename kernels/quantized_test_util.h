// Activations for tests of integer kernels.

#ifndef FIRESTEEL_KERNELS_QUANTIZED_TEST_UTIL_H_
#define FIRESTEEL_KERNELS_QUANTIZED_TEST_UTIL_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/quantized.h"
#include "kernels/test_util.h"

namespace firesteel::kernels {

/// Room for rounded activations between guards. The padding of planes is filled with −1 at first.
class GuardedRows {
 public:
  GuardedRows(size_t rows, size_t cols)
      : memory_((QuantizedRows::Bytes(rows, cols) + sizeof(uint64_t) - 1) / sizeof(uint64_t)),
        view_(QuantizedRows::Place(memory_.data(), rows, cols)) {}
  const QuantizedRows& view() const { return view_; }
  bool GuardsIntact() { return memory_.GuardsIntact(); }

  /// The value that row and column stand for.
  double At(size_t row, size_t col) const {
    return static_cast<double>(view_.scales[row]) *
           (256.0 * view_.High(row)[col] + view_.Low(row)[col]);
  }

 private:
  Guarded<uint64_t> memory_;
  QuantizedRows view_;
};

/// Values of which some are too large for a byte if the others are to be told apart, in one block
/// of three.
inline std::vector<float> FloatsWithOutliers(Random& random, size_t n) {
  std::vector<float> x = random.Floats(n);
  for (size_t i = 0; i < n; ++i) {
    if (i / kHighBlock % 3 == 0 && random.Below(20) == 0) x[i] *= 30.0f;
  }
  return x;
}

}  // namespace firesteel::kernels

#endif  // FIRESTEEL_KERNELS_QUANTIZED_TEST_UTIL_H_
