// Weights of 2 bits, for products that only have to be near the truth: the first pass over a large
// matrix of which few rows matter.
//
// A row w is stored as one scale and levels q in {−3, −1, 1, 3} with w ≈ scale · q. The scale is
// not that of least squares but ‖w‖² / (w · q), which makes the residual e = w − scale · q
// orthogonal to w (Gao & Long, RaBitQ, SIGMOD 2024): the estimate of w · h then has no bias that
// grows with w · h itself. Where w and h were rotated at random beforehand, e · h is distributed
// like ‖e‖ · ‖h⊥w‖ times a coordinate of a random point of the unit sphere in d − 1 dimensions:
// mean 0, standard deviation at most ‖e‖ ‖h‖ / sqrt(d − 1), tails no heavier than a Gaussian's.

#ifndef FIRESTEEL_KERNELS_SCREEN_H_
#define FIRESTEEL_KERNELS_SCREEN_H_

#include <cstddef>
#include <cstdint>

#include "kernels/quantized.h"
#include "kernels/tensor.h"

namespace firesteel::kernels {

/// Columns of 2-bit rows and of their activations are padded to a multiple of this. A group of so
/// many weights is 64 bytes: byte i has the codes (q + 3) / 2 of the columns i, i + 64, i + 128 and
/// i + 192 of the group from its lowest bits up, so that a vector of bytes holds four vectors of
/// neighbours.
inline constexpr size_t kI2Group = 256;

constexpr size_t PaddedI2Cols(size_t cols) { return (cols + kI2Group - 1) / kI2Group * kI2Group; }
/// Bytes of one row; a multiple of kAlignment.
constexpr size_t BytesOfI2Row(size_t cols) { return PaddedI2Cols(cols) / 4; }

/// What rounding one row to 2 bits gave besides its codes.
struct I2Row {
  float scale = 0;     // 0 for a row of zeros
  float residual = 0;  // ‖w − scale · q‖
  float norm = 0;      // ‖scale · q‖
};

/// Rounds w [PaddedI2Cols(cols)], finite, zeros from `cols` on, to codes [BytesOfI2Row(cols)]. The
/// step between levels is the best one for Gaussian rows, 0.9957 times the root mean square (Max,
/// 1960): an error of 0.345 ‖w‖ before the bias is taken out, 0.367 ‖w‖ behind.
I2Row QuantizeWeightsI2(const float* w, size_t cols, uint8_t* codes);

/// A read-only matrix of 2-bit rows, one behind the other.
struct I2View {
  const uint8_t* codes = nullptr;  // [rows, BytesOfI2Row(cols)], 64-byte aligned
  const float* scales = nullptr;   // [rows]
  size_t rows = 0;
  size_t cols = 0;
};

/// y[t, n] = scales[n] · Σ_k x[t, k] · q[n, k] for n in [row_begin, row_end), x taken at 8 bits
/// (QuantizeToBytes). x.cols is PaddedI2Cols(w.cols), with zeros behind w.cols. Sums are integers,
/// so the bits of y[t, n] depend on x[t, :] and w[n, :] only, not on the SIMD target. Thread-safe
/// for disjoint row ranges of one y.
void ScreenMatMul(const QuantizedRows& x, const I2View& w, size_t row_begin, size_t row_end,
                  const MatView& y);

/// x [n] = R · x, where R is orthogonal: three times signs and a Hadamard transform, of the first p
/// elements, the last p and the first p; p is the largest power of two ≤ n. signs [3 · n] of ±1.
/// (After two transforms of one length, columns are still permutations of each other, and errors 4%
/// wider than they should be where few columns dominate.) Every target gives the same bits.
void RotateAtRandom(const float* signs, size_t n, float* x);

/// ids[0 …] = the n in [begin, end), rising, with estimates[n] + factor · radii[n] ≥ threshold.
/// `ids` has room for end − begin + kCompactionSlack. Returns how many. NaNs are not listed.
size_t ListPossible(const float* estimates, const float* radii, float factor, float threshold,
                    size_t begin, size_t end, uint32_t* ids);

}  // namespace firesteel::kernels

#endif  // FIRESTEEL_KERNELS_SCREEN_H_
