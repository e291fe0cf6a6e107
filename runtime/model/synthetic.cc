#include "runtime/model/synthetic.h"

#include <cmath>
#include <random>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace firesteel {
namespace {

// Standard normal numbers to pick from: drawing each of a 2B model's 2.6 G weights anew would take
// minutes.
class NormalTable {
 public:
  explicit NormalTable(uint64_t seed) : state_(seed) {
    std::mt19937_64 engine(seed);
    std::normal_distribution<float> normal;
    for (float& v : values_) v = normal(engine);
  }
  float Next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return values_[state_ >> (64 - kBits)];
  }

 private:
  static constexpr int kBits = 16;
  uint64_t state_;
  std::vector<float> values_ = std::vector<float>(size_t{1} << kBits);
};

Matrix RandomMatrix(size_t rows, size_t cols, size_t fan_in, kernels::DType dtype,
                    NormalTable& normal) {
  Matrix matrix(rows, cols, dtype);
  const float scale = 1.0f / std::sqrt(static_cast<float>(fan_in));
  std::vector<float> row(cols);
  for (size_t r = 0; r < rows; ++r) {
    for (float& value : row) value = scale * normal.Next();
    matrix.SetRow(r, row.data());
  }
  return matrix;
}

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

std::shared_ptr<const ModelWeights> MakeSyntheticWeights(const ModelConfig& config,
                                                         kernels::DType dtype, uint64_t seed) {
  NormalTable normal(seed);
  const size_t d = config.hidden_size;
  const size_t f = config.intermediate_size;
  const size_t q = config.num_heads * config.head_dim;
  const size_t kv = config.num_kv_heads * config.head_dim;
  const size_t gate_in = config.spark() ? config.ffn_predictor_dim : d;
  const size_t up_in = config.spark() ? d - gate_in : d;

  auto weights = std::make_shared<ModelWeights>();
  weights->config = config;
  weights->dtype = dtype;
  weights->embedding = RandomMatrix(config.vocab_size, d, d, dtype, normal);
  weights->final_norm.assign(d, 0.0f);
  for (size_t i = 0; i < config.num_layers; ++i) {
    LayerWeights layer;
    layer.input_norm.assign(d, 0.0f);
    layer.post_attention_norm.assign(d, 0.0f);
    layer.pre_feedforward_norm.assign(d, 0.0f);
    layer.post_feedforward_norm.assign(d, 0.0f);
    layer.qkv_proj = RandomMatrix(q + 2 * kv, d, d, dtype, normal);
    layer.o_proj = RandomMatrix(d, q, q, dtype, normal);
    layer.gate_proj = RandomMatrix(f, gate_in, gate_in, dtype, normal);
    layer.up_proj = RandomMatrix(f, up_in, up_in, dtype, normal);
    layer.down_proj = config.spark() ? RandomMatrix(f, d, f, dtype, normal)
                                     : RandomMatrix(d, f, f, dtype, normal);
    weights->layers.push_back(std::move(layer));
  }
  return weights;
}

}  // namespace firesteel
