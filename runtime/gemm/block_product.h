// The product of one block, which oneDNN compiles for its shape: what gemm.cc is made of.
//
// All three matrices are dense and multiples of 64 in each direction: oneDNN 2.6 leaves the matrix
// units for a generic kernel when a matrix has a stride of its own.

#ifndef FIRESTEEL_RUNTIME_GEMM_BLOCK_PRODUCT_H_
#define FIRESTEEL_RUNTIME_GEMM_BLOCK_PRODUCT_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/tensor.h"

namespace firesteel::gemm {

/// The packed weights of a block [depth, cols], which PackBlock writes and BlockProduct reads, are
/// [cols / 64][depth / 2][64][2]: the elements that the CPU multiplies at once, two of one output,
/// lie side by side.
inline constexpr size_t kPackCols = 64;

/// Depths are multiples of this.
inline constexpr size_t kDepthGrain = 64;

struct BlockShape {
  size_t rows = 0;
  size_t depth = 0;
  size_t cols = 0;
};

/// c = x · w for one shape. Not thread-safe.
class BlockProduct {
 public:
  /// Internal if oneDNN has no kernel of the matrix units for the shape.
  static absl::StatusOr<std::unique_ptr<BlockProduct>> Create(const BlockShape& shape);
  virtual ~BlockProduct() = default;

  /// x [rows, depth], packed weights [depth, cols], c [rows, cols]; all dense and aligned to 64
  /// bytes. On the calling thread alone.
  virtual absl::Status Run(const kernels::BF16* x, const kernels::BF16* packed, float* c) = 0;
};

/// OK if oneDNN is there and may use the matrix units; else why not.
absl::Status CheckBackend();

/// The library and the instructions that it uses.
std::string BackendDescription();

}  // namespace firesteel::gemm

#endif  // FIRESTEEL_RUNTIME_GEMM_BLOCK_PRODUCT_H_
