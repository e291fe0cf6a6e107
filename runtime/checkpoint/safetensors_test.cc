#include "runtime/checkpoint/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstring>
#include <ostream>
#include <string>
#include <vector>

#include "runtime/checkpoint/test_checkpoint.h"

namespace firesteel {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

/// What opening a file of this content says; "" where it is good.
std::string ErrorOf(const std::string& content) {
  const TempFolder folder;
  folder.Write("m.safetensors", content);
  const auto file = SafetensorsFile::Open(folder.File("m.safetensors"));
  if (file.ok()) return "";
  EXPECT_EQ(file.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(file.status().message(), HasSubstr("m.safetensors"));
  return std::string(file.status().message());
}

/// A file whose only damage is the given header over `data_bytes` of data.
std::string ErrorOfHeader(const std::string& header, size_t data_bytes) {
  return ErrorOf(SafetensorsFromParts(header, std::string(data_bytes, '\0')));
}

std::string TensorJson(const std::string& dtype, const std::string& shape,
                       const std::string& offsets) {
  return R"({"dtype":)" + dtype + R"(,"shape":)" + shape + R"(,"data_offsets":)" + offsets + "}";
}

TestTensors TwoTensors() {
  return {{"a", {"F32", {2, 3}, Encode("F32", {1, 2, 3, 4, 5, 6})}},
          {"b", {"BF16", {2}, Encode("BF16", {-1, 0.5})}}};
}

TEST(SafetensorsTest, ReadsNamesShapesTypesAndBytes) {
  const TempFolder folder;
  const std::string content = SafetensorsBytes(TwoTensors());
  folder.Write("m.safetensors", content);
  const auto file = SafetensorsFile::Open(folder.File("m.safetensors"));
  ASSERT_TRUE(file.ok()) << file.status();
  ASSERT_EQ((*file)->tensors().size(), 2u);
  const StoredTensor& a = (*file)->tensors().at("a");
  const StoredTensor& b = (*file)->tensors().at("b");
  EXPECT_EQ(a.type, StoredType::kF32);
  EXPECT_EQ(b.type, StoredType::kBF16);
  EXPECT_THAT(a.shape, ElementsAre(2, 3));
  EXPECT_EQ(*a.path, folder.File("m.safetensors"));
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(a.data), a.bytes), TwoTensors()["a"].bytes);
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(b.data), b.bytes), TwoTensors()["b"].bytes);
}

TEST(SafetensorsTest, EveryTruncationIsAnError) {
  const std::string content = SafetensorsBytes(TwoTensors());
  ASSERT_EQ(ErrorOf(content), "");
  for (size_t size = 0; size < content.size(); ++size) {
    EXPECT_NE(ErrorOf(content.substr(0, size)), "") << "cut to " << size << " bytes";
  }
}

TEST(SafetensorsTest, TrailingBytesAreAnError) {
  EXPECT_THAT(ErrorOf(SafetensorsBytes(TwoTensors()) + "x"), HasSubstr("after the last tensor"));
}

TEST(SafetensorsTest, HeaderSizeIsBounded) {
  std::string content = SafetensorsBytes(TwoTensors());
  for (const uint64_t size : {uint64_t{100'000'001}, ~uint64_t{0}, uint64_t{1} << 63}) {
    std::memcpy(content.data(), &size, sizeof(size));
    EXPECT_THAT(ErrorOf(content),
                AllOf(HasSubstr(std::to_string(size)), HasSubstr("the limit is 100000000")));
  }
  const uint64_t past_end = content.size() - 7;
  std::memcpy(content.data(), &past_end, sizeof(past_end));
  EXPECT_THAT(ErrorOf(content), HasSubstr("truncated"));
}

TEST(SafetensorsTest, FileWithoutTensorsIsGood) { EXPECT_EQ(ErrorOfHeader("{}", 0), ""); }

TEST(SafetensorsTest, SpacesBehindTheHeaderAreGood) { EXPECT_EQ(ErrorOfHeader("{}    ", 0), ""); }

struct HeaderCase {
  const char* name;
  std::string header;
  size_t data_bytes;
  const char* error;  // part of the message; "" for a good file
};

void PrintTo(const HeaderCase& c, std::ostream* out) { *out << c.header.substr(0, 200); }

class SafetensorsHeaderTest : public ::testing::TestWithParam<HeaderCase> {};

TEST_P(SafetensorsHeaderTest, IsJudged) {
  const std::string error = ErrorOfHeader(GetParam().header, GetParam().data_bytes);
  if (*GetParam().error == '\0') {
    EXPECT_EQ(error, "");
  } else {
    EXPECT_THAT(error, HasSubstr(GetParam().error));
  }
}

std::string One(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"t":)" + TensorJson(dtype, shape, offsets) + "}";
}
std::string Two(const std::string& offsets_a, const std::string& offsets_b) {
  return R"({"a":)" + TensorJson(R"("F32")", "[1]", offsets_a) + R"(,"b":)" +
         TensorJson(R"("F32")", "[1]", offsets_b) + "}";
}

const char kF32[] = R"("F32")";

INSTANTIATE_TEST_SUITE_P(
    All, SafetensorsHeaderTest,
    ::testing::Values(
        HeaderCase{"Good", One(kF32, "[2]", "[0,8]"), 8, ""},
        HeaderCase{"Scalar", One(kF32, "[]", "[0,4]"), 4, ""},
        HeaderCase{"EmptyTensor", One(kF32, "[0,7]", "[0,0]"), 0, ""},
        HeaderCase{"OtherDType", One(R"("I64")", "[1]", "[0,8]"), 8, ""},
        HeaderCase{"EmptyText", "", 0, "not a JSON object"},
        HeaderCase{"List", "[]", 0, "not a JSON object"},
        HeaderCase{"Syntax", "{\"a\":", 0, "not valid JSON"},
        HeaderCase{"BadUtf8", "{\"\xFF\":1}", 0, "not valid JSON"},
        HeaderCase{"TwoObjects", "{}{}", 0, "not valid JSON"},
        HeaderCase{"DeepNesting", std::string(100'000, '[') + std::string(100'000, ']'), 0,
                   "nested deeper than 16"},
        HeaderCase{"DuplicateName",
                   R"({"t":)" + TensorJson(kF32, "[1]", "[0,4]") + R"(,"t":)" +
                       TensorJson(kF32, "[1]", "[0,4]") + "}",
                   4, "key \"t\" stands there twice"},
        HeaderCase{"DuplicateKeyInside",
                   R"({"t":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}})", 4,
                   "key \"shape\" stands there twice"},
        HeaderCase{"MetadataNotObject", R"({"__metadata__":3})", 0, "__metadata__"},
        HeaderCase{"MetadataNotString", R"({"__metadata__":{"a":3}})", 0, "not a string"},
        HeaderCase{"EntryNotObject", R"({"t":[1,2]})", 0, "tensor \"t\": no \"dtype\""},
        HeaderCase{"NoShape", R"({"t":{"dtype":"F32","data_offsets":[0,4]}})", 4, "no \"shape\""},
        HeaderCase{"NoOffsets", R"({"t":{"dtype":"F32","shape":[1]}})", 4, "no \"data_offsets\""},
        HeaderCase{"UnknownDType", One(R"("F31")", "[1]", "[0,4]"), 4,
                   "dtype \\\"F31\\\" is unknown"},
        HeaderCase{"DTypeNotString", One("32", "[1]", "[0,4]"), 4, "dtype 32 is unknown"},
        HeaderCase{"NegativeDim", One(kF32, "[-1]", "[0,4]"), 4, "\"shape\" has -1"},
        HeaderCase{"FractionalDim", One(kF32, "[1.0]", "[0,4]"), 4, "\"shape\" has 1.0"},
        HeaderCase{"StringDim", One(kF32, R"(["1"])", "[0,4]"), 4, "\"shape\" has"},
        HeaderCase{"HugeDim", One(kF32, "[18446744073709551616]", "[0,4]"), 4, "\"shape\" has"},
        HeaderCase{"HighRank", One(kF32, "[1,1,1,1,1,1,1,1,1]", "[0,4]"), 4, "at most 8"},
        HeaderCase{"ProductOverflows", One(kF32, "[4294967296,4294967296]", "[0,0]"), 0,
                   "overflows"},
        HeaderCase{"ProductWrapsToSize", One(kF32, "[4611686018427387905]", "[0,4]"), 4,
                   "overflows"},
        HeaderCase{"ShapeNotList", One(kF32, "1", "[0,4]"), 4, "\"shape\" must be"},
        HeaderCase{"ShapeTooSmall", One(kF32, "[1]", "[0,8]"), 8, "need 4 bytes"},
        HeaderCase{"ShapeTooLarge", One(kF32, "[3]", "[0,8]"), 8, "need 12 bytes"},
        HeaderCase{"NegativeOffset", One(kF32, "[1]", "[-4,0]"), 4, "\"data_offsets\" must be"},
        HeaderCase{"ThreeOffsets", One(kF32, "[1]", "[0,4,8]"), 8, "\"data_offsets\" must be"},
        HeaderCase{"OffsetsReversed", One(kF32, "[1]", "[4,0]"), 4, "\"data_offsets\" are 4 and 0"},
        HeaderCase{"OffsetPastEnd", One(kF32, "[2]", "[0,8]"), 7, "the file has 7 bytes"},
        HeaderCase{"HugeOffset", One(kF32, "[1]", "[18446744073709551611,18446744073709551615]"), 4,
                   "\"data_offsets\" are"},
        HeaderCase{"Overlap", Two("[0,4]", "[2,6]"), 6, "tensor \"b\" overlaps another at byte 2"},
        HeaderCase{"SameBytes", Two("[0,4]", "[0,4]"), 4, "overlaps"},
        HeaderCase{"HoleBetween", Two("[0,4]", "[8,12]"), 12, "bytes 4 to 8"},
        HeaderCase{"HoleAtStart", One(kF32, "[1]", "[4,8]"), 8, "bytes 0 to 4"}),
    [](const auto& test) { return std::string(test.param.name); });

TEST(SafetensorsTest, OnlyRegularFilesAreOpened) {
  const TempFolder folder;
  EXPECT_EQ(SafetensorsFile::Open(folder.File("none")).status().code(),
            absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(SafetensorsFile::Open(folder.path()).status().message()),
              HasSubstr("not a regular file"));
  ASSERT_EQ(mkfifo(folder.File("fifo").c_str(), 0600), 0);
  EXPECT_THAT(std::string(SafetensorsFile::Open(folder.File("fifo")).status().message()),
              HasSubstr("not a regular file"));
}

}  // namespace
}  // namespace firesteel
