// The models of a server, by name.

#ifndef FIRESTEEL_SERVER_MODEL_REGISTRY_H_
#define FIRESTEEL_SERVER_MODEL_REGISTRY_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "runtime/checkpoint/model_config.h"
#include "runtime/scheduler/engine.h"
#include "runtime/threading/mutex.h"

namespace firesteel::server {

/// A model and what the server allows its clients. Immutable but for the engine, which is
/// thread-safe.
struct ServedModel {
  std::string name;
  std::string path;                          // where it was loaded from
  std::unique_ptr<EngineObserver> observer;  // the engine's, which goes first
  std::unique_ptr<Engine> engine;
  GenerationDefaults defaults;
  uint32_t max_prompt_tokens = 0;  // at most context − 1
  uint64_t max_message_bytes = 0;
  uint64_t max_answer_bytes = uint64_t{4} << 20;  // of a unary call, and of a stream's message
  uint32_t longest_token_text = 0;                // as LongestTokenText has it

  const ModelConfig& config() const { return engine->weights().config; }
};

/// Thread-safe. Who has found a model keeps it for as long as it needs it, also when the registry
/// lets it go meanwhile. The model that was put in first is the default one.
class ModelRegistry {
 public:
  using Model = std::shared_ptr<const ServedModel>;

  /// Puts a model in, or in the place of the one of that name, which is returned.
  Model Put(ServedModel model) ABSL_LOCKS_EXCLUDED(mutex_);

  /// Puts a model in the place of the one of that name, which is returned; NotFound where there is
  /// none.
  absl::StatusOr<Model> Replace(ServedModel model) ABSL_LOCKS_EXCLUDED(mutex_);

  /// Takes a model out and returns it. NotFound where there is none of that name,
  /// FailedPrecondition for the last one.
  absl::StatusOr<Model> Remove(absl::string_view name) ABSL_LOCKS_EXCLUDED(mutex_);

  /// The model of that name, the default one where `name` is empty. NotFound otherwise.
  absl::StatusOr<Model> Find(absl::string_view name) const ABSL_LOCKS_EXCLUDED(mutex_);

  /// All at this moment, the default one first.
  std::vector<Model> models() const ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  mutable Mutex mutex_;
  std::vector<Model> models_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_MODEL_REGISTRY_H_
