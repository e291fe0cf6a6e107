#include <algorithm>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include "runtime/checkpoint/files.h"
#include "runtime/checkpoint/json_text.h"
#include "runtime/checkpoint/model_config.h"
#include "runtime/checkpoint/packed_file.h"

namespace firesteel {
namespace {

constexpr size_t kMaxDefaultsBytes = size_t{1} << 20;
constexpr double kMaxTemperature = 100.0;
constexpr double kMinTopP = 1e-6;  // top_p is exclusive of 0

}  // namespace

absl::StatusOr<GenerationDefaults> ParseGenerationDefaults(absl::string_view json_text) {
  absl::StatusOr<nlohmann::json> document = ParseJsonObject(json_text);
  if (!document.ok()) return document.status();
  JsonFields fields(*document);
  double temperature = 1.0, top_p = 1.0, min_p = 0.0;
  size_t top_k = 0;
  bool sample = true;
  fields.OptionalReal("temperature", {0.0, kMaxTemperature}, &temperature);
  fields.OptionalInteger("top_k", {0, size_t{1} << 24}, &top_k);
  fields.OptionalReal("top_p", {kMinTopP, 1.0}, &top_p);
  fields.OptionalReal("min_p", {0.0, 1.0}, &min_p);
  fields.OptionalBool("do_sample", &sample);
  if (!fields.ok()) return fields.status();
  GenerationDefaults defaults;
  defaults.temperature = sample ? static_cast<float>(temperature) : 0.0f;
  defaults.top_k = static_cast<uint32_t>(top_k);
  defaults.top_p = static_cast<float>(top_p);
  defaults.min_p = static_cast<float>(min_p);
  return defaults;
}

std::string GenerationDefaultsToJson(const GenerationDefaults& defaults) {
  // Floats as they are, but never past a bound that only the double was within.
  const double top_p = std::max(static_cast<double>(defaults.top_p), kMinTopP);
  return nlohmann::json{{"temperature", static_cast<double>(defaults.temperature)},
                        {"top_k", defaults.top_k},
                        {"top_p", top_p},
                        {"min_p", static_cast<double>(defaults.min_p)}}
      .dump();
}

absl::StatusOr<GenerationDefaults> LoadGenerationDefaults(const std::string& path) {
  if (IsPackedFile(path)) {
    absl::StatusOr<std::unique_ptr<PackedFile>> file = PackedFile::Open(path);
    if (!file.ok()) return file.status();
    return (*file)->generation_defaults();
  }
  const std::string json_path = JoinPath(path, "generation_config.json");
  absl::StatusOr<std::string> text = ReadFile(json_path, kMaxDefaultsBytes);
  if (absl::IsNotFound(text.status())) return GenerationDefaults{};
  if (!text.ok()) return text.status();
  absl::StatusOr<GenerationDefaults> defaults = ParseGenerationDefaults(*text);
  if (!defaults.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(json_path, ": ", defaults.status().message()));
  }
  return defaults;
}

}  // namespace firesteel
