// Stored elements (any alignment, little-endian) to the two element types that kernels read.

#ifndef FIRESTEEL_RUNTIME_CHECKPOINT_CONVERT_H_
#define FIRESTEEL_RUNTIME_CHECKPOINT_CONVERT_H_

#include <cstddef>
#include <cstdint>

#include "kernels/tensor.h"
#include "runtime/checkpoint/safetensors.h"

namespace firesteel {

/// The value of an IEEE half, exactly; infinities and NaNs stay what they are.
float HalfToF32(uint16_t bits);

/// Bytes of one stored element; 0 for kOther.
size_t StoredBytes(StoredType type);

/// Writes n elements at `source` to `out` as `dtype`, to nearest even where that is bf16. False if
/// any result is not finite: the caller then looks for it by FirstNotFinite. `type` is not kOther.
bool ConvertElements(StoredType type, const std::byte* source, size_t n, kernels::DType dtype,
                     void* out);

/// Index of the first element of `values` [n] that is not finite; n if all are.
size_t FirstNotFinite(kernels::DType dtype, const void* values, size_t n);

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_CHECKPOINT_CONVERT_H_
