#include "runtime/checkpoint/weights.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <tuple>
#include <utility>

#include "runtime/checkpoint/convert.h"
#include "runtime/checkpoint/test_checkpoint.h"

namespace firesteel {
namespace {

using kernels::DType;
using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;

float At(const Matrix& matrix, size_t row, size_t col) {
  const kernels::TypedView view = matrix.view();
  return view.dtype == DType::kF32 ? view.Row<float>(row)[col]
                                   : kernels::ToF32(view.Row<kernels::BF16>(row)[col]);
}

std::string ErrorOf(const TempFolder& folder, WeightFormat format = WeightFormat::kAuto) {
  const auto weights = LoadWeights(folder.path(), format);
  return weights.ok() ? "" : std::string(weights.status().message());
}

/// Element [row, col] of `out` is element `index` of the stored tensor.
using IndexOf = size_t (*)(size_t row, size_t col, size_t rows, size_t cols);
size_t Plain(size_t row, size_t col, size_t, size_t cols) { return row * cols + col; }
size_t Transposed(size_t row, size_t col, size_t rows, size_t) { return col * rows + row; }

void ExpectMatrix(const Matrix& matrix, size_t rows, size_t cols, const std::string& name,
                  IndexOf index = Plain, size_t first_row = 0) {
  SCOPED_TRACE(name);
  ASSERT_EQ(matrix.cols(), cols);
  ASSERT_GE(matrix.rows(), first_row + rows);
  for (size_t r = 0; r < rows; ++r) {
    for (size_t c = 0; c < cols; ++c) {
      ASSERT_EQ(At(matrix, first_row + r, c), TinyValue(name, index(r, c, rows, cols)))
          << r << ", " << c;
    }
  }
}

void ExpectAligned(const Matrix& matrix) {
  const kernels::TypedView view = matrix.view();
  const size_t element = kernels::BytesOf(view.dtype, 1);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(view.data) % kernels::kAlignment, 0u);
  EXPECT_EQ(view.stride * element % kernels::kAlignment, 0u);
  const auto* bytes = static_cast<const unsigned char*>(view.data);
  for (size_t r = 0; r < view.rows; ++r) {
    for (size_t b = view.cols * element; b < view.stride * element; ++b) {
      ASSERT_EQ(bytes[r * view.stride * element + b], 0) << "padding of row " << r;
    }
  }
}

void ExpectVector(const std::vector<float>& vector, size_t size, const std::string& name) {
  SCOPED_TRACE(name);
  ASSERT_EQ(vector.size(), size);
  for (size_t i = 0; i < size; ++i) ASSERT_EQ(vector[i], TinyValue(name, i)) << i;
}

/// All of a tiny model, with d = 8, F = 6, 24 query and 12 key features.
void ExpectTinyWeights(const ModelWeights& weights, bool spark) {
  ExpectMatrix(weights.embedding, 11, 8, "model.embed_tokens.weight");
  ExpectAligned(weights.embedding);
  ExpectVector(weights.final_norm, 8, "model.norm.weight");
  ASSERT_EQ(weights.layers.size(), 2u);
  for (size_t i = 0; i < 2; ++i) {
    const LayerWeights& layer = weights.layers[i];
    const std::string prefix = "model.layers." + std::to_string(i) + ".";
    const auto name = [&](const char* part) { return prefix + part + ".weight"; };
    ExpectVector(layer.input_norm, 8, name("input_layernorm"));
    ExpectVector(layer.post_attention_norm, 8, name("post_attention_layernorm"));
    ExpectVector(layer.pre_feedforward_norm, 8, name("pre_feedforward_layernorm"));
    ExpectVector(layer.post_feedforward_norm, 8, name("post_feedforward_layernorm"));
    ASSERT_EQ(layer.qkv_proj.rows(), 48u);
    ExpectMatrix(layer.qkv_proj, 24, 8, name("self_attn.q_proj"), Plain, 0);
    ExpectMatrix(layer.qkv_proj, 12, 8, name("self_attn.k_proj"), Plain, 24);
    ExpectMatrix(layer.qkv_proj, 12, 8, name("self_attn.v_proj"), Plain, 36);
    ExpectMatrix(layer.o_proj, 8, 24, name("self_attn.o_proj"));
    ExpectMatrix(layer.gate_proj, 6, spark ? 3 : 8, name("mlp.gate_proj"));
    ExpectMatrix(layer.up_proj, 6, spark ? 5 : 8, name("mlp.up_proj"));
    if (spark) {
      ExpectMatrix(layer.down_proj, 6, 8, name("mlp.down_proj"), Transposed);
    } else {
      ExpectMatrix(layer.down_proj, 8, 6, name("mlp.down_proj"));
    }
    for (const Matrix* m :
         {&layer.qkv_proj, &layer.o_proj, &layer.gate_proj, &layer.up_proj, &layer.down_proj}) {
      ExpectAligned(*m);
      EXPECT_EQ(m->dtype(), weights.types.types[0]);
    }
  }
}

class RoundTripTest
    : public ::testing::TestWithParam<std::tuple<bool, const char*, WeightFormat, size_t>> {};

TEST_P(RoundTripTest, LoadsEveryValue) {
  const auto [spark, dtype, format, shards] = GetParam();
  const TempFolder folder;
  const json config = TinyConfig(spark);
  if (shards == 0) {
    WriteCheckpoint(folder, config, TinyTensors(config, dtype));
  } else {
    WriteSharded(folder, config, TinyTensors(config, dtype), shards);
  }
  const auto weights = LoadWeights(folder.path(), format);
  ASSERT_TRUE(weights.ok()) << weights.status();
  const bool bf16 = format == WeightFormat::kBF16 ||
                    (format == WeightFormat::kAuto && std::string(dtype) == "BF16");
  EXPECT_EQ((*weights)->FormatName(), bf16 ? "bf16" : "f32");
  ExpectTinyWeights(**weights, spark);
}

INSTANTIATE_TEST_SUITE_P(All, RoundTripTest,
                         ::testing::Combine(::testing::Bool(),
                                            ::testing::Values("F32", "F16", "BF16"),
                                            ::testing::Values(WeightFormat::kAuto,
                                                              WeightFormat::kBF16,
                                                              WeightFormat::kF32),
                                            ::testing::Values(0, 1, 3)));

/// A valid Spark checkpoint in BF16 and one damage a test.
class DamagedTest : public ::testing::Test {
 protected:
  /// The error of the checkpoint as it now is; "" if it loads.
  std::string Error(WeightFormat format = WeightFormat::kAuto) {
    WriteCheckpoint(folder_, config_, tensors_);
    return ErrorOf(folder_, format);
  }

  const TempFolder folder_;
  json config_ = TinyConfig(true);
  TestTensors tensors_ = TinyTensors(config_, "BF16");
};

constexpr char kGate[] = "model.layers.1.mlp.gate_proj.weight";
constexpr char kDown[] = "model.layers.0.mlp.down_proj.weight";

TEST_F(DamagedTest, IsGoodBeforeTheDamage) { EXPECT_EQ(Error(), ""); }

TEST_F(DamagedTest, EachMissingTensorIsNamed) {
  for (const auto& [name, tensor] : TinyTensors(config_, "BF16")) {
    tensors_ = TinyTensors(config_, "BF16");
    tensors_.erase(name);
    EXPECT_THAT(Error(),
                AllOf(HasSubstr("model.safetensors"), HasSubstr(name), HasSubstr("missing")));
  }
}

TEST_F(DamagedTest, EachShapeIsChecked) {
  for (const auto& [name, tensor] : TinyTensors(config_, "BF16")) {
    tensors_ = TinyTensors(config_, "BF16");
    // As many elements in another shape: only the shape can give it away.
    TestTensor& damaged = tensors_[name];
    damaged.shape.push_back(1);
    EXPECT_THAT(Error(), AllOf(HasSubstr(name), HasSubstr("its shape is [")));
    damaged.shape = {damaged.bytes.size() / 2 + 1};
    damaged.bytes += "xx";
    EXPECT_THAT(Error(), AllOf(HasSubstr(name), HasSubstr("its shape is [")));
  }
}

TEST_F(DamagedTest, TransposedMatrixIsRefused) {
  std::swap(tensors_[kDown].shape[0], tensors_[kDown].shape[1]);
  EXPECT_THAT(Error(), AllOf(HasSubstr(kDown), HasSubstr("[6, 8], config.json needs [8, 6]")));
}

TEST_F(DamagedTest, OtherDTypeIsRefused) {
  tensors_[kGate].dtype = "I16";
  EXPECT_THAT(Error(), AllOf(HasSubstr(kGate), HasSubstr("dtype I16 is not BF16, F16 or F32")));
}

TEST_F(DamagedTest, MixedDTypesBecomeF32) {
  tensors_[kGate] = TinyTensors(config_, "F16")[kGate];
  WriteCheckpoint(folder_, config_, tensors_);
  const auto weights = LoadWeights(folder_.path(), WeightFormat::kAuto);
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_EQ((*weights)->FormatName(), "f32");
  ExpectTinyWeights(**weights, true);
}

TEST_F(DamagedTest, NormsInF32KeepMatricesInBF16) {
  const std::string norm = "model.norm.weight";
  tensors_[norm] = TinyTensors(config_, "F32")[norm];
  WriteCheckpoint(folder_, config_, tensors_);
  const auto weights = LoadWeights(folder_.path(), WeightFormat::kAuto);
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_EQ((*weights)->FormatName(), "bf16");
  ExpectTinyWeights(**weights, true);
}

TEST_F(DamagedTest, ValuesThatAreNotFiniteAreLocated) {
  for (const auto& [name, tensor] : TinyTensors(config_, "BF16")) {
    for (const uint16_t bad : {0x7F80, 0xFF80, 0x7FC1}) {  // inf, -inf, NaN
      tensors_ = TinyTensors(config_, "BF16");
      const size_t index = tensor.bytes.size() / 2 - 2;
      std::memcpy(tensors_[name].bytes.data() + 2 * index, &bad, 2);
      EXPECT_THAT(Error(), AllOf(HasSubstr("model.safetensors"), HasSubstr(name),
                                 HasSubstr("index " + std::to_string(index) + " is not finite")));
    }
  }
}

TEST_F(DamagedTest, ValuesPastBF16AreLocated) {
  const float large = std::numeric_limits<float>::max();
  tensors_ = TinyTensors(config_, "F32");
  std::memcpy(tensors_[kGate].bytes.data() + 4 * 5, &large, 4);
  EXPECT_EQ(Error(WeightFormat::kF32), "");
  EXPECT_THAT(Error(WeightFormat::kBF16),
              AllOf(HasSubstr(kGate), HasSubstr("index 5"), HasSubstr("bf16's range")));
}

TEST_F(DamagedTest, TensorsOfAnotherModelAreRefused) {
  tensors_["model.layers.2.input_layernorm.weight"] = tensors_["model.norm.weight"];
  EXPECT_THAT(Error(), HasSubstr("model.layers.2.input_layernorm.weight"));
}

TEST_F(DamagedTest, FewerLayersThanTheFileAreRefused) {
  config_["num_hidden_layers"] = 1;
  EXPECT_THAT(Error(), HasSubstr("a model of this config.json has no such tensor"));
}

TEST_F(DamagedTest, OnlyATiedOutputHeadIsAccepted) {
  tensors_["lm_head.weight"] = tensors_["model.embed_tokens.weight"];
  EXPECT_EQ(Error(), "");
  tensors_["lm_head.weight"].bytes[0] ^= 1;
  EXPECT_THAT(Error(), AllOf(HasSubstr("lm_head.weight"), HasSubstr("tied")));
}

TEST_F(DamagedTest, HugeConfigCostsNoMemory) {
  config_["vocab_size"] = 1 << 24;
  config_["hidden_size"] = 1 << 17;
  config_["intermediate_size"] = 1 << 20;
  EXPECT_THAT(Error(), HasSubstr("its shape is ["));
}

TEST_F(DamagedTest, UnalignedDataLoads) {
  folder_.Write("config.json", config_.dump());
  for (size_t padding = 0; padding < 4; ++padding) {
    folder_.Write("model.safetensors", SafetensorsBytes(tensors_, padding));
    const auto weights = LoadWeights(folder_.path(), WeightFormat::kAuto);
    ASSERT_TRUE(weights.ok()) << weights.status();
    ExpectTinyWeights(**weights, true);
  }
}

TEST_F(DamagedTest, EveryTruncationIsAnError) {
  folder_.Write("config.json", config_.dump());
  const std::string whole = SafetensorsBytes(tensors_);
  for (size_t size = 0; size < whole.size(); size += 17) {
    folder_.Write("model.safetensors", whole.substr(0, size));
    EXPECT_THAT(ErrorOf(folder_), HasSubstr("model.safetensors")) << size;
  }
}

TEST_F(DamagedTest, EmptyFolderIsNotFound) {
  EXPECT_EQ(LoadWeights(folder_.path(), WeightFormat::kAuto).status().code(),
            absl::StatusCode::kNotFound);
  folder_.Write("config.json", config_.dump());
  const auto weights = LoadWeights(folder_.path(), WeightFormat::kAuto);
  EXPECT_EQ(weights.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(weights.status().message()), HasSubstr(folder_.path()));
}

class ShardedTest : public ::testing::Test {
 protected:
  void WriteIndex() { folder_.Write("model.safetensors.index.json", index_.dump()); }

  const TempFolder folder_;
  const json config_ = TinyConfig(true);
  const TestTensors tensors_ = TinyTensors(config_, "F32");
  json index_ = WriteSharded(folder_, config_, tensors_, 3);
};

TEST_F(ShardedTest, IsGoodBeforeTheDamage) { EXPECT_EQ(ErrorOf(folder_), ""); }

TEST_F(ShardedTest, MissingShardIsNamed) {
  ASSERT_EQ(std::remove(folder_.File(ShardName(1)).c_str()), 0);
  EXPECT_THAT(ErrorOf(folder_), HasSubstr(folder_.File(ShardName(1))));
}

TEST_F(ShardedTest, TensorInTheWrongShardIsNamed) {
  const std::string name = index_["weight_map"].begin().key();
  ASSERT_EQ(index_["weight_map"][name], ShardName(0));
  index_["weight_map"][name] = ShardName(2);
  WriteIndex();
  EXPECT_THAT(ErrorOf(folder_), AllOf(HasSubstr(name), HasSubstr("index.json")));
}

TEST_F(ShardedTest, TensorInTwoShardsIsNamed) {
  const auto& [name, tensor] = *tensors_.begin();  // in shard 0
  TestTensors more = {{name, tensor}};
  for (const auto& [other, shard] : index_["weight_map"].items()) {
    if (shard == ShardName(1)) more[other] = tensors_.at(other);
  }
  folder_.Write(ShardName(1), SafetensorsBytes(more));
  EXPECT_THAT(ErrorOf(folder_), AllOf(HasSubstr(ShardName(1)), HasSubstr(name)));
}

TEST_F(ShardedTest, DamagedShardIsNamed) {
  folder_.Write(ShardName(2), "damaged");
  EXPECT_THAT(ErrorOf(folder_), AllOf(HasSubstr(ShardName(2)), HasSubstr("truncated")));
}

TEST_F(ShardedTest, TensorThatNoShardHasIsNamed) {
  index_["weight_map"].erase(kGate);
  WriteIndex();
  EXPECT_THAT(ErrorOf(folder_), HasSubstr(kGate));
}

TEST_F(ShardedTest, ShardsArePlainFileNames) {
  for (const char* bad :
       {"../model.safetensors", "/etc/passwd", "sub/part.safetensors", "..", ".", "", "a/../b"}) {
    index_["weight_map"][kGate] = bad;
    WriteIndex();
    EXPECT_THAT(ErrorOf(folder_), AllOf(HasSubstr(kGate), HasSubstr("plain file name"))) << bad;
  }
  index_["weight_map"][kGate] = std::string("part\0", 5);
  WriteIndex();
  EXPECT_THAT(ErrorOf(folder_), HasSubstr("plain file name"));
  index_["weight_map"][kGate] = 7;
  WriteIndex();
  EXPECT_THAT(ErrorOf(folder_), HasSubstr("plain file name"));
}

TEST_F(ShardedTest, BadIndexesAreRefused) {
  for (const char* bad : {"", "{", "[]", "{}", R"({"weight_map":[]})", R"({"weight_map":{}})"}) {
    folder_.Write("model.safetensors.index.json", bad);
    EXPECT_THAT(ErrorOf(folder_), HasSubstr("index.json")) << bad;
  }
}

TEST(WeightsTest, TransposesStripsOfAnySize) {
  // d = 40 rows is one strip of bf16 and a part of the next; F = 35 columns fit no vector.
  json config = TinyConfig(true);
  config["hidden_size"] = 40;
  config["intermediate_size"] = 35;
  const TempFolder folder;
  WriteCheckpoint(folder, config, TinyTensors(config, "F32"));
  for (const WeightFormat format : {WeightFormat::kBF16, WeightFormat::kF32}) {
    const auto weights = LoadWeights(folder.path(), format);
    ASSERT_TRUE(weights.ok()) << weights.status();
    ExpectMatrix((*weights)->layers[1].down_proj, 35, 40, "model.layers.1.mlp.down_proj.weight",
                 Transposed);
    ExpectAligned((*weights)->layers[1].down_proj);
  }
}

TEST(WeightsTest, LoadsTheCheckpointsOfTheProject) {
  const std::string root = FIRESTEEL_SOURCE_DIR;
  for (const auto& [folder, parameters, dtype] :
       {std::tuple{"/models/spark-stories", size_t{31'734'272}, DType::kBF16},
        {"/testdata/random-spark", size_t{100'608}, DType::kF32},
        {"/testdata/random-gemma2", size_t{58'480}, DType::kF32}}) {
    const auto weights = LoadWeights(root + folder, WeightFormat::kAuto);
    ASSERT_TRUE(weights.ok()) << weights.status();
    EXPECT_EQ((*weights)->config.NumParameters(), parameters) << folder;
    EXPECT_TRUE((*weights)->types == dtype) << folder;
    EXPECT_GE((*weights)->bytes(),
              kernels::BytesOf(dtype, parameters) * 99 / 100);  // the norms are no matrices
  }
}

TEST(WeightsTest, LoadsDenseStories) {
  const char* const models = std::getenv("FIRESTEEL_TEST_MODELS");
  if (models == nullptr || *models == 0) GTEST_SKIP() << "FIRESTEEL_TEST_MODELS is not set";
  const auto weights = LoadWeights(std::string(models) + "/dense-stories", WeightFormat::kAuto);
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_FALSE((*weights)->config.spark());
}

/// A small generator of its own, so that a failure can be repeated anywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t Below(uint64_t n) {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return (state_ >> 33) % n;
  }

 private:
  uint64_t state_;
};

/// Flips, overwrites, inserts or removes a few bytes among the first `range`.
std::string Mutate(std::string text, size_t range, Random* random) {
  static constexpr char kInteresting[] = "0123456789-+.eE\"{}[],:\\ntf\xFF\x00\x80";
  for (uint64_t i = 1 + random->Below(4); i > 0; --i) {
    const size_t at = random->Below(std::min(range, text.size()));
    const char byte = kInteresting[random->Below(sizeof(kInteresting) - 1)];
    switch (random->Below(4)) {
      case 0:
        text[at] = static_cast<char>(text[at] ^ (1 << random->Below(8)));
        break;
      case 1:
        text[at] = byte;
        break;
      case 2:
        text.insert(at, 1, byte);
        break;
      default:
        text.erase(at, 1);
    }
  }
  return text;
}

// Whatever the damage: a status or a model whose every tensor was checked, never a crash (run it
// under ASan).
TEST(FuzzTest, DamagedFilesNeverCrash) {
  const json config = TinyConfig(true);
  const TestTensors tensors = TinyTensors(config, "BF16");
  const std::string config_text = config.dump();
  const std::string file = SafetensorsBytes(tensors);
  const size_t header = file.find("}}") + 2;
  const TempFolder single, sharded;
  const std::string index_text = WriteSharded(sharded, config, tensors, 2).dump();
  Random random(20250607);
  int refused = 0, rounds = 1500;
  for (int i = 0; i < rounds; ++i) {
    single.Write("config.json", config_text);
    single.Write("model.safetensors", Mutate(file, header, &random));
    refused += ErrorOf(single) != "";
    single.Write("config.json", Mutate(config_text, config_text.size(), &random));
    single.Write("model.safetensors", file);
    refused += ErrorOf(single) != "";
    sharded.Write("model.safetensors.index.json", Mutate(index_text, index_text.size(), &random));
    refused += ErrorOf(sharded) != "";
  }
  // Some damage is harmless (in the metadata, say), most is not.
  EXPECT_GT(refused, rounds * 3 / 2);
  EXPECT_LT(refused, rounds * 3);
}

}  // namespace
}  // namespace firesteel
