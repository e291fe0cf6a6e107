// Weights into the order in which the matrix units read them (block_product.h).

#ifndef FIRESTEEL_RUNTIME_GEMM_PACK_H_
#define FIRESTEEL_RUNTIME_GEMM_PACK_H_

#include <cstddef>

#include "runtime/gemm/block_product.h"
#include "runtime/gemm/gemm.h"

namespace firesteel::gemm {

/// Writes the part of a weight matrix [cols outputs, inputs] that w views to `packed`, with zeros
/// up to `depth` ≥ w.cols inputs, a multiple of kDepthGrain, and up to the next multiple of
/// kPackCols outputs. `packed` is aligned to 64 bytes.
void PackBlock(const View<const kernels::BF16>& w, size_t depth, kernels::BF16* packed);

}  // namespace firesteel::gemm

#endif  // FIRESTEEL_RUNTIME_GEMM_PACK_H_
