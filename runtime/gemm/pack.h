// Weights into the order in which the matrix units read them (block_product.h).

#ifndef FIRESTEEL_RUNTIME_GEMM_PACK_H_
#define FIRESTEEL_RUNTIME_GEMM_PACK_H_

#include <cstddef>

#include "runtime/gemm/block_product.h"
#include "runtime/gemm/gemm.h"

namespace firesteel::gemm {

/// A part of a weight matrix: `cols` outputs × `depth` inputs from `data` on, the elements of
/// `type`, `stride` elements from one row in memory to the next.
struct WeightBlock {
  const void* data = nullptr;
  Type type = Type::kInt8;
  WeightLayout layout = WeightLayout::kOutIn;
  size_t stride = 0;
  size_t depth = 0;
  size_t cols = 0;
};

/// Writes the block to `packed`, with zeros up to `depth` ≥ block.depth, a multiple of kDepthGrain,
/// and up to the next multiple of kPackCols outputs. `packed` is aligned to 64 bytes.
void PackBlock(const WeightBlock& block, size_t depth, void* packed);

}  // namespace firesteel::gemm

#endif  // FIRESTEEL_RUNTIME_GEMM_PACK_H_
