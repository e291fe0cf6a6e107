#include "runtime/checkpoint/model_config.h"

#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include "runtime/checkpoint/files.h"
#include "runtime/checkpoint/json_text.h"

namespace firesteel {
namespace {

// Far above any model that a CPU can serve, and so small that no product of them overflows 64 bits:
// the largest, layers · F · d · 4 bytes, is 2^10 · 2^20 · 2^17 · 2^2.
constexpr size_t kMaxVocabSize = size_t{1} << 24;
constexpr size_t kMaxHiddenSize = size_t{1} << 17;
constexpr size_t kMaxIntermediateSize = size_t{1} << 20;
constexpr size_t kMaxLayers = size_t{1} << 10;
constexpr size_t kMaxHeads = size_t{1} << 10;
constexpr size_t kMaxHeadDim = size_t{1} << 12;
constexpr size_t kMaxPositions = size_t{1} << 20;
constexpr size_t kMaxWindow = size_t{1} << 30;
constexpr size_t kMaxTopK = size_t{1} << 30;
constexpr size_t kMaxEosTokens = 64;
constexpr size_t kMaxConfigBytes = size_t{1} << 20;

// Positive numbers that stay positive and finite as floats, and so do their squares.
constexpr Bounds<double> kPositive = {1e-6, 1e9};
constexpr Bounds<double> kSoftCap = {1e-3, 1e6};
constexpr Bounds<double> kRopeTheta = {1.0, 1e12};
constexpr Bounds<double> kNormEps = {1e-12, 1e-1};

void ReadArchitecture(JsonFields* fields, ModelConfig* config) {
  std::string type;
  fields->String("model_type", &type);
  if (!fields->ok()) return;
  if (type == "spark_gemma2") {
    config->architecture = Architecture::kSparkGemma2;
  } else if (type == "gemma2") {
    config->architecture = Architecture::kGemma2;
  } else {
    fields->Fail("model_type", "it must be \"spark_gemma2\" or \"gemma2\"");
  }
}

void ReadSizes(JsonFields* fields, ModelConfig* config) {
  fields->Integer("vocab_size", {1, kMaxVocabSize}, &config->vocab_size);
  fields->Integer("hidden_size", {1, kMaxHiddenSize}, &config->hidden_size);
  fields->Integer("intermediate_size", {1, kMaxIntermediateSize}, &config->intermediate_size);
  fields->Integer("num_hidden_layers", {1, kMaxLayers}, &config->num_layers);
  fields->Integer("num_attention_heads", {1, kMaxHeads}, &config->num_heads);
  fields->Integer("num_key_value_heads", {1, kMaxHeads}, &config->num_kv_heads);
  fields->Integer("head_dim", {2, kMaxHeadDim}, &config->head_dim);
  fields->Integer("max_position_embeddings", {1, kMaxPositions}, &config->max_position_embeddings);
  if (!fields->ok()) return;
  if (config->num_heads % config->num_kv_heads != 0) {
    fields->Fail(
        "num_attention_heads",
        absl::StrCat("it must be a multiple of num_key_value_heads, ", config->num_kv_heads));
  }
  if (config->head_dim % 2 != 0) fields->Fail("head_dim", "it must be even");
}

void ReadLayerTypes(JsonFields* fields, ModelConfig* config) {
  if (!fields->ok()) return;
  const nlohmann::json* const list = fields->Find("layer_types");
  if (list == nullptr) {
    for (size_t i = 0; i < config->num_layers; ++i) {
      config->layer_types.push_back(i % 2 == 0 ? AttentionKind::kSliding : AttentionKind::kFull);
    }
    return;
  }
  if (!list->is_array() || list->size() != config->num_layers) {
    fields->Fail(
        "layer_types",
        absl::StrCat("it must be a list of num_hidden_layers = ", config->num_layers, " names",
                     list->is_array() ? absl::StrCat(", not ", list->size()) : ""));
    return;
  }
  for (const nlohmann::json& item : *list) {
    if (item == "sliding_attention") {
      config->layer_types.push_back(AttentionKind::kSliding);
    } else if (item == "full_attention") {
      config->layer_types.push_back(AttentionKind::kFull);
    } else {
      fields->Fail(
          "layer_types",
          absl::StrCat("element ", config->layer_types.size(), " is ", JsonForMessage(item),
                       ", not \"sliding_attention\" or \"full_attention\""));
      return;
    }
  }
}

void ReadWindow(JsonFields* fields, ModelConfig* config) {
  bool sliding = false;
  for (const AttentionKind kind : config->layer_types) sliding |= kind == AttentionKind::kSliding;
  // Only a sliding layer needs a window; without one the context is as good as any.
  config->sliding_window = config->max_position_embeddings;
  if (sliding) {
    fields->Integer("sliding_window", {1, kMaxWindow}, &config->sliding_window);
  } else {
    fields->OptionalInteger("sliding_window", {1, kMaxWindow}, &config->sliding_window);
  }
}

void ReadNumbers(JsonFields* fields, ModelConfig* config) {
  config->query_pre_attn_scalar = static_cast<double>(config->head_dim);
  fields->OptionalReal("query_pre_attn_scalar", kPositive, &config->query_pre_attn_scalar);
  fields->OptionalReal("rope_theta", kRopeTheta, &config->rope_theta);
  fields->RealOrNull("attn_logit_softcapping", kSoftCap, &config->attn_logit_softcapping);
  fields->RealOrNull("final_logit_softcapping", kSoftCap, &config->final_logit_softcapping);
  fields->OptionalReal("rms_norm_eps", kNormEps, &config->rms_norm_eps);
}

void ReadSpecialTokens(JsonFields* fields, ModelConfig* config) {
  if (!fields->ok()) return;
  const Bounds<size_t> in_vocabulary = {0, config->vocab_size - 1};
  size_t bos = static_cast<size_t>(config->bos_token_id);
  if (fields->Has("bos_token_id")) {
    fields->Integer("bos_token_id", in_vocabulary, &bos);
  } else if (bos > in_vocabulary.max) {
    fields->Fail("bos_token_id", "the default, 2, is past vocab_size");
  }
  config->bos_token_id = static_cast<int32_t>(bos);

  const nlohmann::json* const eos = fields->Find("eos_token_id");
  if (eos == nullptr) {
    if (in_vocabulary.max < 1) fields->Fail("eos_token_id", "the default, 1, is past vocab_size");
    return;
  }
  if (eos->is_array() && (eos->empty() || eos->size() > kMaxEosTokens)) {
    fields->Fail("eos_token_id", absl::StrCat("a list must have 1 to ", kMaxEosTokens,
                                              " tokens, not ", eos->size()));
    return;
  }
  config->eos_token_ids.clear();
  const nlohmann::json list = eos->is_array() ? *eos : nlohmann::json::array({*eos});
  for (const nlohmann::json& item : list) {
    size_t id = 0;
    if (!fields->CheckInteger("eos_token_id", item, in_vocabulary, &id)) return;
    config->eos_token_ids.push_back(static_cast<int32_t>(id));
  }
}

void ReadPredictors(JsonFields* fields, ModelConfig* config) {
  if (!config->spark() || !fields->ok()) return;
  // Both bounds are exclusive in the paper's terms: 0 < r < d and 0 < k < F.
  fields->Integer("ffn_predictor_dim", {1, config->hidden_size - 1}, &config->ffn_predictor_dim);
  fields->Integer("ffn_top_k", {1, config->intermediate_size - 1}, &config->ffn_top_k);
  fields->Integer("attention_predictor_dim", {1, config->head_dim - 1},
                  &config->attention_predictor_dim);
  fields->Integer("attention_top_k", {1, kMaxTopK}, &config->attention_top_k);
  // head_dim is even, so the other part is even where this one is.
  if (fields->ok() && config->attention_predictor_dim % 2 != 0) {
    fields->Fail("attention_predictor_dim", "both parts of a head must be even");
  }
}

/// What the runtime has only one way of doing: another value would be served wrongly, so it is
/// refused by name.
void RefuseOtherArchitectures(JsonFields* fields) {
  // Older files say hidden_act, newer ones hidden_activation, and the newer key counts where both
  // stand.
  const char* const activation =
      fields->Has("hidden_activation") ? "hidden_activation" : "hidden_act";
  if (const nlohmann::json* value = fields->Find(activation)) {
    if (*value != "gelu_pytorch_tanh") {
      fields->Fail(activation, "only \"gelu_pytorch_tanh\" is supported");
    }
  }
  bool tied = true;
  fields->OptionalBool("tie_word_embeddings", &tied);
  if (!tied) fields->Fail("tie_word_embeddings", "only tied embeddings are supported");
  for (const char* key : {"attention_bias", "use_bidirectional_attention"}) {
    bool set = false;
    fields->OptionalBool(key, &set);
    if (set) fields->Fail(key, "it is not supported");
  }
  for (const char* key : {"rope_scaling", "rope_parameters", "quantization_config"}) {
    if (fields->Has(key)) fields->Fail(key, "it is not supported");
  }
}

}  // namespace

size_t ModelConfig::NumParameters() const {
  const size_t d = hidden_size;
  const size_t attention = 2 * (num_heads + num_kv_heads) * head_dim * d;
  // Spark splits one input over gate and up: r · F + (d − r) · F, and down has d · F.
  const size_t feed_forward = (spark() ? 2 : 3) * d * intermediate_size;
  return vocab_size * d + num_layers * (attention + feed_forward + 4 * d) + d;
}

absl::StatusOr<ModelConfig> ParseModelConfig(absl::string_view json_text) {
  absl::StatusOr<nlohmann::json> document = ParseJsonObject(json_text);
  if (!document.ok()) return document.status();
  JsonFields fields(*document);
  ModelConfig config;
  ReadArchitecture(&fields, &config);
  ReadSizes(&fields, &config);
  ReadLayerTypes(&fields, &config);
  ReadWindow(&fields, &config);
  ReadNumbers(&fields, &config);
  ReadSpecialTokens(&fields, &config);
  ReadPredictors(&fields, &config);
  RefuseOtherArchitectures(&fields);
  if (!fields.ok()) return fields.status();
  return config;
}

std::string ModelConfigToJson(const ModelConfig& config) {
  nlohmann::json layer_types = nlohmann::json::array();
  for (const AttentionKind kind : config.layer_types) {
    layer_types.push_back(kind == AttentionKind::kSliding ? "sliding_attention" : "full_attention");
  }
  nlohmann::json json = {
      {"model_type", config.spark() ? "spark_gemma2" : "gemma2"},
      {"vocab_size", config.vocab_size},
      {"hidden_size", config.hidden_size},
      {"intermediate_size", config.intermediate_size},
      {"num_hidden_layers", config.num_layers},
      {"num_attention_heads", config.num_heads},
      {"num_key_value_heads", config.num_kv_heads},
      {"head_dim", config.head_dim},
      {"max_position_embeddings", config.max_position_embeddings},
      {"sliding_window", config.sliding_window},
      {"layer_types", std::move(layer_types)},
      {"query_pre_attn_scalar", config.query_pre_attn_scalar},
      {"rope_theta", config.rope_theta},
      {"attn_logit_softcapping", config.attn_logit_softcapping},
      {"final_logit_softcapping", config.final_logit_softcapping},
      {"rms_norm_eps", config.rms_norm_eps},
      {"bos_token_id", config.bos_token_id},
      {"eos_token_id", config.eos_token_ids},
      {"hidden_activation", "gelu_pytorch_tanh"},
      {"tie_word_embeddings", true},
  };
  if (config.spark()) {
    json["ffn_predictor_dim"] = config.ffn_predictor_dim;
    json["ffn_top_k"] = config.ffn_top_k;
    json["attention_predictor_dim"] = config.attention_predictor_dim;
    json["attention_top_k"] = config.attention_top_k;
  }
  return json.dump();
}

absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& folder) {
  const std::string path = JoinPath(folder, "config.json");
  absl::StatusOr<std::string> text = ReadFile(path, kMaxConfigBytes);
  if (!text.ok()) return text.status();
  absl::StatusOr<ModelConfig> config = ParseModelConfig(*text);
  if (!config.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", config.status().message()));
  }
  return config;
}

}  // namespace firesteel
