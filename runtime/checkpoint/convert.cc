#include "runtime/checkpoint/convert.h"

#include <bit>
#include <cstring>

namespace firesteel {
namespace {

using kernels::BF16;

template <typename T>
T LoadElement(const std::byte* source) {
  T value;
  std::memcpy(&value, source, sizeof(T));
  return value;
}

struct FromBF16 {
  static constexpr size_t kBytes = 2;
  static float Load(const std::byte* p) { return kernels::ToF32(BF16{LoadElement<uint16_t>(p)}); }
};
struct FromF16 {
  static constexpr size_t kBytes = 2;
  static float Load(const std::byte* p) { return HalfToF32(LoadElement<uint16_t>(p)); }
};
struct FromF32 {
  static constexpr size_t kBytes = 4;
  static float Load(const std::byte* p) { return LoadElement<float>(p); }
};

void Store(float value, float* out) { *out = value; }
void Store(float value, BF16* out) { *out = kernels::ToBF16(value); }

bool NotFinite(float value) {
  return (std::bit_cast<uint32_t>(value) & 0x7F800000u) == 0x7F800000u;
}
bool NotFinite(BF16 value) { return (value.bits & 0x7F80u) == 0x7F80u; }

/// No early exit: a plain loop over all elements vectorises, and files are good but for accidents.
template <typename From, typename To>
bool Convert(const std::byte* source, size_t n, To* out) {
  unsigned bad = 0;
  for (size_t i = 0; i < n; ++i) {
    Store(From::Load(source + i * From::kBytes), out + i);
    bad |= NotFinite(out[i]) ? 1u : 0u;
  }
  return bad == 0;
}

template <typename From>
bool ConvertTo(kernels::DType dtype, const std::byte* source, size_t n, void* out) {
  return dtype == kernels::DType::kF32 ? Convert<From>(source, n, static_cast<float*>(out))
                                       : Convert<From>(source, n, static_cast<BF16*>(out));
}

template <typename T>
size_t FirstNotFiniteOf(const T* values, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    if (NotFinite(values[i])) return i;
  }
  return n;
}

}  // namespace

float HalfToF32(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1Fu;
  const uint32_t mantissa = bits & 0x3FFu;
  if (exponent == 0) {  // zero or subnormal: mantissa · 2^-24, exact in f32
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
  }
  const uint32_t wide = exponent == 31 ? 255u : exponent + 112u;  // the biases are 15 and 127
  return std::bit_cast<float>(sign | (wide << 23) | (mantissa << 13));
}

size_t StoredBytes(StoredType type) {
  switch (type) {
    case StoredType::kBF16:
    case StoredType::kF16:
      return 2;
    case StoredType::kF32:
      return 4;
    case StoredType::kOther:
      break;
  }
  return 0;
}

bool ConvertElements(StoredType type, const std::byte* source, size_t n, kernels::DType dtype,
                     void* out) {
  switch (type) {
    case StoredType::kBF16:
      return ConvertTo<FromBF16>(dtype, source, n, out);
    case StoredType::kF16:
      return ConvertTo<FromF16>(dtype, source, n, out);
    case StoredType::kF32:
      return ConvertTo<FromF32>(dtype, source, n, out);
    case StoredType::kOther:
      break;
  }
  return false;
}

size_t FirstNotFinite(kernels::DType dtype, const void* values, size_t n) {
  return dtype == kernels::DType::kF32 ? FirstNotFiniteOf(static_cast<const float*>(values), n)
                                       : FirstNotFiniteOf(static_cast<const BF16*>(values), n);
}

}  // namespace firesteel
