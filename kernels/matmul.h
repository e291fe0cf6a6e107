// Dense products of a chunk of tokens with a weight matrix: x · wᵀ.

#ifndef FIRESTEEL_KERNELS_MATMUL_H_
#define FIRESTEEL_KERNELS_MATMUL_H_

#include "kernels/tensor.h"

namespace firesteel::kernels {

/// y[t, n] = Σ_k x[t, k] · w[n, k] for every token t and for n in [row_begin, row_end).
///
/// x [tokens, K] in f32 or bf16, w [N, K] in f32 or bf16, y [tokens, N] in f32; bf16 x needs bf16
/// w. Accumulates in f32. The bits of y[t, n] depend on x[t, :], w[n, :] and the SIMD target only:
/// neither the number of tokens nor the row range nor alignment changes the order of the sum.
/// Thread-safe for disjoint row ranges of one y.
void MatMul(const TypedView& x, const TypedView& w, size_t row_begin, size_t row_end,
            const MatView& y);

/// out[i] = x[i] rounded to bfloat16 (nearest, ties to even), i < n.
void RoundToBF16(const float* x, size_t n, BF16* out);

}  // namespace firesteel::kernels

#endif  // FIRESTEEL_KERNELS_MATMUL_H_
