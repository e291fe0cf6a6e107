// What a draw from a whole vocabulary needs of its logits: the largest, and the weights that they
// give at a temperature.
//
// Bits depend on the values, n and the SIMD target only.

#ifndef FIRESTEEL_KERNELS_CATEGORICAL_H_
#define FIRESTEEL_KERNELS_CATEGORICAL_H_

#include <cstddef>

namespace firesteel::kernels {

/// The largest of the logits, NaN left out; −∞ of none.
float LargestLogit(const float* logits, size_t n);

/// weights[i] = e^((logits[i] − largest) / temperature), 0 for NaN. `largest` is that of all
/// logits, and finite; temperature > 0. In place is fine.
void CategoricalWeights(const float* logits, size_t n, float largest, float temperature,
                        float* weights);

/// Logits whose weights are summed up together.
inline constexpr size_t kCategoricalBlock = 512;

/// sums[b] = the sum of the weights of block b, [⌈n / kCategoricalBlock⌉]; off by a few roundings
/// of f32. The weights themselves are not written.
void CategoricalBlockSums(const float* logits, size_t n, float largest, float temperature,
                          double* sums);

}  // namespace firesteel::kernels

#endif  // FIRESTEEL_KERNELS_CATEGORICAL_H_
