#include "runtime/checkpoint/weight_format.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>
#include <string>

namespace firesteel {
namespace {

using kernels::DType;
using ::testing::HasSubstr;

WeightTypes Types(DType attention, DType predictor, DType ffn, DType head) {
  WeightTypes types = attention;
  types[WeightRole::kPredictor] = predictor;
  types[WeightRole::kFfn] = ffn;
  types[WeightRole::kHead] = head;
  return types;
}

constexpr DType k8 = DType::kI8, k4 = DType::kI4;

TEST(WeightFormatTest, NamesGiveTypes) {
  const struct {
    const char* name;
    WeightTypes spark, dense;
  } rows[] = {
      {"bf16", DType::kBF16, DType::kBF16},
      {"f32", DType::kF32, DType::kF32},
      {"int8", k8, k8},
      {"int4", Types(k4, k4, k8, k4), k4},
      {"int4,ffn=int4", k4, k4},
      {"int4,head=int8", Types(k4, k4, k8, k8), Types(k4, k4, k4, k8)},
      {"int8,attention=int4,predictor=int4", Types(k4, k4, k8, k8), Types(k4, k8, k8, k8)},
  };
  for (const auto& [name, spark, dense] : rows) {
    const auto format = WeightFormat::Parse(name);
    ASSERT_TRUE(format.ok()) << name << ": " << format.status();
    EXPECT_EQ(format->Name(), name);
    EXPECT_TRUE(format->TypesOf(true, DType::kF32) == spark) << name;
    EXPECT_TRUE(format->TypesOf(false, DType::kF32) == dense) << name;
    EXPECT_FALSE(*format == WeightFormat());
  }
}

TEST(WeightFormatTest, AutoKeepsWhatIsStored) {
  const auto format = WeightFormat::Parse("auto");
  ASSERT_TRUE(format.ok());
  EXPECT_TRUE(*format == WeightFormat());
  const WeightTypes stored = Types(k4, k8, k8, k4);
  EXPECT_TRUE(format->TypesOf(true, stored) == stored);
}

// Whatever the types, their name gives them back.
TEST(WeightFormatTest, EveryCombinationHasAName) {
  std::set<std::string> names;
  for (size_t bits = 0; bits < 16; ++bits) {
    const auto type = [&](size_t role) { return (bits >> role & 1) != 0 ? k8 : k4; };
    const WeightTypes types = Types(type(0), type(1), type(2), type(3));
    ASSERT_TRUE(types.Check().ok());
    const std::string name = WeightFormat::NameOf(types, /*spark=*/true);
    EXPECT_TRUE(names.insert(name).second) << name;
    const auto format = WeightFormat::Parse(name);
    ASSERT_TRUE(format.ok()) << name;
    EXPECT_TRUE(format->TypesOf(true, DType::kBF16) == types) << name;
  }
  EXPECT_TRUE(names.contains("int8"));
  EXPECT_TRUE(names.contains("int4"));
  EXPECT_EQ(WeightFormat::NameOf(DType::kBF16, true), "bf16");
  EXPECT_EQ(WeightFormat::NameOf(DType::kF32, false), "f32");
  EXPECT_EQ(WeightFormat::NameOf(k4, false), "int4");
}

TEST(WeightFormatTest, BadNamesAreRefused) {
  for (const char* bad : {"", "q3", "INT8", "int8,", "int8,head", "int8,head=", "int8,head=bf16",
                          "int8,tail=int4", "bf16,head=int8", "auto,head=int8", "f32,ffn=int4",
                          "int8, head=int4", "int8,head=int4=int8"}) {
    EXPECT_EQ(WeightFormat::Parse(bad).status().code(), absl::StatusCode::kInvalidArgument) << bad;
  }
  EXPECT_THAT(std::string(WeightFormat::Parse("int8,head=int4,head=int8").status().message()),
              HasSubstr("names head twice"));
}

TEST(WeightFormatTest, FloatsAndIntegersDoNotMix) {
  EXPECT_TRUE(WeightTypes(DType::kBF16).Check().ok());
  EXPECT_TRUE(Types(k4, k8, k8, k4).Check().ok());
  EXPECT_THAT(std::string(Types(k8, k8, k8, DType::kBF16).Check().message()),
              HasSubstr("those of head bf16"));
  EXPECT_FALSE(Types(DType::kBF16, DType::kBF16, DType::kF32, DType::kBF16).Check().ok());
}

}  // namespace
}  // namespace firesteel
