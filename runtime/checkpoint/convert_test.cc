#include "runtime/checkpoint/convert.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace firesteel {
namespace {

using kernels::BF16;
using kernels::DType;

/// The value of a half by its definition.
double HalfValue(uint16_t bits) {
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  const int exponent = (bits >> 10) & 31;
  const int mantissa = bits & 1023;
  if (exponent == 0) return sign * std::ldexp(mantissa, -24);
  if (exponent == 31) {
    return mantissa == 0 ? sign * std::numeric_limits<double>::infinity()
                         : std::numeric_limits<double>::quiet_NaN();
  }
  return sign * std::ldexp(1024 + mantissa, exponent - 25);
}

TEST(ConvertTest, EveryHalfIsExact) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const double want = HalfValue(static_cast<uint16_t>(bits));
    const float got = HalfToF32(static_cast<uint16_t>(bits));
    if (std::isnan(want)) {
      EXPECT_TRUE(std::isnan(got)) << bits;
    } else {
      EXPECT_EQ(static_cast<double>(got), want) << bits;
      EXPECT_EQ(std::signbit(got), std::signbit(want)) << bits;
    }
  }
}

template <typename T>
std::vector<std::byte> BytesAt(size_t offset, const std::vector<T>& values) {
  std::vector<std::byte> bytes(offset + values.size() * sizeof(T));
  std::memcpy(bytes.data() + offset, values.data(), values.size() * sizeof(T));
  return bytes;
}

TEST(ConvertTest, ReadsAnyAlignment) {
  for (size_t offset = 0; offset < 5; ++offset) {
    const auto f32 = BytesAt<float>(offset, {1.5f, -2.0f, 0.0f});
    const auto bf16 = BytesAt<uint16_t>(offset, {0x3FC0, 0xC000, 0});
    const auto f16 = BytesAt<uint16_t>(offset, {0x3E00, 0xC000, 0});
    float out[3];
    for (const auto& [type, bytes] : {std::pair{StoredType::kF32, &f32},
                                      {StoredType::kBF16, &bf16},
                                      {StoredType::kF16, &f16}}) {
      std::memset(out, 0xFF, sizeof(out));
      EXPECT_TRUE(ConvertElements(type, bytes->data() + offset, 3, DType::kF32, out));
      EXPECT_EQ(out[0], 1.5f);
      EXPECT_EQ(out[1], -2.0f);
      EXPECT_EQ(out[2], 0.0f);
    }
  }
}

TEST(ConvertTest, RoundsToNearestEvenBF16) {
  // Halves of the last place: 1 + 2^-8 lies between 1 and 1 + 2^-7 and goes to the even one, 1.
  const auto bytes =
      BytesAt<float>(0, {1.0f + 0x1p-8f, 1.0f + 0x1.8p-7f, 1.0f + 0x1.02p-8f, -1.0f - 0x1.8p-7f});
  BF16 out[4];
  EXPECT_TRUE(ConvertElements(StoredType::kF32, bytes.data(), 4, DType::kBF16, out));
  EXPECT_EQ(kernels::ToF32(out[0]), 1.0f);
  EXPECT_EQ(kernels::ToF32(out[1]), 1.0f + 0x1p-6f);
  EXPECT_EQ(kernels::ToF32(out[2]), 1.0f + 0x1p-7f);
  EXPECT_EQ(kernels::ToF32(out[3]), -1.0f - 0x1p-6f);
}

TEST(ConvertTest, FindsWhatIsNotFinite) {
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const float bad : {inf, -inf, nan, -nan}) {
    const auto bytes = BytesAt<float>(0, {1, 2, bad, 3});
    float out[4];
    EXPECT_FALSE(ConvertElements(StoredType::kF32, bytes.data(), 4, DType::kF32, out));
    EXPECT_EQ(FirstNotFinite(DType::kF32, out, 4), 2u);
    EXPECT_EQ(FirstNotFinite(DType::kF32, out, 2), 2u);
    BF16 rounded[4];
    EXPECT_FALSE(ConvertElements(StoredType::kF32, bytes.data(), 4, DType::kBF16, rounded));
    EXPECT_EQ(FirstNotFinite(DType::kBF16, rounded, 4), 2u);
  }
  for (const uint16_t bad : {0x7C00, 0xFC00, 0x7E00, 0x7C01}) {
    const auto bytes = BytesAt<uint16_t>(0, {0x7BFF, bad});
    float out[2];
    EXPECT_FALSE(ConvertElements(StoredType::kF16, bytes.data(), 2, DType::kF32, out)) << bad;
    EXPECT_EQ(out[0], 65504.0f);
  }
  for (const uint16_t bad : {0x7F80, 0xFF80, 0x7FC0, 0x7F81}) {
    const auto bytes = BytesAt<uint16_t>(0, {0x7F7F, bad});
    BF16 out[2];
    EXPECT_FALSE(ConvertElements(StoredType::kBF16, bytes.data(), 2, DType::kBF16, out)) << bad;
    EXPECT_EQ(out[0].bits, 0x7F7F);
  }
}

TEST(ConvertTest, LargeF32OverflowsBF16) {
  const auto bytes = BytesAt<float>(0, {std::numeric_limits<float>::max()});
  float wide;
  BF16 narrow;
  EXPECT_TRUE(ConvertElements(StoredType::kF32, bytes.data(), 1, DType::kF32, &wide));
  EXPECT_FALSE(ConvertElements(StoredType::kF32, bytes.data(), 1, DType::kBF16, &narrow));
}

}  // namespace
}  // namespace firesteel
