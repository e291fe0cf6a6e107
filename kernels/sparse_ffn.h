// The two sparse products of the Spark FFN (arXiv 2506.06644, section 4): only the rows of active
// neurons are read. Both weights are stored [neurons, features], so that what belongs to a neuron
// is contiguous.

#ifndef FIRESTEEL_KERNELS_SPARSE_FFN_H_
#define FIRESTEEL_KERNELS_SPARSE_FFN_H_

#include <cstddef>
#include <cstdint>

#include "kernels/tensor.h"

namespace firesteel::kernels {

/// Vector-masked matvec: out[j] = Σ_k x[k] · w[active[j], k] for j in [begin, end).
///
/// x [1, K] f32 or bf16; w [F, K] (up_proj); active: indices < F, rising. Each out[j] has the bits
/// that MatMul gives for that row. Thread-safe for disjoint ranges.
void MaskedMatVec(const TypedView& x, const TypedView& w, const uint32_t* active, size_t begin,
                  size_t end, float* out);

/// Asks for the first few of the listed rows of w, so that they are on their way while something
/// else is computed. Reads nothing.
void FetchFirstRows(const TypedView& w, const uint32_t* active, size_t num_active);

/// Sparse vector × matrix: y[c] += Σ_j coefficients[j] · w[active[j], c], added in the order of j.
///
/// w [F, D], any DType, is down_proj transposed; y [D]. For rows that come from memory, which are
/// read one group after the other, each to its end. Cutting the list of active neurons into calls
/// changes no bit. Thread-safe for distinct y.
void AddSparseVecMat(const float* coefficients, const uint32_t* active, size_t num_active,
                     const TypedView& w, float* y);

/// The same sums, to the bit, of rows that are in a cache already, since other coefficients needed
/// them, too: y[c] = or (if `add`) += Σ_j coefficients[j] · w[active[j], c]. Sums of columns stay
/// in registers. The columns begin at a multiple of kI4Group of those of the matrix.
void SumSparseColumns(const float* coefficients, const uint32_t* active, size_t num_active,
                      const TypedView& w, bool add, float* y);

/// Rounds coefficients [num] of the rows `active` to bf16 and puts them to their places in
/// `row` [count], whose element 0 is that of row `first` of the weights; all others become zero.
void SpreadCoefficients(const float* coefficients, const uint32_t* active, size_t num, size_t first,
                        BF16* row, size_t count);

}  // namespace firesteel::kernels

#endif  // FIRESTEEL_KERNELS_SPARSE_FFN_H_
