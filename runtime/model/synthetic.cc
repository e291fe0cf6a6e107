#include "runtime/model/synthetic.h"

#include <cmath>
#include <random>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace firesteel {
namespace {

// Standard normal numbers to pick from: drawing each of a 2B model's 2.6 G weights anew would take
// minutes.
class NormalTable {
 public:
  explicit NormalTable(uint64_t seed) {
    std::mt19937_64 engine(seed);
    std::normal_distribution<float> normal;
    for (float& v : values_) v = normal(engine);
  }
  float operator[](uint64_t state) const { return values_[state >> (64 - kBits)]; }

 private:
  static constexpr int kBits = 16;
  std::vector<float> values_ = std::vector<float>(size_t{1} << kBits);
};

// A linear congruential generator that can skip ahead, so that threads share one sequence.
class Sequence {
 public:
  explicit Sequence(uint64_t state) : state_(state) {}
  uint64_t Next() { return state_ = state_ * kFactor + kTerm; }
  // The sequence `steps` further on.
  Sequence After(uint64_t steps) const {
    // x -> factor · x + term, applied 1, 2, 4, … times.
    uint64_t factor = kFactor, term = kTerm, state = state_;
    for (; steps > 0; steps >>= 1) {
      if ((steps & 1) != 0) state = state * factor + term;
      term += factor * term;
      factor *= factor;
    }
    return Sequence(state);
  }

 private:
  static constexpr uint64_t kFactor = 6364136223846793005u;
  static constexpr uint64_t kTerm = 1442695040888963407u;
  uint64_t state_;
};

// All matrices draw from one sequence, in the order of ModelParts.
class SyntheticSource final : public WeightSource {
 public:
  SyntheticSource(ModelConfig config, const WeightTypes& types, uint64_t seed, size_t threads)
      : config_(std::move(config)),
        types_(types),
        threads_(threads),
        normal_(seed),
        sequence_(seed) {}

  const ModelConfig& config() const override { return config_; }
  const WeightTypes& types() const override { return types_; }

  absl::StatusOr<Matrix> ReadMatrix(const ModelPart& part) override {
    Matrix matrix(part.rows, part.cols, types_[part.role(config_.spark())]);
    // Of down_proj, a Spark model's rows are the transposed matrix's columns.
    const bool transposed = part.kind == PartKind::kDownProj && config_.spark();
    const size_t fan_in = transposed ? part.rows : part.cols;
    const float scale = 1.0f / std::sqrt(static_cast<float>(fan_in));
    const absl::Status status = ForEachShare(part.rows, threads_, [&](size_t begin, size_t end) {
      Sequence sequence = sequence_.After(begin * part.cols);
      std::vector<float> row(part.cols);
      for (size_t r = begin; r < end; ++r) {
        for (float& value : row) value = scale * normal_[sequence.Next()];
        matrix.SetRow(r, row.data());
      }
      return absl::OkStatus();
    });
    if (!status.ok()) return status;
    sequence_ = sequence_.After(part.rows * part.cols);
    return matrix;
  }

  absl::StatusOr<std::vector<float>> ReadVector(const ModelPart& part) override {
    return std::vector<float>(part.cols, 0.0f);  // norms are stored less one
  }

 private:
  const ModelConfig config_;
  const WeightTypes types_;
  const size_t threads_;
  const NormalTable normal_;
  Sequence sequence_;
};

std::vector<AttentionKind> Alternating(size_t layers) {
  std::vector<AttentionKind> kinds(layers);
  for (size_t i = 0; i < layers; ++i) {
    kinds[i] = i % 2 == 0 ? AttentionKind::kSliding : AttentionKind::kFull;
  }
  return kinds;
}

ModelConfig SparkGemma2Of2B() {
  ModelConfig c;
  c.architecture = Architecture::kSparkGemma2;
  c.vocab_size = 256000;
  c.hidden_size = 2304;
  c.intermediate_size = 13824;
  c.num_layers = 26;
  c.num_heads = 8;
  c.num_kv_heads = 4;
  c.head_dim = 256;
  c.sliding_window = 4096;
  c.max_position_embeddings = 8192;
  c.layer_types = Alternating(c.num_layers);
  c.query_pre_attn_scalar = 256;
  c.attn_logit_softcapping = 50;
  c.final_logit_softcapping = 30;
  c.ffn_predictor_dim = 1024;
  c.ffn_top_k = 1106;
  c.attention_predictor_dim = 128;
  c.attention_top_k = 256;
  return c;
}

ModelConfig SparkStories() {
  ModelConfig c = SparkGemma2Of2B();
  c.vocab_size = 8192;
  c.hidden_size = 512;
  c.intermediate_size = 3072;
  c.num_layers = 7;
  c.head_dim = 64;
  c.sliding_window = 256;
  c.max_position_embeddings = 1024;
  c.layer_types = Alternating(c.num_layers);
  c.query_pre_attn_scalar = 64;
  c.ffn_predictor_dim = 256;
  c.ffn_top_k = 246;
  c.attention_predictor_dim = 32;
  c.attention_top_k = 64;
  return c;
}

}  // namespace

std::vector<std::string> ShapeNames() {
  return {"spark-gemma2-2b", "gemma2-2b", "spark-stories", "dense-stories"};
}

absl::StatusOr<ModelConfig> NamedShape(absl::string_view name) {
  if (name == "spark-gemma2-2b") return SparkGemma2Of2B();
  if (name == "gemma2-2b") return DenseTwin(SparkGemma2Of2B());
  if (name == "spark-stories") return SparkStories();
  if (name == "dense-stories") return DenseTwin(SparkStories());
  return absl::NotFoundError(
      absl::StrCat("shape \"", name, "\" is not one of ", absl::StrJoin(ShapeNames(), ", ")));
}

ModelConfig DenseTwin(const ModelConfig& spark) {
  ModelConfig dense = spark;
  dense.architecture = Architecture::kGemma2;
  dense.intermediate_size = spark.intermediate_size * 2 / 3;
  dense.ffn_predictor_dim = dense.ffn_top_k = 0;
  dense.attention_predictor_dim = dense.attention_top_k = 0;
  return dense;
}

std::unique_ptr<WeightSource> MakeSyntheticSource(const ModelConfig& config,
                                                  const WeightTypes& types, uint64_t seed,
                                                  size_t threads) {
  return std::make_unique<SyntheticSource>(config, types, seed, threads);
}

std::shared_ptr<const ModelWeights> MakeSyntheticWeights(const ModelConfig& config,
                                                         const WeightTypes& types, uint64_t seed) {
  SyntheticSource source(config, types, seed, 1);
  return AssembleWeights(&source, 1).value();
}

}  // namespace firesteel
