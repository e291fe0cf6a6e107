// One request in an engine, and what came of it that nobody has taken yet: the engine's thread puts
// in, the calls take out.

#ifndef FIRESTEEL_SERVER_GENERATION_H_
#define FIRESTEEL_SERVER_GENERATION_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/scheduler/engine.h"
#include "runtime/threading/mutex.h"
#include "server/access_control.h"
#include "server/call_metadata.h"
#include "server/model_registry.h"
#include "server/quota.h"
#include "server/request_translation.h"

namespace firesteel::server {

/// Hears that there is something to take. Called by the engine's thread, so it must not block.
class OutputListener {
 public:
  virtual ~OutputListener() = default;
  virtual void OnOutput() = 0;
};

/// Thread-safe. Lives until the engine and its call have let go of it; holds the listener until the
/// engine has finished.
class Generation final : public GenerationSink {
 public:
  /// A part of the output, of one sequence.
  struct Chunk {
    uint32_t index = 0;
    SequenceOutput output;
    std::optional<GenerationResult> result;  // set in the last chunk of all
  };

  /// How a request becomes one for a model: the checks of its kind.
  using Translate = std::function<absl::StatusOr<TranslatedRequest>(const ServedModel&)>;

  /// Finds the model, translates, takes a place in the caller's quota, submits. A refusal has done
  /// no work, and the listener hears nothing; otherwise it may have heard something already when
  /// this returns.
  static absl::StatusOr<std::shared_ptr<Generation>> Start(
      const ModelRegistry& models, const std::string& model_name, const Translate& translate,
      const CallMetadata& metadata, const Caller& caller,
      const std::shared_ptr<OutputListener>& listener);

  Generation(std::shared_ptr<const ServedModel> model, const TranslatedRequest& request,
             std::unique_ptr<Quota::Lease> quota, std::shared_ptr<OutputListener> listener);

  void OnPromptLogprobs(std::vector<TokenLogprob> logprobs) override;
  void OnDelta(TokenDelta delta) override;
  void OnFinish(GenerationResult result) override;

  const ServedModel& model() const { return *model_; }
  /// Of the prompt.
  int32_t first_token() const { return first_token_; }

  /// The next chunk, if there is one, no larger than a message may be. A sequence's `end` comes
  /// with its last text; that of the last sequence comes with the result.
  std::optional<Chunk> Take() ABSL_LOCKS_EXCLUDED(mutex_);

  bool finished() const ABSL_LOCKS_EXCLUDED(mutex_);
  /// Every sequence whole. REQUIRES: finished, and Take was not called.
  std::vector<SequenceOutput> TakeAll() ABSL_LOCKS_EXCLUDED(mutex_);
  /// Log-probabilities of the prompt's tokens but the first. REQUIRES: finished.
  std::vector<TokenLogprob> TakePromptLogprobs() ABSL_LOCKS_EXCLUDED(mutex_);
  /// Nothing until finished.
  std::optional<GenerationResult> result() const ABSL_LOCKS_EXCLUDED(mutex_);

  /// Nobody reads any more: output is dropped, and the request leaves the batch. At the deadline
  /// the engine ends it by itself, and counts it as what it is.
  void Abandon() ABSL_LOCKS_EXCLUDED(mutex_);
  bool abandoned() const ABSL_LOCKS_EXCLUDED(mutex_);

  /// Memory of what was not taken, approximately.
  size_t pending_bytes() const ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  void Submitted(Engine::RequestHandle handle, uint64_t prompt_tokens) ABSL_LOCKS_EXCLUDED(mutex_);
  void Echo(const TranslatedRequest& request) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::shared_ptr<const ServedModel> model_;
  const bool return_token_ids_;
  const bool score_;  // the prompt's log-probabilities are what is asked for
  const int32_t first_token_;
  const absl::Time deadline_;

  mutable Mutex mutex_;
  std::unique_ptr<Quota::Lease> quota_ ABSL_GUARDED_BY(mutex_);       // until finished, or null
  std::shared_ptr<OutputListener> listener_ ABSL_GUARDED_BY(mutex_);  // until finished
  std::optional<Engine::RequestHandle> handle_ ABSL_GUARDED_BY(mutex_);
  std::vector<SequenceOutput> sequences_ ABSL_GUARDED_BY(mutex_);  // [n], not yet taken
  std::vector<bool> ended_ ABSL_GUARDED_BY(mutex_);                // [n]
  size_t num_ended_ ABSL_GUARDED_BY(mutex_) = 0;
  size_t next_ ABSL_GUARDED_BY(mutex_) = 0;  // where Take looks first, so that all get their turn
  size_t pending_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  std::vector<TokenLogprob> prompt_logprobs_ ABSL_GUARDED_BY(mutex_);
  std::optional<GenerationResult> result_ ABSL_GUARDED_BY(mutex_);
  bool abandoned_ ABSL_GUARDED_BY(mutex_) = false;
};

/// The status that a result stands for; OK where the client got what it asked for. `abandoned` says
/// why nobody reads any more, if that is so.
absl::Status StatusOf(const GenerationResult& result, const absl::Status& abandoned);

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_GENERATION_H_
