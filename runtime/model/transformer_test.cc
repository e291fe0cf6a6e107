// The promises of the forward pass that need no reference: its bits depend on the sequence alone,
// and Spark with nothing left out is dense.

#include "runtime/model/transformer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <list>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "runtime/model/cost_model.h"
#include "runtime/model/synthetic.h"

namespace firesteel {
namespace {

using kernels::DType;
using ::testing::DoubleNear;
using ::testing::Each;
using ::testing::Pointwise;

// Odd sizes, a window smaller than the prompts, several KV blocks, and sparsity in both parts.
ModelConfig SmallSpark() {
  ModelConfig c = *NamedShape("spark-stories");
  c.vocab_size = 301;
  c.hidden_size = 72;
  c.intermediate_size = 400;
  c.num_layers = 3;
  c.num_heads = 4;
  c.num_kv_heads = 2;
  c.head_dim = 24;
  c.query_pre_attn_scalar = 24;
  c.sliding_window = 37;
  c.max_position_embeddings = 160;
  c.layer_types.resize(3);
  c.ffn_predictor_dim = 40;
  c.ffn_top_k = 32;
  c.attention_predictor_dim = 10;
  c.attention_top_k = 8;
  return c;
}

std::vector<int32_t> RandomTokens(size_t n, uint32_t seed, size_t vocab) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens(n);
  for (int32_t& t : tokens) t = static_cast<int32_t>(random() % vocab);
  return tokens;
}

// One model, its cache and its team.
struct Runner {
  Runner(const ModelConfig& config, const WeightTypes& types, ComputeType compute, DType kv_dtype,
         size_t threads)
      : pool(threads),
        weights(MakeSyntheticWeights(config, types, 42)),
        cache(std::move(KvBlockPool::Create(config, kv_dtype,
                                            KvBlockPool::BytesPerBlock(config, kv_dtype) * 64))
                  .value()),
        transformer(weights, compute, kv_dtype, &pool, 320, 320) {}

  // Logits [tokens, vocab] of a sequence computed in chunks of `chunk`; the first two thirds are
  // its prompt.
  std::vector<float> Run(const std::vector<int32_t>& tokens, size_t chunk) {
    const KvLease lease = std::move(cache->Lease(tokens.size())).value();
    std::vector<float> all;
    for (size_t at = 0; at < tokens.size();) {
      const SequenceSlice slice = Slice(tokens, at, chunk, lease);
      transformer.Forward({&slice, 1});
      Append(all);
      at += slice.tokens.size();
    }
    return all;
  }
  // Up to `chunk` tokens of one kind.
  static SequenceSlice Slice(const std::vector<int32_t>& tokens, size_t at, size_t chunk,
                             const KvLease& lease) {
    const size_t prompt = tokens.size() * 2 / 3;
    const size_t end = at < prompt ? prompt : tokens.size();
    return {std::span(tokens).subspan(at, std::min(chunk, end - at)),
            at,
            lease.blocks(),
            LogitRows::kAll,
            0,
            at < prompt};
  }
  void Append(std::vector<float>& all) {
    for (size_t i = 0; i < transformer.num_logit_rows(); ++i) {
      const auto row = transformer.logits(i);
      all.insert(all.end(), row.begin(), row.end());
    }
  }

  WorkerPool pool;
  std::shared_ptr<const ModelWeights> weights;
  std::unique_ptr<KvBlockPool> cache;
  Transformer transformer;
};

bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

struct Variant {
  std::string name;
  ModelConfig config;
  WeightTypes types;
  ComputeType compute;
  DType kv_dtype = DType::kF32;
};

// So many neurons that rows of a step take turns over windows of columns.
ModelConfig WideSpark() {
  ModelConfig c = SmallSpark();
  c.hidden_size = 300;
  c.ffn_predictor_dim = 64;
  c.intermediate_size = 20000;
  c.ffn_top_k = 200;
  c.num_layers = 1;
  c.layer_types.resize(1);
  return c;
}

// Heads whose prompts attend on the matrix unit, where there is one.
ModelConfig TiledSpark() {
  ModelConfig c = SmallSpark();
  c.head_dim = 64;
  c.query_pre_attn_scalar = 64;
  c.attention_predictor_dim = 32;
  return c;
}

std::vector<Variant> Variants() {
  const ModelConfig spark = SmallSpark();
  const auto types = [](const char* format) {
    return WeightFormat::Parse(format)->TypesOf(/*spark=*/true, DType::kBF16);
  };
  return {
      {"spark f32 weights", spark, DType::kF32, ComputeType::kF32},
      {"spark bf16 weights", spark, DType::kBF16, ComputeType::kF32},
      {"spark bf16 compute", spark, DType::kBF16, ComputeType::kBF16},
      {"dense", DenseTwin(spark), DType::kBF16, ComputeType::kF32},
      {"dense bf16 compute", DenseTwin(spark), DType::kBF16, ComputeType::kBF16},
      {"spark bf16 cache", spark, DType::kBF16, ComputeType::kF32, DType::kBF16},
      {"dense bf16 cache", DenseTwin(spark), DType::kBF16, ComputeType::kF32, DType::kBF16},
      {"wide spark", WideSpark(), DType::kBF16, ComputeType::kF32},
      {"wide spark int8", WideSpark(), DType::kI8, ComputeType::kInteger},
      {"spark int8", spark, DType::kI8, ComputeType::kInteger},
      {"dense int8", DenseTwin(spark), DType::kI8, ComputeType::kInteger},
      {"spark int4", spark, types("int4"), ComputeType::kInteger},
      {"spark int4 rows", spark, DType::kI4, ComputeType::kInteger},
      {"spark mixed", spark, types("int8,predictor=int4,head=int4"), ComputeType::kInteger},
      {"dense int4", DenseTwin(spark), DType::kI4, ComputeType::kInteger},
      {"tiled int8", TiledSpark(), DType::kI8, ComputeType::kInteger, DType::kBF16},
      {"tiled bf16", TiledSpark(), DType::kBF16, ComputeType::kBF16, DType::kBF16},
      {"tiled dense", DenseTwin(TiledSpark()), DType::kI8, ComputeType::kInteger, DType::kBF16}};
}

TEST(Transformer, ChunksAndThreadsDoNotChangeABit) {
  for (const Variant& v : Variants()) {
    Runner runner(v.config, v.types, v.compute, v.kv_dtype, 1);
    const auto tokens = RandomTokens(150, 1, v.config.vocab_size);
    const auto whole = runner.Run(tokens, tokens.size());
    ASSERT_EQ(whole.size(), tokens.size() * v.config.vocab_size);
    for (size_t chunk : {1, 7, 64}) {
      EXPECT_TRUE(SameBits(runner.Run(tokens, chunk), whole)) << v.name << ", chunk " << chunk;
    }
    for (size_t threads : {2, 3}) {
      Runner team(v.config, v.types, v.compute, v.kv_dtype, threads);
      EXPECT_TRUE(SameBits(team.Run(tokens, 7), whole)) << v.name << ", threads " << threads;
      // Three threads are more than a single row has KV heads: then query heads go one by one.
      EXPECT_TRUE(SameBits(team.Run(tokens, 1), whole)) << v.name << ", threads " << threads;
    }
    // The comparison can fail: another prompt gives other bits.
    auto other = tokens;
    other[0] ^= 1;
    EXPECT_FALSE(SameBits(runner.Run(other, other.size()), whole)) << v.name;
  }
}

TEST(Transformer, BatchMatesDoNotChangeABit) {
  for (const Variant& v : Variants()) {
    Runner runner(v.config, v.types, v.compute, v.kv_dtype, 2);
    std::vector<std::vector<int32_t>> prompts;
    std::vector<std::vector<float>> alone;
    for (uint32_t i = 0; i < 7; ++i) {
      prompts.push_back(RandomTokens(20 + 9 * i, i, v.config.vocab_size));
      alone.push_back(runner.Run(prompts.back(), prompts.back().size()));
    }
    // All at once, some in chunks and some token by token, at different positions in every step.
    std::vector<KvLease> leases;
    for (const auto& p : prompts)
      leases.push_back(std::move(runner.cache->Lease(p.size())).value());
    std::vector<size_t> done(prompts.size(), 0);
    std::vector<std::vector<float>> together(prompts.size());
    for (bool more = true; more;) {
      std::vector<SequenceSlice> batch;
      std::vector<size_t> owner;
      for (size_t i = 0; i < prompts.size(); ++i) {
        if (done[i] == prompts[i].size()) continue;
        batch.push_back(Runner::Slice(prompts[i], done[i], i % 2 == 0 ? 1 : 5 + i, leases[i]));
        const size_t n = batch.back().tokens.size();
        owner.insert(owner.end(), n, i);
        done[i] += n;
      }
      more = !batch.empty();
      if (!more) break;
      runner.transformer.Forward(batch);
      for (size_t row = 0; row < owner.size(); ++row) {
        const auto logits = runner.transformer.logits(row);
        together[owner[row]].insert(together[owner[row]].end(), logits.begin(), logits.end());
      }
    }
    for (size_t i = 0; i < prompts.size(); ++i) {
      EXPECT_TRUE(SameBits(together[i], alone[i])) << v.name << ", sequence " << i;
    }
  }
}

// With matrix units, what is of the prompt takes another way than what was generated. Only now and
// then is the difference large enough to change what is rounded to bf16: hence many rows, long
// sums.
TEST(Transformer, ABF16PromptTakesTheMatrixUnits) {
  if (!kernels::AmxAvailable()) GTEST_SKIP() << "no AMX here";
  ModelConfig config = SmallSpark();
  config.hidden_size = 720;
  Runner runner(config, DType::kBF16, ComputeType::kBF16, DType::kF32, 1);
  const auto tokens = RandomTokens(100, 1, config.vocab_size);
  const KvLease lease = std::move(runner.cache->Lease(100)).value();
  std::vector<float> logits[2];
  for (const bool prompt : {false, true}) {
    const SequenceSlice slice{tokens, 0, lease.blocks(), LogitRows::kAll, 0, prompt};
    runner.transformer.Forward({&slice, 1});
    runner.Append(logits[prompt ? 1 : 0]);
  }
  EXPECT_FALSE(SameBits(logits[0], logits[1]));
}

// So do the queries of a prompt, in whatever compute type has products on that unit. A step that
// sees its active sets takes them row by row, with the same bits.
TEST(Transformer, APromptAttendsOnTheMatrixUnits) {
  if (!kernels::AmxAvailable()) GTEST_SKIP() << "no AMX here";
  struct Probe : ActivityProbe {
    void OnFfnActive(size_t, size_t, std::span<const uint32_t>) override {}
    void OnAttended(size_t, size_t, size_t, std::span<const uint32_t> positions) override {
      const std::lock_guard lock(mutex);
      attended += positions.size();
    }
    std::mutex mutex;
    size_t attended = 0;
  };
  Runner runner(TiledSpark(), DType::kI8, ComputeType::kInteger, DType::kBF16, 2);
  const auto tokens = RandomTokens(100, 1, TiledSpark().vocab_size);
  const KvLease lease = std::move(runner.cache->Lease(100)).value();
  std::vector<float> generated, prompt, seen;
  Probe probe;
  for (auto [logits, is_prompt, sees] :
       {std::tuple{&generated, false, false}, {&prompt, true, false}, {&seen, true, true}}) {
    const SequenceSlice slice{tokens, 0, lease.blocks(), LogitRows::kAll, 0, is_prompt};
    runner.transformer.Forward({&slice, 1}, sees ? &probe : nullptr);
    runner.Append(*logits);
  }
  EXPECT_FALSE(SameBits(generated, prompt));
  EXPECT_TRUE(SameBits(seen, prompt));
  size_t attended = 0;
  for (const LayerActivity& layer : runner.transformer.activity()) {
    for (const RowActivity& row : layer.rows) attended += row.attended;
  }
  EXPECT_EQ(probe.attended, attended);
  double difference = 0, square = 0;
  for (size_t i = 0; i < prompt.size(); ++i) {
    difference += std::pow(static_cast<double>(prompt[i]) - static_cast<double>(generated[i]), 2);
    square += std::pow(static_cast<double>(generated[i]), 2);
  }
  // Now and then a score is on the other side of a threshold.
  EXPECT_LT(std::sqrt(difference / square), 0.05);
}

// Whether a prompt's FFN is computed for its active neurons or, on a matrix unit, for all, and on
// how many threads: the bits are the same, in chunks of any size.
TEST(Transformer, EveryWayOfComputingAPromptGivesTheSameBits) {
  ModelConfig config = SmallSpark();
  config.hidden_size = 192;
  config.ffn_predictor_dim = 64;
  config.intermediate_size = 1100;
  config.max_position_embeddings = 320;
  config.ffn_top_k = 300;
  const auto tokens = RandomTokens(301, 1, config.vocab_size);
  std::vector<float> first;
  for (const size_t threads : {1, 2, 3}) {
    Runner runner(config, DType::kI8, ComputeType::kInteger, DType::kBF16, threads);
    for (const FfnWay way : {FfnWay::kSparse, FfnWay::kDense, FfnWay::kMeasured}) {
      runner.transformer.SetFfnWay(way);
      for (const size_t chunk : {301, 100, 33, 7}) {
        const KvLease lease = std::move(runner.cache->Lease(tokens.size())).value();
        std::vector<float> logits;
        for (size_t at = 0; at < tokens.size(); at += chunk) {
          const size_t n = std::min(chunk, tokens.size() - at);
          const SequenceSlice slice{std::span(tokens).subspan(at, n), at, lease.blocks(),
                                    LogitRows::kAll};
          runner.transformer.Forward({&slice, 1});
          runner.Append(logits);
        }
        if (first.empty()) first = logits;
        ASSERT_TRUE(SameBits(logits, first))
            << threads << " threads, chunks of " << chunk << ", way " << static_cast<int>(way);
      }
    }
  }
}

// How often weights come from memory, if each worker has an L2 cache of 1.5 MiB for them: what the
// sparse FFN's order of reading is for. Least recently used goes first.
class ReadCounter : public ActivityProbe {
 public:
  ReadCounter(size_t threads, const ModelWeights& weights) : caches_(threads) {
    for (const LayerWeights& layer : weights.layers) {
      for (const Matrix* m :
           {&layer.qkv_proj, &layer.o_proj, &layer.gate_proj, &layer.up_proj, &layer.down_proj}) {
        reads_[m].resize(m->rows());
      }
    }
  }
  void OnFfnActive(size_t /*layer*/, size_t row, std::span<const uint32_t> neurons) override {
    const std::lock_guard lock(mutex_);
    if (row >= active_.size()) active_.resize(row + 1);
    active_[row].assign(neurons.begin(), neurons.end());
  }
  void OnAttended(size_t, size_t, size_t, std::span<const uint32_t>) override {}
  void OnWeightRow(const Matrix& weights, size_t worker, size_t row, size_t begin,
                   size_t end) override {
    const std::lock_guard lock(mutex_);
    Cache& cache = caches_[worker];
    const Key key{&weights, row, begin};
    if (const auto found = cache.at.find(key); found != cache.at.end()) {
      cache.order.splice(cache.order.end(), cache.order, found->second);
      return;
    }
    reads_.at(&weights)[row] +=
        static_cast<double>(end - begin) / static_cast<double>(weights.cols());
    const size_t bytes = kernels::BytesOf(weights.dtype(), end - begin);
    cache.at[key] = cache.order.insert(cache.order.end(), {key, bytes});
    for (cache.bytes += bytes; cache.bytes > size_t{1536} << 10; cache.order.pop_front()) {
      cache.bytes -= cache.order.front().second;
      cache.at.erase(cache.order.front().first);
    }
  }

  /// Times that each row of a matrix came from memory.
  const std::vector<double>& reads(const Matrix& weights) const { return reads_.at(&weights); }
  /// How many of the rows [begin, end) of the step, in a model of one layer, need each neuron.
  std::vector<size_t> Needed(size_t num_neurons, IndexRange rows) const {
    std::vector<size_t> needed(num_neurons);
    for (size_t row = rows.begin; row < rows.end; ++row) {
      for (const uint32_t neuron : active_[row]) ++needed[neuron];
    }
    return needed;
  }

 private:
  using Key = std::tuple<const Matrix*, size_t, size_t>;
  struct Cache {
    std::list<std::pair<Key, size_t>> order;
    std::map<Key, std::list<std::pair<Key, size_t>>::iterator> at;
    size_t bytes = 0;
  };
  std::mutex mutex_;
  std::vector<Cache> caches_;
  std::map<const Matrix*, std::vector<double>> reads_;
  std::vector<std::vector<uint32_t>> active_;
};

// A lone sequence reads each row that it needs once. Sequences of a batch share what one of them
// has read, and so do the rows of a prompt that a worker has. A dense FFN reads all.
TEST(Transformer, EachWeightRowIsReadOnce) {
  ModelConfig config = SmallSpark();
  config.hidden_size = 1024;
  config.ffn_predictor_dim = 512;
  config.intermediate_size = 8192;
  config.ffn_top_k = 655;
  config.num_layers = 1;
  config.layer_types.resize(1);
  for (const auto& [type, compute] : {std::pair{DType::kI8, ComputeType::kInteger},
                                      {DType::kBF16, ComputeType::kF32},
                                      {DType::kBF16, ComputeType::kBF16}}) {
    for (const size_t threads : {1, 2}) {
      Runner runner(config, type, compute, DType::kBF16, threads);
      const LayerWeights& layer = runner.weights->layers[0];
      for (const auto& [rows, way] : {std::pair<size_t, FfnWay>{1, FfnWay::kMeasured},
                                      {8, FfnWay::kMeasured},
                                      {80, FfnWay::kSparse},
                                      {80, FfnWay::kDense}}) {
        // In bf16 prompts have one way on the matrix unit.
        const bool prompt = compute == ComputeType::kBF16;
        const bool all = kernels::AmxAvailable() &&
                         (prompt ? rows == 80 : way == FfnWay::kDense && type == DType::kI8);
        SCOPED_TRACE(testing::Message()
                     << DTypeName(type) << ", " << threads << " threads, " << rows << " rows");
        const auto tokens = RandomTokens(rows, 3, config.vocab_size);
        const KvLease lease = std::move(runner.cache->Lease(rows)).value();
        const SequenceSlice slice{tokens, 0, lease.blocks(), LogitRows::kLast, 0, prompt};
        ReadCounter counter(threads, *runner.weights);
        runner.transformer.SetFfnWay(way);
        runner.transformer.Forward({&slice, 1}, &counter);
        for (const Matrix* dense : {&layer.qkv_proj, &layer.o_proj, &layer.gate_proj}) {
          EXPECT_THAT(counter.reads(*dense), Each(1.0));
        }
        // The workers share the neurons of a batch, and the rows of a prompt.
        const size_t parts = rows > 32 ? threads : 1;
        std::vector<double> expected(config.intermediate_size);
        for (size_t part = 0; part < parts; ++part) {
          const IndexRange share{rows * part / parts, rows * (part + 1) / parts};
          const auto needed = counter.Needed(expected.size(), share);
          for (size_t n = 0; n < needed.size(); ++n) expected[n] += needed[n] > 0 ? 1 : 0;
        }
        if (all) expected.assign(config.intermediate_size, 1.0);  // they share all neurons
        EXPECT_THAT(counter.reads(layer.up_proj), Pointwise(DoubleNear(1e-9), expected));
        EXPECT_THAT(counter.reads(layer.down_proj), Pointwise(DoubleNear(1e-9), expected));
        const LayerActivity& activity = runner.transformer.activity()[0];
        EXPECT_LT(activity.ffn_union, expected.size());
        EXPECT_EQ(activity.ffn_read, all ? expected.size() : activity.ffn_union);
      }
    }
  }
}

TEST(Transformer, ActivityCountsWhatWasActive) {
  const ModelConfig c = SmallSpark();
  Runner runner(c, DType::kBF16, ComputeType::kF32, DType::kBF16, 2);
  struct Counter : ActivityProbe {
    Counter(size_t layers, size_t rows, size_t heads)
        : num_rows(rows), num_heads(heads), ffn(layers * rows), kept(layers * rows * heads) {}
    void OnFfnActive(size_t layer, size_t row, std::span<const uint32_t> neurons) override {
      ffn[layer * num_rows + row].assign(neurons.begin(), neurons.end());
    }
    void OnAttended(size_t layer, size_t row, size_t head,
                    std::span<const uint32_t> positions) override {
      kept[(layer * num_rows + row) * num_heads + head] = static_cast<uint32_t>(positions.size());
    }
    size_t num_rows;
    size_t num_heads;
    std::vector<std::vector<uint32_t>> ffn;
    std::vector<uint32_t> kept;
  };
  const size_t n = 100;
  Counter counter(c.num_layers, n, c.num_heads);
  const auto tokens = RandomTokens(n, 5, c.vocab_size);
  const KvLease lease = std::move(runner.cache->Lease(n)).value();
  const SequenceSlice slice{tokens, 0, lease.blocks(), LogitRows::kLast};
  runner.transformer.Forward({&slice, 1}, &counter);
  ASSERT_EQ(runner.transformer.num_logit_rows(), 1u);
  double mean_active = 0;
  for (size_t layer = 0; layer < c.num_layers; ++layer) {
    const LayerActivity& activity = runner.transformer.activity()[layer];
    ASSERT_EQ(activity.rows.size(), n);
    std::vector<uint8_t> needed(c.intermediate_size, 0);
    for (size_t row = 0; row < n; ++row) {
      const auto& neurons = counter.ffn[layer * n + row];
      EXPECT_EQ(activity.rows[row].ffn_active, neurons.size());
      for (uint32_t neuron : neurons) needed[neuron] = 1;
      mean_active += static_cast<double>(neurons.size());
      const uint32_t* kept = &counter.kept[(layer * n + row) * c.num_heads];
      EXPECT_EQ(activity.rows[row].attended, std::accumulate(kept, kept + c.num_heads, 0u));
      const bool sliding = c.layer_types[layer] == AttentionKind::kSliding;
      EXPECT_EQ(activity.rows[row].visible,
                std::min(row + 1, sliding ? c.sliding_window : row + 1));
    }
    EXPECT_EQ(activity.ffn_union, std::accumulate(needed.begin(), needed.end(), 0u));
  }
  // Gaussian weights: statistical top-k finds about its target, 32 of 400.
  EXPECT_NEAR(mean_active / static_cast<double>(n * c.num_layers), 32, 8);
}

// Rounding keys and values moves logits a little, and only from the first cached position on.
TEST(Transformer, ABF16CacheIsNearAnF32One) {
  // Every position is kept: where heads choose, a rounded score may choose another position.
  ModelConfig spark = SmallSpark();
  spark.attention_top_k = 200;
  for (const ModelConfig& config : {spark, DenseTwin(spark)}) {
    Runner exact(config, DType::kF32, ComputeType::kF32, DType::kF32, 1);
    Runner rounded(config, DType::kF32, ComputeType::kF32, DType::kBF16, 1);
    const auto tokens = RandomTokens(100, 3, config.vocab_size);
    const auto a = exact.Run(tokens, 100);
    const auto b = rounded.Run(tokens, 100);
    ASSERT_EQ(a.size(), b.size());
    EXPECT_FALSE(SameBits(a, b));
    double difference = 0, square = 0;
    for (size_t i = 0; i < a.size(); ++i) {
      difference += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
      square += std::pow(static_cast<double>(a[i]), 2);
    }
    // bf16 has eight bits: each rounding is off by up to 2^-9, and layers add up.
    EXPECT_LT(std::sqrt(difference / square), 0.05);
  }
}

TEST(CostModel, KvBytesAreThoseOfTheElements) {
  const ModelConfig c = SmallSpark();  // 4 query heads, 2 KV heads of 24, of which 10 predict
  const RowActivity row{.attended = 32, .visible = 20};
  const auto spark = MakeSyntheticWeights(c, DType::kBF16, 1);
  EXPECT_EQ(CostModel(*spark, DType::kF32).KvBytes(row), 4.0 * (20 * 2 * 10 + 32 * (14 + 24)));
  EXPECT_EQ(CostModel(*spark, DType::kBF16).KvBytes(row), 2.0 * (20 * 2 * 10 + 32 * (14 + 24)));
  // Dense: all 20 positions, keys and values, once a KV head.
  const RowActivity all{.attended = 4 * 20, .visible = 20};
  const auto dense = MakeSyntheticWeights(DenseTwin(c), DType::kBF16, 1);
  EXPECT_EQ(CostModel(*dense, DType::kBF16).KvBytes(all), 2.0 * 20 * 2 * (24 + 24));
}

TEST(KvBlockPool, BF16TakesHalfOfF32) {
  const ModelConfig c = SmallSpark();
  EXPECT_EQ(KvBlockPool::BytesPerBlock(c, DType::kF32), 3 * 2 * 32 * 2 * 24 * sizeof(float));
  EXPECT_EQ(2 * KvBlockPool::BytesPerBlock(c, DType::kBF16),
            KvBlockPool::BytesPerBlock(c, DType::kF32));
}

TEST(KvBlockPool, LeasesBalance) {
  const ModelConfig c = SmallSpark();
  auto pool = std::move(KvBlockPool::Create(c, DType::kF32,
                                            KvBlockPool::BytesPerBlock(c, DType::kF32) * 4 + 17))
                  .value();
  EXPECT_EQ(pool->total_blocks(), 4u);
  {
    KvLease a = std::move(pool->Lease(33)).value();
    EXPECT_EQ(a.capacity_tokens(), 64u);
    EXPECT_EQ(pool->available_blocks(), 2u);
    EXPECT_EQ(pool->usage_ratio(), 0.5);
    EXPECT_EQ(pool->Lease(65).status().code(), absl::StatusCode::kResourceExhausted);
    const KvLease b = std::move(pool->Lease(64)).value();
    EXPECT_EQ(pool->available_blocks(), 0u);
    KvLease moved = std::move(a);
    EXPECT_EQ(moved.blocks().size(), 2u);
    moved = KvLease();
  }
  EXPECT_EQ(pool->available_blocks(), 4u);
  EXPECT_EQ(KvBlockPool::Create(c, DType::kF32, 10).status().code(),
            absl::StatusCode::kResourceExhausted);
}

}  // namespace
}  // namespace firesteel
