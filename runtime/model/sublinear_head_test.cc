// The head that reads a 2-bit copy gives the tokens and the bits of the full one, and loses a token
// as often as its header says.

#include "runtime/model/sublinear_head.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <set>
#include <vector>

#include "runtime/model/synthetic.h"
#include "runtime/model/transformer.h"

namespace firesteel {
namespace {

using kernels::DType;

std::vector<float> Normal(std::mt19937& random, size_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> out(n);
  for (float& v : out) v = normal(random);
  return out;
}

// An embedding of Gaussian rows, its exact logits (plain sums of f32) and its sublinear head.
struct Head {
  Head(size_t vocab, size_t cols, size_t threads, const SublinearHeadOptions& options,
       double soft_cap = 0, uint32_t seed = 1)
      : pool(threads), embedding(vocab, cols, DType::kF32), cap(soft_cap) {
    std::mt19937 random(seed);
    for (size_t r = 0; r < vocab; ++r) embedding.SetRow(r, Normal(random, cols).data());
    head = std::make_unique<SublinearHead>(embedding, soft_cap, &pool, 4, options);
    buffer = Matrix(4, vocab, DType::kF32);
  }
  float Logit(size_t row, const std::vector<float>& h) const {
    float sum = 0;
    const float* w = embedding.view().Row<float>(row);
    for (size_t k = 0; k < h.size(); ++k) sum += w[k] * h[k];
    const float c = static_cast<float>(cap);
    return c == 0 ? sum : c * std::tanh(sum / c);
  }
  std::vector<float> All(const std::vector<float>& h) const {
    std::vector<float> logits(embedding.rows());
    for (size_t r = 0; r < logits.size(); ++r) logits[r] = Logit(r, h);
    return logits;
  }
  void Run(const std::vector<std::vector<float>>& inputs, const std::vector<uint32_t>& top_k) {
    for (size_t i = 0; i < inputs.size(); ++i) head->SetInput(i, inputs[i].data());
    const auto view = buffer.view();
    pool.Run([&](Worker& worker) {
      head->Run(worker, top_k,
                {static_cast<float*>(buffer.MutableRow(0)), 4, view.cols, view.stride},
                [&](size_t row, const uint32_t* ids, size_t begin, size_t end, float* out) {
                  for (size_t j = begin; j < end; ++j) out[j] = Logit(ids[j], inputs[row]);
                });
    });
  }
  const float* Logits(size_t row) { return static_cast<float*>(buffer.MutableRow(row)); }

  WorkerPool pool;
  Matrix embedding;
  double cap;
  std::unique_ptr<SublinearHead> head;
  Matrix buffer;
};

// The tokens whose logits are at least the k-th largest.
std::vector<uint32_t> Largest(const std::vector<float>& logits, size_t k) {
  std::vector<float> sorted = logits;
  std::nth_element(sorted.begin(), sorted.begin() + static_cast<ptrdiff_t>(k - 1), sorted.end(),
                   std::greater<>());
  std::vector<uint32_t> ids;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] >= sorted[k - 1]) ids.push_back(static_cast<uint32_t>(i));
  }
  return ids;
}

bool Includes(std::span<const uint32_t> some, const std::vector<uint32_t>& wanted) {
  return std::includes(some.begin(), some.end(), wanted.begin(), wanted.end());
}

// Two rows of about equal logits, far above the others: if the estimates put them the wrong way
// round and the error of the better one is beyond c · σ, it is lost. h lies halfway between them,
// so only 1 / sqrt(2) of it is across the row: the error is beyond c · σ, which allows for all of
// h, with probability Q(c · sqrt(2)). With one seed nearly all of these are lost.
double MissRate(float confidence, size_t steps, double* mean_candidates) {
  const size_t cols = 128, vocab = 300;
  const SublinearHeadOptions options{.confidence = confidence, .extra_seeds = 0};
  Head head(vocab, cols, 1, options);
  std::mt19937 random(7);
  size_t misses = 0;
  *mean_candidates = 0;
  for (size_t step = 0; step < steps; ++step) {
    // h between two rows, such that the first is ahead by next to nothing.
    const size_t a = step % vocab, b = (a + 1 + step / vocab) % vocab;
    if (a == b) continue;
    const float* wa = head.embedding.view().Row<float>(a);
    const float* wb = head.embedding.view().Row<float>(b);
    double aa = 0, bb = 0, ab = 0;
    for (size_t k = 0; k < cols; ++k) {
      aa += static_cast<double>(wa[k] * wa[k]);
      bb += static_cast<double>(wb[k] * wb[k]);
      ab += static_cast<double>(wa[k] * wb[k]);
    }
    // (x a + b) · a = (x a + b) · b
    const double x = (bb - ab) / (aa - ab) * (1 + 1e-4);
    std::vector<float> h(cols);
    for (size_t k = 0; k < cols; ++k) {
      h[k] = static_cast<float>(x * static_cast<double>(wa[k])) + wb[k];
    }
    head.Run({h}, {1});
    *mean_candidates += static_cast<double>(head.head->ids(0).size()) / static_cast<double>(steps);
    if (!Includes(head.head->ids(0), Largest(head.All(h), 1))) ++misses;
  }
  return static_cast<double>(misses) / static_cast<double>(steps);
}

TEST(SublinearHeadErrors, ComeAtTheStatedRate) {
  double candidates = 0;
  // Q(sqrt(2)) = 0.0786, Q(1.5 · sqrt(2)) = 0.0169, Q(2 · sqrt(2)) = 0.0023; of 20,000 steps.
  EXPECT_NEAR(MissRate(1.0f, 20000, &candidates), 0.0786, 0.012);
  EXPECT_NEAR(MissRate(1.5f, 20000, &candidates), 0.0169, 0.005);
  EXPECT_NEAR(MissRate(2.0f, 20000, &candidates), 0.0023, 0.0012);
  EXPECT_EQ(MissRate(6.0f, 20000, &candidates), 0.0);
  EXPECT_LT(candidates, 60.0) << "nothing is left out";
}

TEST(SublinearHeadErrors, NoneInTenThousandStepsOfAGaussianModel) {
  const size_t cols = 128, vocab = 4000;
  std::mt19937 random(11);
  Head careful(vocab, cols, 1, {}), careless(vocab, cols, 1, {.confidence = 0, .extra_seeds = 0});
  size_t misses = 0, careless_misses = 0;
  double candidates = 0;
  const size_t steps = 10000;
  for (size_t step = 0; step < steps; ++step) {
    const auto h = Normal(random, cols);
    const auto top = Largest(careful.All(h), 1);
    careful.Run({h}, {1});
    careless.Run({h}, {1});
    misses += Includes(careful.head->ids(0), top) ? 0 : 1;
    careless_misses += Includes(careless.head->ids(0), top) ? 0 : 1;
    candidates += static_cast<double>(careful.head->ids(0).size());
  }
  EXPECT_EQ(misses, 0u);
  EXPECT_GT(careless_misses, steps / 100) << "the test cannot fail";
  EXPECT_LT(candidates / steps, vocab / 4) << "nothing is left out";
}

TEST(SublinearHead, CandidatesHoldTheLargestWithTheirExactLogits) {
  std::mt19937 random(3);
  for (const double cap : {0.0, 30.0, 1.0}) {
    for (const size_t cols : {1, 2, 31, 72, 256, 300}) {
      Head head(1000, cols, 2, {}, cap, static_cast<uint32_t>(cols));
      const std::vector<uint32_t> top_k = {1, 5, 100, 256};
      for (int step = 0; step < 5; ++step) {
        std::vector<std::vector<float>> inputs;
        for (size_t i = 0; i < 4; ++i) inputs.push_back(Normal(random, cols));
        inputs[1].assign(cols, 0.0f);  // all logits equal
        head.Run(inputs, top_k);
        for (size_t i = 0; i < 4; ++i) {
          const auto all = head.All(inputs[i]);
          const auto ids = head.head->ids(i);
          ASSERT_TRUE(std::is_sorted(ids.begin(), ids.end()));
          ASSERT_EQ(std::set<uint32_t>(ids.begin(), ids.end()).size(), ids.size());
          // At cap 1 most logits are 1 to a float: all of those are among the largest.
          ASSERT_TRUE(Includes(ids, Largest(all, top_k[i]))) << cap << ", " << cols << ", " << i;
          for (size_t j = 0; j < ids.size(); ++j) ASSERT_EQ(head.Logits(i)[j], all[ids[j]]);
        }
      }
    }
  }
}

TEST(SublinearHead, TeamAndNeighboursDoNotChangeCandidates) {
  std::mt19937 random(4);
  const size_t cols = 96, vocab = 5000;
  std::vector<std::vector<float>> inputs;
  for (size_t i = 0; i < 4; ++i) inputs.push_back(Normal(random, cols));
  const std::vector<uint32_t> top_k = {1, 40, 7, 1};
  Head alone(vocab, cols, 1, {});
  for (const size_t threads : {1, 2, 3, 5}) {
    Head team(vocab, cols, threads, {});
    team.Run(inputs, top_k);
    for (size_t i = 0; i < 4; ++i) {
      alone.Run({inputs[i]}, {top_k[i]});
      const auto ids = team.head->ids(i);
      const auto expected = alone.head->ids(0);
      ASSERT_TRUE(std::equal(ids.begin(), ids.end(), expected.begin(), expected.end())) << threads;
      ASSERT_LT(ids.size(), 3 * vocab / 4);
      ASSERT_EQ(std::memcmp(team.Logits(i), alone.Logits(0), ids.size() * sizeof(float)), 0);
    }
  }
}

TEST(SublinearHead, InputsThatAreNotFiniteLeaveNothingOut) {
  Head head(400, 64, 2, {});
  std::vector<float> h(64, 1.0f);
  for (const float spoiler :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), 3e38f}) {
    h[5] = spoiler;
    head.Run({h}, {1});
    ASSERT_TRUE(Includes(head.head->ids(0), Largest(head.All(h), 1)) ||
                head.head->ids(0).size() == 400);
    if (!std::isfinite(spoiler)) {
      EXPECT_EQ(head.head->ids(0).size(), 400u);
    }
  }
}

TEST(SublinearHead, TakesWhatItCanShorten) {
  Head head(400, 64, 1, {});
  EXPECT_FALSE(head.head->Takes(0));
  EXPECT_TRUE(head.head->Takes(1));
  EXPECT_TRUE(head.head->Takes(SublinearHead::kMaxTopK));
  EXPECT_FALSE(head.head->Takes(SublinearHead::kMaxTopK + 1));
  Head small(17, 64, 1, {});
  EXPECT_FALSE(small.head->Takes(1)) << "seventeen rows would be seeds";
}

ModelConfig SmallSpark() {
  ModelConfig c = *NamedShape("spark-stories");
  c.vocab_size = 2000;
  c.hidden_size = 72;
  c.intermediate_size = 200;
  c.num_layers = 2;
  c.num_heads = 2;
  c.num_kv_heads = 1;
  c.head_dim = 24;
  c.query_pre_attn_scalar = 24;
  c.sliding_window = 37;
  c.max_position_embeddings = 64;
  c.layer_types.resize(2);
  c.ffn_predictor_dim = 40;
  c.ffn_top_k = 16;
  c.attention_predictor_dim = 10;
  c.attention_top_k = 8;
  return c;
}

// In a model: rows of one step that want different things get the bits of the full head, for every
// type of weights.
TEST(SublinearHeadInTransformer, GivesTheBitsOfTheFullHead) {
  const std::pair<DType, ComputeType> variants[] = {{DType::kF32, ComputeType::kF32},
                                                    {DType::kBF16, ComputeType::kF32},
                                                    {DType::kBF16, ComputeType::kBF16},
                                                    {DType::kI8, ComputeType::kInteger},
                                                    {DType::kI4, ComputeType::kInteger}};
  const ModelConfig config = SmallSpark();
  for (const auto& [dtype, compute] : variants) {
    const auto weights = MakeSyntheticWeights(config, dtype, 5);
    WorkerPool pool(2);
    auto cache =
        std::move(KvBlockPool::Create(config, DType::kF32,
                                      24 * KvBlockPool::BytesPerBlock(config, DType::kF32)))
            .value();
    Transformer full(weights, compute, DType::kF32, &pool, 64, 64);
    Transformer screened(weights, compute, DType::kF32, &pool, 64, 64, SublinearHeadOptions());
    EXPECT_EQ(full.sublinear_head_bytes(), 0u);
    EXPECT_EQ(screened.sublinear_head_bytes(), config.vocab_size * (64 + 8));
    std::mt19937 random(9);
    const std::vector<uint32_t> wants = {1, 0, 20, 257, 256, 1, 0};
    std::vector<std::vector<int32_t>> tokens(wants.size());
    std::vector<KvLease> leases, other_leases;
    std::vector<SequenceSlice> batch, other;
    for (size_t i = 0; i < wants.size(); ++i) {
      for (size_t t = 0; t <= i; ++t) {
        tokens[i].push_back(static_cast<int32_t>(random() % config.vocab_size));
      }
      leases.push_back(std::move(cache->Lease(16)).value());
      other_leases.push_back(std::move(cache->Lease(16)).value());
      const LogitRows rows = i == 3 ? LogitRows::kNone : LogitRows::kLast;
      batch.push_back({tokens[i], 0, leases[i].blocks(), rows, wants[i]});
      other.push_back({tokens[i], 0, other_leases[i].blocks(), rows, wants[i]});
    }
    full.Forward(batch);
    screened.Forward(other);
    ASSERT_EQ(screened.num_logit_rows(), wants.size() - 1);
    for (size_t i = 0, row = 0; i < wants.size(); ++i) {
      if (i == 3) continue;
      const auto all = full.logits(row);
      ASSERT_EQ(all.size(), config.vocab_size);
      EXPECT_TRUE(full.candidates(row).ids.empty());
      const HeadActivity activity = screened.head_activity()[row];
      EXPECT_EQ(activity.screened, wants[i] != 0);
      if (wants[i] == 0) {
        const auto same = screened.logits(row);
        ASSERT_EQ(same.size(), all.size());
        EXPECT_EQ(std::memcmp(same.data(), all.data(), all.size_bytes()), 0);
        EXPECT_TRUE(screened.candidates(row).ids.empty());
      } else {
        EXPECT_TRUE(screened.logits(row).empty());
        const LogitCandidates some = screened.candidates(row);
        EXPECT_TRUE(Includes(some.ids, Largest({all.begin(), all.end()}, wants[i])));
        for (size_t j = 0; j < some.ids.size(); ++j) {
          ASSERT_EQ(std::memcmp(&some.logits[j], &all[some.ids[j]], sizeof(float)), 0);
        }
        EXPECT_GE(activity.exact, some.ids.size());
        if (wants[i] == 1) {
          EXPECT_LT(some.ids.size(), config.vocab_size / 2);
        }
      }
      ++row;
    }
  }
}

}  // namespace
}  // namespace firesteel
