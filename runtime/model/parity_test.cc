// Our forward pass against the reference program's (tools/reference/spark_reference.py, float64):
// logits, active sets, greedy continuations, loss and sparsity of trained and of small random
// checkpoints.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "runtime/model/transformer.h"
#include "testdata/goldens.h"

namespace firesteel {
namespace {

const std::string kSource = FIRESTEEL_SOURCE_DIR;

// What may differ (f32 against f64): a logit, and the share of entries of active sets, which flip
// where a score is within rounding of its threshold.
constexpr double kLogitTolerance = 2e-3;
constexpr double kFfnFlips = 1e-5;
constexpr double kAttentionFlips = 1e-4;
// Two logits this close may swap places.
constexpr double kGreedyTie = 1e-2;

// Where a model's folder is; empty for a model that isn't on this machine.
std::string FolderOf(const std::string& model) {
  for (const char* parent : {"/models/", "/testdata/"}) {
    if (std::filesystem::exists(kSource + parent + model)) return kSource + parent + model;
  }
  const char* models = std::getenv("FIRESTEEL_TEST_MODELS");
  if (models == nullptr) return "";
  const std::string folder = std::string(models) + "/" + model;
  return std::filesystem::exists(folder) ? folder : "";
}

// The active sets of one Forward, by layer and row.
class SetRecorder final : public ActivityProbe {
 public:
  SetRecorder(const ModelConfig& config, size_t rows)
      : heads_(config.num_heads),
        rows_(rows),
        ffn_(config.num_layers * rows),
        attended_(config.num_layers * rows * config.num_heads) {}
  void OnFfnActive(size_t layer, size_t row, std::span<const uint32_t> neurons) override {
    ffn_[layer * rows_ + row].assign(neurons.begin(), neurons.end());
  }
  void OnAttended(size_t layer, size_t row, size_t head,
                  std::span<const uint32_t> positions) override {
    attended_[(layer * rows_ + row) * heads_ + head].assign(positions.begin(), positions.end());
  }
  const std::vector<uint32_t>& ffn(size_t layer, size_t row) const {
    return ffn_[layer * rows_ + row];
  }
  const std::vector<uint32_t>& attended(size_t layer, size_t row, size_t head) const {
    return attended_[(layer * rows_ + row) * heads_ + head];
  }

 private:
  const size_t heads_;
  const size_t rows_;
  std::vector<std::vector<uint32_t>> ffn_;
  std::vector<std::vector<uint32_t>> attended_;
};

size_t Differences(const std::vector<uint32_t>& a, const std::vector<uint32_t>& b) {
  std::vector<uint32_t> different;
  std::set_symmetric_difference(a.begin(), a.end(), b.begin(), b.end(),
                                std::back_inserter(different));
  return different.size();
}

class ParityTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    const std::string folder = FolderOf(GetParam());
    if (folder.empty()) {
      GTEST_SKIP() << GetParam() << " is not in the clone; FIRESTEEL_TEST_MODELS names its parent";
    }
    auto weights = LoadWeights(folder, WeightFormat::kAuto);
    ASSERT_TRUE(weights.ok()) << weights.status();
    weights_ = *std::move(weights);
    auto goldens = LoadGoldens(kSource + "/testdata/" + GetParam() + ".golden");
    ASSERT_TRUE(goldens.ok()) << goldens.status();
    goldens_ = *std::move(goldens);
    ASSERT_GE(goldens_.prompts.size(), 5u);
    cache_ = std::move(KvBlockPool::Create(
                           config(), kernels::DType::kF32,
                           4 * KvBlockPool::BlocksFor(context()) *
                               KvBlockPool::BytesPerBlock(config(), kernels::DType::kF32)))
                 .value();
    transformer_ = std::make_unique<Transformer>(weights_, ComputeType::kF32, kernels::DType::kF32,
                                                 &pool_, context(), context());
  }
  const ModelConfig& config() const { return weights_->config; }
  size_t context() const { return config().max_position_embeddings; }
  KvLease Lease() { return std::move(cache_->Lease(context())).value(); }

  // Logits [tokens, vocab] of a sequence from an empty cache.
  std::vector<float> Logits(Transformer& transformer, const std::vector<int32_t>& ids,
                            size_t chunk) {
    const KvLease lease = Lease();
    std::vector<float> all;
    for (size_t at = 0; at < ids.size(); at += chunk) {
      const size_t n = std::min(chunk, ids.size() - at);
      const SequenceSlice slice{
          std::span(ids).subspan(at, n), at, lease.blocks(), LogitRows::kAll, 0, /*prompt=*/true};
      transformer.Forward({&slice, 1});
      for (size_t i = 0; i < n; ++i) {
        all.insert(all.end(), transformer.logits(i).begin(), transformer.logits(i).end());
      }
    }
    return all;
  }

  WorkerPool pool_{2};
  std::shared_ptr<const ModelWeights> weights_;
  Goldens goldens_;
  std::unique_ptr<KvBlockPool> cache_;
  std::unique_ptr<Transformer> transformer_;
};

TEST_P(ParityTest, LogitsAndActiveSets) {
  size_t ffn_entries = 0;
  size_t ffn_flips = 0;
  size_t attention_entries = 0;
  size_t attention_flips = 0;
  size_t positions = 0;
  size_t compared_logits = 0;
  double largest = 0;
  for (const GoldenPrompt& prompt : goldens_.prompts) {
    const size_t n = prompt.ids.size();
    SetRecorder sets(config(), n);
    const KvLease lease = Lease();
    const SequenceSlice slice{prompt.ids, 0, lease.blocks(), LogitRows::kAll};
    transformer_->Forward({&slice, 1}, &sets);
    size_t next_logits = 0;
    for (size_t p = 0; p < n; ++p) {
      size_t flips = 0;
      for (size_t layer = 0; config().spark() && layer < config().num_layers; ++layer) {
        const size_t ffn = Differences(sets.ffn(layer, p), prompt.ffn_active(layer, p));
        ffn_flips += ffn;
        ffn_entries += config().intermediate_size;
        flips += ffn;
        for (size_t head = 0; head < config().num_heads; ++head) {
          const size_t kept =
              Differences(sets.attended(layer, p, head), prompt.attention_kept(layer, p, head));
          attention_flips += kept;
          attention_entries += transformer_->activity()[layer].rows[p].visible;
          flips += kept;
        }
      }
      ++positions;
      if (flips > 0) break;  // what follows differs by right
      while (next_logits < prompt.logit_positions.size() &&
             prompt.logit_positions[next_logits] < p) {
        ++next_logits;
      }
      if (next_logits == prompt.logit_positions.size() ||
          prompt.logit_positions[next_logits] != p) {
        continue;
      }
      ++compared_logits;
      for (size_t v = 0; v < config().vocab_size; ++v) {
        largest = std::max(
            largest, std::abs(double{transformer_->logits(p)[v]} - prompt.logits[next_logits][v]));
      }
    }
  }
  std::cout << GetParam() << ": largest logit difference " << largest << " over " << compared_logits
            << " positions; FFN flips " << ffn_flips << " of " << ffn_entries
            << ", attention flips " << attention_flips << " of " << attention_entries << " over "
            << positions << " positions\n";
  EXPECT_LE(largest, kLogitTolerance);
  EXPECT_GE(compared_logits, 2 * goldens_.prompts.size());
  EXPECT_LE(static_cast<double>(ffn_flips), kFfnFlips * static_cast<double>(ffn_entries));
  EXPECT_LE(static_cast<double>(attention_flips),
            kAttentionFlips * static_cast<double>(attention_entries));
}

TEST_P(ParityTest, GreedyContinuations) {
  size_t equal = 0;
  size_t compared = 0;
  for (const GoldenPrompt& prompt : goldens_.prompts) {
    if (prompt.continuation.empty()) continue;
    ++compared;
    const KvLease lease = Lease();
    std::vector<int32_t> ids = prompt.ids;
    size_t computed = 0;
    bool same = true;
    for (size_t i = 0; i < prompt.continuation.size() && same; ++i) {
      const SequenceSlice slice{std::span(ids).subspan(computed), computed, lease.blocks(),
                                LogitRows::kLast};
      transformer_->Forward({&slice, 1});
      computed = ids.size();
      const auto logits = transformer_->logits(0);
      const size_t ours =
          static_cast<size_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
      const size_t theirs = static_cast<size_t>(prompt.continuation[i]);
      same = ours == theirs;
      if (!same) {
        EXPECT_LE(std::abs(logits[ours] - logits[theirs]), kGreedyTie)
            << prompt.name << ", token " << i << ": " << ours << " instead of " << theirs;
        EXPECT_LE(prompt.top_two[i].logits[0] - prompt.top_two[i].logits[1], kGreedyTie);
      }
      ids.push_back(prompt.continuation[i]);
    }
    equal += same;
  }
  std::cout << GetParam() << ": " << equal << " of " << compared << " continuations equal\n";
  EXPECT_GE(compared, 5u);
  EXPECT_GE(static_cast<double>(equal), 0.9 * static_cast<double>(compared));
}

// The head that reads a 2-bit copy gives the same tokens, and the largest logits to the bit.
TEST_P(ParityTest, SublinearHeadContinuesAlike) {
  Transformer screened(weights_, ComputeType::kF32, kernels::DType::kF32, &pool_, context(), 1,
                       SublinearHeadOptions());
  double candidates = 0;
  size_t steps = 0, most = 0;
  for (const GoldenPrompt& prompt : goldens_.prompts) {
    for (const uint32_t top_k : {1u, 40u}) {
      if (top_k > 1 && &prompt != &goldens_.prompts[0]) continue;
      const KvLease lease = Lease(), other_lease = Lease();
      std::vector<int32_t> ids = prompt.ids;
      size_t computed = 0;
      for (size_t i = 0; i < 64 && ids.size() < context(); ++i) {
        SequenceSlice slice{std::span(ids).subspan(computed), computed, lease.blocks(),
                            LogitRows::kLast, top_k};
        transformer_->Forward({&slice, 1});
        slice.kv_blocks = other_lease.blocks();
        screened.Forward({&slice, 1});
        computed = ids.size();
        const auto all = transformer_->logits(0);
        const LogitCandidates some = screened.candidates(0);
        ASSERT_EQ(some.ids.empty(), config().vocab_size <= top_k + 16);
        const size_t token =
            static_cast<size_t>(std::max_element(all.begin(), all.end()) - all.begin());
        if (!some.ids.empty()) {
          const size_t best = static_cast<size_t>(
              std::max_element(some.logits.begin(), some.logits.end()) - some.logits.begin());
          ASSERT_EQ(some.ids[best], token) << prompt.name << ", token " << i;
          std::vector<float> sorted(all.begin(), all.end());
          std::nth_element(sorted.begin(), sorted.begin() + (top_k - 1), sorted.end(),
                           std::greater<>());
          size_t found = 0, wanted = 0;
          for (const float logit : all) wanted += logit >= sorted[top_k - 1];
          for (size_t j = 0; j < some.ids.size(); ++j) {
            ASSERT_EQ(some.logits[j], all[some.ids[j]]);
            found += some.logits[j] >= sorted[top_k - 1];
          }
          ASSERT_EQ(found, wanted) << prompt.name << ", token " << i << ", top " << top_k;
          if (top_k == 1) {
            candidates += static_cast<double>(some.ids.size());
            most = std::max(most, some.ids.size());
            ++steps;
          }
        }
        ids.push_back(static_cast<int32_t>(token));
      }
    }
  }
  if (steps == 0) return;
  std::cout << GetParam() << ": " << candidates / static_cast<double>(steps) << " candidates of "
            << config().vocab_size << " a greedy step, at most " << most << ", in " << steps
            << " steps\n";
}

TEST_P(ParityTest, PrefillChunksGiveTheSameBits) {
  const auto longest = std::max_element(
      goldens_.prompts.begin(), goldens_.prompts.end(),
      [](const GoldenPrompt& a, const GoldenPrompt& b) { return a.ids.size() < b.ids.size(); });
  const std::vector<float> whole = Logits(*transformer_, longest->ids, longest->ids.size());
  for (size_t chunk : {1, 7, 64}) {
    const std::vector<float> chunked = Logits(*transformer_, longest->ids, chunk);
    ASSERT_EQ(chunked.size(), whole.size());
    EXPECT_EQ(std::memcmp(chunked.data(), whole.data(), whole.size() * sizeof(float)), 0)
        << "chunk " << chunk;
  }
}

INSTANTIATE_TEST_SUITE_P(Models, ParityTest,
                         ::testing::Values("spark-stories", "dense-stories", "random-spark",
                                           "random-gemma2"),
                         [](const auto& param_info) {
                           std::string name = param_info.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

// The held-out text of tools/reference/valid_ids.txt.
class ValidationTest : public ParityTest {
 protected:
  struct Result {
    double nll = 0;
    std::vector<double> ffn_active_fraction;
    std::vector<double> attended_positions;
    std::vector<std::vector<uint32_t>> ffn_sets;  // by step, layer and row
  };

  Result Evaluate(ComputeType compute, kernels::DType kv_dtype) {
    return Evaluate(weights_, compute, kv_dtype);
  }

  Result Evaluate(std::shared_ptr<const ModelWeights> weights, ComputeType compute,
                  kernels::DType kv_dtype) {
    auto cache = std::move(KvBlockPool::Create(config(), kv_dtype,
                                               KvBlockPool::BlocksFor(context()) *
                                                   KvBlockPool::BytesPerBlock(config(), kv_dtype)))
                     .value();
    Transformer transformer(std::move(weights), compute, kv_dtype, &pool_, 256, 256);
    SetRecorder sets(config(), 256);
    Result result;
    result.ffn_active_fraction.resize(config().num_layers);
    result.attended_positions.resize(config().num_layers);
    double positions = 0;
    double predicted = 0;
    std::ifstream file(kSource + "/tools/reference/valid_ids.txt");
    for (std::string line; std::getline(file, line);) {
      std::stringstream numbers(line);
      const std::vector<int32_t> ids{std::istream_iterator<int32_t>(numbers), {}};
      const KvLease lease = std::move(cache->Lease(context())).value();
      for (size_t at = 0; at < ids.size(); at += 256) {
        const size_t n = std::min<size_t>(256, ids.size() - at);
        const SequenceSlice slice{
            std::span(ids).subspan(at, n), at, lease.blocks(), LogitRows::kAll, 0, /*prompt=*/true};
        transformer.Forward({&slice, 1}, &sets);
        for (size_t i = 0; i < n; ++i) {
          for (size_t layer = 0; layer < config().num_layers; ++layer) {
            if (config().spark()) result.ffn_sets.push_back(sets.ffn(layer, i));
            const RowActivity& row = transformer.activity()[layer].rows[i];
            result.ffn_active_fraction[layer] += row.ffn_active;
            result.attended_positions[layer] += row.attended;
          }
          ++positions;
          if (at + i + 1 == ids.size()) continue;
          result.nll -= LogProbability(transformer.logits(i), ids[at + i + 1]);
          ++predicted;
        }
      }
    }
    result.nll /= predicted;
    for (double& v : result.ffn_active_fraction) {
      v /= positions * static_cast<double>(config().intermediate_size);
    }
    for (double& v : result.attended_positions) {
      v /= positions * static_cast<double>(config().num_heads);
    }
    return result;
  }

  static double LogProbability(std::span<const float> logits, int32_t token) {
    const double largest = *std::max_element(logits.begin(), logits.end());
    double sum = 0;
    for (float v : logits) sum += std::exp(v - largest);
    return logits[static_cast<size_t>(token)] - largest - std::log(sum);
  }
};

TEST_P(ValidationTest, LossAndSparsity) {
  auto expected = LoadValidStats(kSource + "/testdata/valid_stats.json", GetParam());
  ASSERT_TRUE(expected.ok()) << expected.status();
  const Result f32 = Evaluate(ComputeType::kF32, kernels::DType::kF32);
  const Result bf16 = Evaluate(ComputeType::kBF16, kernels::DType::kF32);
  const Result bf16_cache = Evaluate(ComputeType::kF32, kernels::DType::kBF16);
  std::cout << GetParam() << ": reference " << expected->nll << ", f32 off by "
            << f32.nll - expected->nll << ", bf16 by " << bf16.nll - expected->nll
            << ", a bf16 cache by " << bf16_cache.nll - expected->nll << "\n";
  EXPECT_NEAR(f32.nll, expected->nll, 0.002);
  EXPECT_NEAR(bf16.nll, expected->nll, 0.01);
  EXPECT_NEAR(bf16_cache.nll, expected->nll, 0.01);
  for (const Result* result : {&f32, &bf16, &bf16_cache}) {
    for (size_t layer = 0; layer < config().num_layers; ++layer) {
      EXPECT_NEAR(result->ffn_active_fraction[layer], expected->ffn_active_fraction[layer], 0.001)
          << "layer " << layer;
      EXPECT_NEAR(result->attended_positions[layer] / expected->attended_positions[layer], 1, 0.01)
          << "layer " << layer;
    }
  }
}

// What rounding the weights costs, against the same checkpoint in bf16.
TEST_P(ValidationTest, QuantizedWeightsKeepTheLoss) {
  const Result bf16 = Evaluate(ComputeType::kF32, kernels::DType::kF32);
  const bool spark = config().spark();
  const struct {
    WeightFormat format;
    double loss, overlap;
  } cases[] = {{WeightFormat::kI8, 0.003, 0.98}, {WeightFormat::kI4, spark ? 0.05 : 0.08, 0.85}};
  for (const auto& [format, loss, least_overlap] : cases) {
    auto weights = LoadWeights(FolderOf(GetParam()), format);
    ASSERT_TRUE(weights.ok()) << weights.status();
    const std::string name = (*weights)->FormatName();
    const Result rounded =
        Evaluate(*std::move(weights), ComputeType::kInteger, kernels::DType::kBF16);
    size_t both = 0, total = 0;
    for (size_t i = 0; i < bf16.ffn_sets.size(); ++i) {
      total += bf16.ffn_sets[i].size();
      both += (bf16.ffn_sets[i].size() + rounded.ffn_sets[i].size() -
               Differences(bf16.ffn_sets[i], rounded.ffn_sets[i])) /
              2;
    }
    const double overlap = static_cast<double>(both) / static_cast<double>(total);
    std::cout << GetParam() << " in " << name << ": loss " << rounded.nll - bf16.nll
              << " over that in bf16";
    if (spark) std::cout << ", " << 100 * overlap << "% of the active neurons the same";
    std::cout << "\n";
    EXPECT_LE(rounded.nll - bf16.nll, loss) << name;
    EXPECT_GT(std::abs(rounded.nll - bf16.nll), 1e-7) << name << " is not in use";
    if (spark) {
      EXPECT_GE(overlap, least_overlap) << name;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Models, ValidationTest,
                         ::testing::Values("spark-stories", "dense-stories"),
                         [](const auto& param_info) {
                           return std::string(param_info.param == "spark-stories" ? "spark"
                                                                                  : "dense");
                         });

}  // namespace
}  // namespace firesteel
