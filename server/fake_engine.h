// An engine whose every answer is scripted by a test: the double of the real one in the server's
// unit tests.

#ifndef FIRESTEEL_SERVER_FAKE_ENGINE_H_
#define FIRESTEEL_SERVER_FAKE_ENGINE_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "runtime/scheduler/engine.h"
#include "runtime/threading/mutex.h"

namespace firesteel::server {

/// A small valid Spark shape: 2 layers, context 128, vocabulary 300, F 100, 2 heads.
ModelConfig FakeModelConfig();

/// One token a byte: id 3 + byte; bos is 2, eos 1.
class FakeTokenizer final : public Tokenizer {
 public:
  absl::StatusOr<std::vector<int32_t>> EncodePrompt(absl::string_view text) const override;
  const std::string& TokenBytes(int32_t token_id) const override;
};

/// Thread-safe. Sinks and the observer are called by a thread of its own, as Engine promises.
/// Deadlines end requests. Methods named Wait… block until it is so; a test that waits in vain runs
/// into its time limit.
class FakeEngine final : public Engine {
 public:
  explicit FakeEngine(EngineObserver* observer = nullptr, ModelConfig config = FakeModelConfig());
  ~FakeEngine() override;

  // --- The script ---
  /// The next request is refused so.
  void RefuseNext(absl::Status status, std::optional<RejectionReason> reason = std::nullopt);
  /// Every request from now on gets so many deltas "tN " a sequence, with log-probabilities where
  /// it asks for them, and finishes by itself.
  void AnswerAll(uint32_t tokens);
  /// The `index`-th admitted request, from 0. Waits for it.
  RequestHandle WaitForRequest(size_t index);
  GenerationRequest request(RequestHandle handle);
  /// The admitted request of that id, which must be there.
  RequestHandle HandleOf(const std::string& request_id);
  void Emit(RequestHandle handle, std::string text, std::vector<int32_t> token_ids = {});
  void Emit(RequestHandle handle, TokenDelta delta);
  /// Log-probabilities −1, −2, … of the prompt's tokens but the first.
  void EmitPromptLogprobs(RequestHandle handle);
  void Finish(RequestHandle handle, GenerationResult result);
  /// Waits until everything asked for so far has been handed to the sinks.
  void WaitUntilIdle();
  void WaitForCancel(RequestHandle handle);
  /// How many requests were admitted so far.
  size_t num_admitted();
  /// Whether nothing runs.
  bool empty();
  void SetMakingProgress(bool moving);
  /// What the gauges show besides the requests that run.
  void SetGauges(uint32_t requests_waiting, double kv_usage_ratio);
  void WaitForDrain();
  /// FinishDrain does from now on as if its deadline had passed.
  void PassDrainDeadline();

  // --- Engine ---
  absl::StatusOr<RequestHandle> Submit(GenerationRequest request,
                                       std::shared_ptr<GenerationSink> sink) override;
  void Cancel(RequestHandle handle) override;
  void BeginDrain() override;
  bool FinishDrain(absl::Time deadline) override;
  bool MakingProgress(absl::Duration limit) const override;
  EngineGauges gauges() const override;
  const ModelWeights& weights() const override { return weights_; }
  const Tokenizer& tokenizer() const override { return tokenizer_; }
  const EngineOptions& options() const override { return options_; }
  ComputeType compute_type() const override { return ComputeType::kBF16; }
  size_t kv_capacity_tokens() const override { return 4096; }

 private:
  struct Running {
    GenerationRequest request;
    std::shared_ptr<GenerationSink> sink;
  };
  using Action = std::function<void()>;

  void Main();
  void Answer(RequestHandle handle, uint32_t tokens);
  std::shared_ptr<GenerationSink> SinkOf(RequestHandle handle) ABSL_LOCKS_EXCLUDED(mutex_);
  void End(RequestHandle handle, GenerationResult result);
  void Post(Action action) ABSL_LOCKS_EXCLUDED(mutex_);
  absl::Time NextDeadline() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void PostExpired() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  EngineObserver* const observer_;
  ModelWeights weights_;
  const FakeTokenizer tokenizer_;
  const EngineOptions options_;

  mutable Mutex mutex_;
  CondVar changed_;  // for everything below
  std::deque<Action> actions_ ABSL_GUARDED_BY(mutex_);
  std::map<RequestHandle, Running> running_ ABSL_GUARDED_BY(mutex_);
  std::vector<RequestHandle> admitted_ ABSL_GUARDED_BY(mutex_);
  std::map<RequestHandle, GenerationRequest> requests_ ABSL_GUARDED_BY(mutex_);
  std::vector<RequestHandle> cancelled_ ABSL_GUARDED_BY(mutex_);
  std::optional<std::pair<absl::Status, std::optional<RejectionReason>>> refusal_
      ABSL_GUARDED_BY(mutex_);
  uint32_t answer_tokens_ ABSL_GUARDED_BY(mutex_) = 0;
  RequestHandle next_handle_ ABSL_GUARDED_BY(mutex_) = 1;
  bool busy_ ABSL_GUARDED_BY(mutex_) = false;
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  bool drain_deadline_passed_ ABSL_GUARDED_BY(mutex_) = false;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  bool moving_ ABSL_GUARDED_BY(mutex_) = true;
  EngineGauges gauges_ ABSL_GUARDED_BY(mutex_);  // requests_running apart
  std::thread thread_;                           // last: it uses the others
};

/// A result as a finished request has it.
GenerationResult FakeResult(FinishReason reason, uint32_t generated_tokens = 3);

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_FAKE_ENGINE_H_
