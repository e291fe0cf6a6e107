// Models out of packed files compute what the same models out of checkpoint folders do.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "runtime/checkpoint/packed_file.h"
#include "runtime/checkpoint/test_checkpoint.h"
#include "runtime/model/synthetic.h"
#include "runtime/model/transformer.h"

namespace firesteel {
namespace {

constexpr char kFolder[] = FIRESTEEL_SOURCE_DIR "/models/spark-stories";

/// `tokens` tokens after bos, each the one with the largest logit.
std::vector<int32_t> Greedy(const std::shared_ptr<const ModelWeights>& weights, size_t tokens) {
  const ModelConfig& config = weights->config;
  WorkerPool pool(2);
  constexpr kernels::DType kCache = kernels::DType::kF32;
  auto cache = KvBlockPool::Create(
      config, kCache,
      KvBlockPool::BlocksFor(tokens + 1) * KvBlockPool::BytesPerBlock(config, kCache));
  EXPECT_TRUE(cache.ok()) << cache.status();
  Transformer transformer(weights, *ResolveComputeType(std::nullopt, weights->types), kCache, &pool,
                          1, 1);
  const KvLease lease = std::move((*cache)->Lease(tokens + 1)).value();
  std::vector<int32_t> ids = {config.bos_token_id};
  while (ids.size() <= tokens) {
    const SequenceSlice slice{{&ids.back(), 1}, ids.size() - 1, lease.blocks(), LogitRows::kLast};
    transformer.Forward({&slice, 1});
    const auto logits = transformer.logits(0);
    ids.push_back(
        static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin()));
  }
  return ids;
}

absl::Status Pack(WeightFormat format, const std::string& path) {
  auto source = OpenFolderSource(kFolder, format, 2);
  if (!source.ok()) return source.status();
  return WritePackedFile(source->get(), {}, path);
}

TEST(PackedModelTest, GreedyTokensAreTheFolders) {
  for (const WeightFormat format : {WeightFormat::kBF16, WeightFormat::kI8, WeightFormat::kI4}) {
    const TempFolder folder;
    const std::string path = folder.File("model.firesteel");
    ASSERT_TRUE(Pack(format, path).ok());
    const auto expected = LoadWeights(kFolder, format);
    ASSERT_TRUE(expected.ok()) << expected.status();
    const std::vector<int32_t> tokens = Greedy(*expected, 48);
    for (const WeightMemory memory : {WeightMemory::kCopy, WeightMemory::kShared}) {
      const auto weights = LoadWeights(path, WeightFormat::kAuto, memory);
      ASSERT_TRUE(weights.ok()) << weights.status();
      EXPECT_EQ(Greedy(*weights, 48), tokens);
    }
  }
}

// Mapped weights are not looked at when a server starts: whatever they are, it must not crash (run
// it under ASan).
TEST(PackedModelTest, DamagedMappedWeightsComputeSomething) {
  for (const WeightFormat format : {WeightFormat::kBF16, WeightFormat::kI8, WeightFormat::kI4}) {
    for (const char fill : {'\xFF', '\x7F', '\x80'}) {
      const TempFolder folder;
      const std::string path = folder.File("model.firesteel");
      ASSERT_TRUE(Pack(format, path).ok());
      {
        const auto file = PackedFile::Open(path);
        ASSERT_TRUE(file.ok()) << file.status();
        std::fstream bytes(path, std::ios::binary | std::ios::in | std::ios::out);
        for (const PackedPart& part : (*file)->parts()) {
          if (part.rows < 2) continue;
          bytes.seekp(static_cast<std::streamoff>(part.data.offset));
          bytes << std::string(part.data.bytes, fill);
        }
      }
      EXPECT_FALSE(LoadWeights(path, WeightFormat::kAuto, WeightMemory::kCopy).ok());
      const auto weights = LoadWeights(path, WeightFormat::kAuto, WeightMemory::kShared);
      ASSERT_TRUE(weights.ok()) << weights.status();
      EXPECT_EQ(Greedy(*weights, 3).size(), 4u);
    }
  }
}

TEST(SyntheticSourceTest, BitsDoNotDependOnThreads) {
  const auto config = NamedShape("spark-stories");
  ASSERT_TRUE(config.ok());
  const auto expected = MakeSyntheticWeights(*config, kernels::DType::kI8, 7);
  const auto source = MakeSyntheticSource(*config, kernels::DType::kI8, 7, 3);
  const auto weights = AssembleWeights(source.get(), 3);
  ASSERT_TRUE(weights.ok()) << weights.status();
  const auto same = [](const Matrix& a, const Matrix& b) {
    return a.bytes() == b.bytes() &&
           std::memcmp(a.view().data, b.view().data, a.DataBytes()) == 0 &&
           std::memcmp(a.view().row_scales, b.view().row_scales, a.ScaleBytes()) == 0;
  };
  EXPECT_TRUE(same(expected->embedding, (*weights)->embedding));
  EXPECT_TRUE(same(expected->layers[6].down_proj, (*weights)->layers[6].down_proj));
  EXPECT_FALSE(same(MakeSyntheticWeights(*config, kernels::DType::kI8, 8)->embedding,
                    (*weights)->embedding));
}

}  // namespace
}  // namespace firesteel
