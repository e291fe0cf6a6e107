// The shape of a model, read from a checkpoint's config.json and checked against every limit.

#ifndef FIRESTEEL_RUNTIME_CHECKPOINT_MODEL_CONFIG_H_
#define FIRESTEEL_RUNTIME_CHECKPOINT_MODEL_CONFIG_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace firesteel {

enum class Architecture : uint8_t { kGemma2, kSparkGemma2 };
enum class AttentionKind : uint8_t { kSliding, kFull };

/// A validated shape: every size is positive and bounded, all relations between fields hold (see
/// ParseModelConfig). Plain data; names follow config.json.
struct ModelConfig {
  Architecture architecture = Architecture::kGemma2;
  size_t vocab_size = 0;
  size_t hidden_size = 0;        // d
  size_t intermediate_size = 0;  // F
  size_t num_layers = 0;
  size_t num_heads = 0;     // H
  size_t num_kv_heads = 0;  // G
  size_t head_dim = 0;      // A
  size_t sliding_window = 0;
  size_t max_position_embeddings = 0;      // the context: positions a sequence may have
  std::vector<AttentionKind> layer_types;  // [num_layers]
  double query_pre_attn_scalar = 0;
  double rope_theta = 10000.0;
  double attn_logit_softcapping = 0;   // 0: none
  double final_logit_softcapping = 0;  // 0: none
  double rms_norm_eps = 1e-6;
  int32_t bos_token_id = 2;
  std::vector<int32_t> eos_token_ids = {1};
  // Spark only; 0 in a dense model.
  size_t ffn_predictor_dim = 0;
  size_t ffn_top_k = 0;
  size_t attention_predictor_dim = 0;
  size_t attention_top_k = 0;

  bool spark() const { return architecture == Architecture::kSparkGemma2; }
  /// Learned parameters of the whole model, the tied embedding counted once.
  size_t NumParameters() const;
  bool operator==(const ModelConfig&) const = default;
};

/// Sampling defaults of a model (generation_config.json), where present.
struct GenerationDefaults {
  float temperature = 1.0f;
  uint32_t top_k = 0;  // 0: off
  float top_p = 1.0f;
  float min_p = 0.0f;

  bool operator==(const GenerationDefaults&) const = default;
};

/// Parses and checks the text of a config.json. InvalidArgument names the key, its value and the
/// limit.
absl::StatusOr<ModelConfig> ParseModelConfig(absl::string_view json_text);

/// The keys of config.json that ParseModelConfig reads, with all values of a valid `config`: parsed
/// again, it is equal.
std::string ModelConfigToJson(const ModelConfig& config);

/// Reads FOLDER/config.json. NotFound where there is none.
absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& folder);

/// Parses and checks the text of a generation_config.json; the defaults above where a key is
/// absent.
absl::StatusOr<GenerationDefaults> ParseGenerationDefaults(absl::string_view json_text);

/// The keys that ParseGenerationDefaults reads: parsed again, they are equal.
std::string GenerationDefaultsToJson(const GenerationDefaults& defaults);

/// Reads FOLDER/generation_config.json, or what a packed file has of it; the defaults above where
/// there is none.
absl::StatusOr<GenerationDefaults> LoadGenerationDefaults(const std::string& path);

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_CHECKPOINT_MODEL_CONFIG_H_
