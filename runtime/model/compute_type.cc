#include "runtime/model/compute_type.h"

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/amx.h"

namespace firesteel {

absl::StatusOr<ComputeType> ResolveComputeType(std::optional<ComputeType> wanted,
                                               const WeightTypes& weights) {
  const bool quantized = weights.quantized();
  const bool bf16 = weights.Has(kernels::DType::kBF16);  // then all are
  if (!wanted.has_value()) {
    if (quantized) return ComputeType::kInteger;
    // bf16 gains where matrix units multiply prompts; elsewhere f32 is more exact and as fast: see
    // docs/benchmarks.md.
    const bool gains = bf16 && kernels::AmxAvailable();
    return gains ? ComputeType::kBF16 : ComputeType::kF32;
  }
  const bool possible = *wanted == ComputeType::kF32    ? !quantized
                        : *wanted == ComputeType::kBF16 ? bf16
                                                        : quantized;
  if (possible) return *wanted;
  return absl::InvalidArgumentError(absl::StrCat(
      "compute ", ComputeTypeName(*wanted), " does not go with ",
      quantized ? "quantized" : DTypeName(weights.types[0]),
      " weights: f32 needs bf16 or f32 weights, bf16 needs bf16 ones; auto goes with any"));
}

}  // namespace firesteel
