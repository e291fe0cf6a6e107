// Precision of activations and products.

#ifndef FIRESTEEL_RUNTIME_MODEL_COMPUTE_TYPE_H_
#define FIRESTEEL_RUNTIME_MODEL_COMPUTE_TYPE_H_

#include <cstdint>
#include <optional>

#include "absl/status/statusor.h"
#include "runtime/checkpoint/weight_format.h"

namespace firesteel {

/// The inputs of dense products. kF32: they stay f32 (the parity mode). kBF16: rounded to bf16.
/// kInteger: rounded to bytes with room for outliers (kernels/quantized.h); goes with weights of 8
/// and 4 bits, and with them only.
enum class ComputeType : uint8_t { kF32, kBF16, kInteger };

/// "f32", "bf16" or "integer".
inline const char* ComputeTypeName(ComputeType type) {
  switch (type) {
    case ComputeType::kF32:
      return "f32";
    case ComputeType::kBF16:
      return "bf16";
    case ComputeType::kInteger:
      return "integer";
  }
  return "";
}

/// What to compute with where `wanted` (nothing: the fastest) meets such weights. InvalidArgument
/// where they do not go together.
absl::StatusOr<ComputeType> ResolveComputeType(std::optional<ComputeType> wanted,
                                               const WeightTypes& weights);

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_MODEL_COMPUTE_TYPE_H_
