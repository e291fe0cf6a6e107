// Sparse vector × matrix in integers: what the active neurons of a Spark FFN (arXiv 2506.06644,
// section 4) add to its output, for down projections of 8-bit weights.
//
// The coefficients of some neurons are rounded together to 16 bits in two planes of 8, as
// activations are (quantized.h). Four rows at a time are interleaved byte by byte, so that an
// instruction that multiplies four neighbouring bytes adds four neurons to sixteen columns: half
// the work of converting the weights to floats. Sums are exact: neither the order of the neurons,
// nor the cutting of their list, nor the SIMD target changes a bit.

#ifndef FIRESTEEL_KERNELS_INTEGER_ROWS_H_
#define FIRESTEEL_KERNELS_INTEGER_ROWS_H_

#include <cstddef>
#include <cstdint>

#include "kernels/quantized.h"
#include "kernels/tensor.h"

namespace firesteel::kernels {

/// Columns that sums take: `cols`, padded to whole cache lines of weights.
constexpr size_t SumCols(size_t cols) { return (cols + kAlignment - 1) / kAlignment * kAlignment; }

/// The most coefficients that may be rounded together: their sums stay within 32 bits.
inline constexpr size_t kMaxCoefficients = 65536;

/// Rounds the coefficients of some rows of w together, each times its row's scale, to `out`, one
/// row of out.cols ≤ kMaxCoefficients elements. Scales `coefficients` [out.cols] in place; `active`
/// [out.cols] are their rows. Values that are not finite make the scale and hence all sums not
/// finite, too.
void QuantizeCoefficients(float* coefficients, const uint32_t* active, const TypedView& w,
                          const QuantizedRows& out);

/// Adds Σ_j c_j · w[active[j], :] for j in [begin, end) to `sums` [2, SumCols(w.cols)], one row a
/// plane, in an order of columns of its own; c and `active` as QuantizeCoefficients had them. w kI8
/// [F, D].
void AddIntegerRows(const QuantizedRows& c, const uint32_t* active, size_t begin, size_t end,
                    const TypedView& w, int32_t* sums);

/// y [SumCols(cols)] = what `sums` stand for once each of the coefficients was added, in their
/// order of columns; and zeros to `sums`, for the next ones.
void TakeIntegerSums(const QuantizedRows& c, size_t cols, int32_t* sums, float* y);

/// Puts y [SumCols(cols)], in the order of sums, into that of the columns.
void ToColumnOrder(size_t cols, float* y);

}  // namespace firesteel::kernels

#endif  // FIRESTEEL_KERNELS_INTEGER_ROWS_H_
