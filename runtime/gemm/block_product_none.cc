// Builds without oneDNN.

#include "runtime/gemm/block_product.h"

namespace firesteel::gemm {

absl::StatusOr<std::unique_ptr<BlockProduct>> BlockProduct::Create(const BlockShape& /*shape*/) {
  return CheckBackend();
}

absl::Status CheckBackend() { return absl::UnavailableError("built without oneDNN"); }

std::string BackendDescription() { return "none"; }

}  // namespace firesteel::gemm
