// The models of a server, by name.

#ifndef FIRESTEEL_SERVER_MODEL_REGISTRY_H_
#define FIRESTEEL_SERVER_MODEL_REGISTRY_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "runtime/checkpoint/model_config.h"
#include "runtime/scheduler/engine.h"

namespace firesteel::server {

/// A model and what the server allows its clients. Immutable but for the engine, which is
/// thread-safe.
struct ServedModel {
  std::string name;
  std::unique_ptr<Engine> engine;
  GenerationDefaults defaults;
  uint32_t max_prompt_tokens = 0;  // at most context − 1
  uint64_t max_message_bytes = 0;

  const ModelConfig& config() const { return engine->weights().config; }
};

/// Filled before the server starts, read-only from then on, hence thread-safe. The first model is
/// the default one.
class ModelRegistry {
 public:
  /// Names are unique (the option parser sees to that).
  void Add(ServedModel model);

  /// The model of that name, the default one where `name` is empty. NotFound otherwise.
  absl::StatusOr<const ServedModel*> Find(absl::string_view name) const;

  const std::vector<std::unique_ptr<ServedModel>>& models() const { return models_; }

 private:
  std::vector<std::unique_ptr<ServedModel>> models_;
};

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_MODEL_REGISTRY_H_
