// Views of matrices in memory that somebody else owns, and the element types of weights.
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

/// kI8: w = row_scales[row] · q, q in [−127, 127].
/// kI4: w = block_scales[row, block] · q, q in [−8, 7], in blocks of kI4Block neighbours; stored in
/// groups of kI4Group as q + 8: byte i of a group has element i in its lower half and element
/// i + kI4Group / 2 in its upper one, so that both halves of a vector of bytes are neighbours.
enum class DType : uint8_t { kF32, kBF16, kI8, kI4 };

inline constexpr size_t kI4Block = 64;
inline constexpr size_t kI4Group = 128;

constexpr bool IsQuantized(DType dtype) { return dtype == DType::kI8 || dtype == DType::kI4; }

/// Bytes of `elements` neighbours; kI4: `elements` is a multiple of 2.
constexpr size_t BytesOf(DType dtype, size_t elements) {
  switch (dtype) {
    case DType::kF32:
      return elements * 4;
    case DType::kBF16:
      return elements * 2;
    case DType::kI8:
      return elements;
    case DType::kI4:
      return elements / 2;
  }
  return 0;
}

/// A read-only matrix [rows, cols], `stride` elements from one row to the next. Weights are stored
/// [out, in]; activations [tokens, features]. Rows of quantized matrices are padded to 64 bytes
/// with anything that is finite.
struct TypedView {
  const void* data = nullptr;
  DType dtype = DType::kF32;
  size_t rows = 0;
  size_t cols = 0;
  size_t stride = 0;
  const float* row_scales = nullptr;   // kI8: [rows]
  const BF16* block_scales = nullptr;  // kI4: [rows, BlocksPerRow()]

  template <typename T>
  const T* Row(size_t row) const {
    return static_cast<const T*>(data) + row * stride;
  }
  /// A row's bytes, of any type.
  const uint8_t* RowBytes(size_t row) const {
    return static_cast<const uint8_t*>(data) + BytesOf(dtype, row * stride);
  }
  /// kI4: scales a row has; an even number, since a group has two.
  size_t BlocksPerRow() const { return stride / kI4Block; }
  const BF16* BlockScales(size_t row) const { return block_scales + row * BlocksPerRow(); }
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
