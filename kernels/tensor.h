// Views of matrices in memory that somebody else owns, and the two element types of weights.
//
// A view is a pointer and its shape: copy it freely, it never frees anything, and it is valid only
// as long as the memory behind it. No SIMD header is included from here, so that every layer may.

#ifndef FIRESTEEL_KERNELS_TENSOR_H_
#define FIRESTEEL_KERNELS_TENSOR_H_

#include <bit>
#include <cstddef>
#include <cstdint>

namespace firesteel::kernels {

/// Rows that the kernels read are padded and aligned to this, in bytes: one cache line, one AVX-512
/// vector.
inline constexpr size_t kAlignment = 64;

/// A bfloat16: the upper half of an IEEE float32.
struct BF16 {
  uint16_t bits;
};

inline float ToF32(BF16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

/// Rounds to nearest, ties to even; NaN stays NaN.
inline BF16 ToBF16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  if ((u & 0x7FFFFFFFu) > 0x7F800000u) return BF16{static_cast<uint16_t>((u >> 16) | 0x40u)};
  return BF16{static_cast<uint16_t>((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16)};
}

enum class DType : uint8_t { kF32, kBF16 };

constexpr size_t SizeOf(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

/// A read-only matrix [rows, cols] of either element type, `stride` elements from one row to the
/// next. Weights are stored [out, in]; activations [tokens, features].
struct TypedView {
  const void* data = nullptr;
  DType dtype = DType::kF32;
  size_t rows = 0;
  size_t cols = 0;
  size_t stride = 0;

  template <typename T>
  const T* Row(size_t row) const {
    return static_cast<const T*>(data) + row * stride;
  }
};

/// A writable float matrix [rows, cols].
struct MatView {
  float* data = nullptr;
  size_t rows = 0;
  size_t cols = 0;
  size_t stride = 0;

  float* Row(size_t row) const { return data + row * stride; }
};

}  // namespace firesteel::kernels

#endif  // FIRESTEEL_KERNELS_TENSOR_H_
