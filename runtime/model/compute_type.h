// Precision of activations and products.

#ifndef FIRESTEEL_RUNTIME_MODEL_COMPUTE_TYPE_H_
#define FIRESTEEL_RUNTIME_MODEL_COMPUTE_TYPE_H_

#include <cstdint>

namespace firesteel {

/// kF32: activations stay f32 (the parity mode). kBF16: the inputs of dense products are rounded to
/// bf16.
enum class ComputeType : uint8_t { kF32, kBF16 };

/// "f32" or "bf16".
inline const char* ComputeTypeName(ComputeType type) {
  return type == ComputeType::kF32 ? "f32" : "bf16";
}

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_MODEL_COMPUTE_TYPE_H_
