#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include "runtime/checkpoint/files.h"
#include "runtime/checkpoint/json_text.h"
#include "runtime/checkpoint/model_config.h"

namespace firesteel {
namespace {

constexpr size_t kMaxDefaultsBytes = size_t{1} << 20;
constexpr double kMaxTemperature = 100.0;
constexpr double kMinTopP = 1e-6;  // top_p is exclusive of 0

}  // namespace

absl::StatusOr<GenerationDefaults> LoadGenerationDefaults(const std::string& folder) {
  const std::string path = JoinPath(folder, "generation_config.json");
  absl::StatusOr<std::string> text = ReadFile(path, kMaxDefaultsBytes);
  if (absl::IsNotFound(text.status())) return GenerationDefaults{};
  if (!text.ok()) return text.status();
  absl::StatusOr<nlohmann::json> document = ParseJsonObject(*text);
  if (!document.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", document.status().message()));
  }

  JsonFields fields(*document);
  double temperature = 1.0, top_p = 1.0, min_p = 0.0;
  size_t top_k = 0;
  bool sample = true;
  fields.OptionalReal("temperature", {0.0, kMaxTemperature}, &temperature);
  fields.OptionalInteger("top_k", {0, size_t{1} << 24}, &top_k);
  fields.OptionalReal("top_p", {kMinTopP, 1.0}, &top_p);
  fields.OptionalReal("min_p", {0.0, 1.0}, &min_p);
  fields.OptionalBool("do_sample", &sample);
  if (!fields.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", fields.status().message()));
  }
  GenerationDefaults defaults;
  defaults.temperature = sample ? static_cast<float>(temperature) : 0.0f;
  defaults.top_k = static_cast<uint32_t>(top_k);
  defaults.top_p = static_cast<float>(top_p);
  defaults.min_p = static_cast<float>(min_p);
  return defaults;
}

}  // namespace firesteel
