// Scalar twins of all kernels, in double and in the plainest possible order: what the tests compare
// with.
//
// Inputs are the kernels' own (f32 or bf16 values, taken exactly); results are doubles. Nothing
// outside the tests links this library.

#ifndef FIRESTEEL_KERNELS_REFERENCE_H_
#define FIRESTEEL_KERNELS_REFERENCE_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/attention.h"
#include "kernels/screen.h"
#include "kernels/tensor.h"

namespace firesteel::kernels::reference {

/// Element (row, col) of a view, exactly.
double At(const TypedView& view, size_t row, size_t col);

std::vector<double> RmsNorm(std::span<const float> x, std::span<const float> weight, double eps);
std::vector<double> RmsNormAdd(std::span<const float> x, std::span<const float> weight, double eps,
                               std::span<const float> inout);
std::vector<double> Rope(std::span<const float> cosines, std::span<const float> sines,
                         std::span<const float> x);
std::vector<double> GeluMul(std::span<const float> x, std::span<const float> factor);
std::vector<double> ScaleSoftCap(std::span<const float> x, double scale, double cap);
std::vector<double> Softplus(std::span<const float> x);
std::vector<double> Softmax(std::span<const float> x);
std::vector<double> CategoricalWeights(std::span<const float> logits, double largest,
                                       double temperature);

/// y[t, n] for all tokens and rows, [x.rows · w.rows].
std::vector<double> MatMul(const TypedView& x, const TypedView& w);
std::vector<double> MaskedMatVec(const TypedView& x, const TypedView& w,
                                 std::span<const uint32_t> active);
std::vector<double> SparseVecMat(std::span<const float> coefficients,
                                 std::span<const uint32_t> active, const TypedView& w);

/// y[t, n] for x [tokens, w.cols] (any real numbers) and 2-bit rows, [tokens · w.rows].
std::vector<double> ScreenMatMul(std::span<const double> x, const I2View& w);
/// R · x as kernels::RotateAtRandom defines it, with the Hadamard matrices written out.
std::vector<double> RotateAtRandom(std::span<const float> signs, std::span<const float> x);

/// mean + std · quantile, in two passes; std has the divisor n − `ddof`.
double StatisticalThreshold(std::span<const float> scores, double quantile, int ddof = 1);
/// Indices of the scores > theta, or ≥ theta if not `strict`.
std::vector<uint32_t> CompactAbove(std::span<const float> scores, double theta, bool strict = true);

/// One query head over plain keys and values [positions, head_dim] of the visible positions.
struct Attention {
  std::vector<double> out;     // [head_dim]
  std::vector<uint32_t> kept;  // positions, rising
  std::vector<double> scores;  // predictor scores after the soft cap, [positions]
  double theta = 0.0;          // 0 where every position is kept
};
Attention Attend(const AttentionShape& shape, std::span<const float> query,
                 std::span<const float> keys, std::span<const float> values, double quantile);

}  // namespace firesteel::kernels::reference

#endif  // FIRESTEEL_KERNELS_REFERENCE_H_
