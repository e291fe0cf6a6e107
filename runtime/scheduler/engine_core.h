// The engine's loop: what waits and what runs, step by step. Engine::Create gives it a thread;
// tests and the simulator turn it by hand.

#ifndef FIRESTEEL_RUNTIME_SCHEDULER_ENGINE_CORE_H_
#define FIRESTEEL_RUNTIME_SCHEDULER_ENGINE_CORE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "runtime/model/kv_cache.h"
#include "runtime/scheduler/admission.h"
#include "runtime/scheduler/engine.h"
#include "runtime/scheduler/live_request.h"
#include "runtime/scheduler/model_runner.h"
#include "runtime/scheduler/policy.h"
#include "runtime/scheduler/step_cost.h"
#include "runtime/scheduler/waiting_queue.h"
#include "runtime/threading/mutex.h"

namespace firesteel {

/// Engine's methods are thread-safe; Run and RunOnce are for one thread, the engine's.
class EngineCore : public Engine {
 public:
  /// Logits are held for so many rows beside one a sequence: prompts whose tokens are scored
  /// advance by at most that a step.
  static constexpr uint32_t kMaxScoredTokens = 32;

  struct Parts {
    std::shared_ptr<const ModelWeights> weights;
    std::shared_ptr<const Tokenizer> tokenizer;
    ComputeType compute = ComputeType::kF32;
    EngineOptions options;  // checked and resolved
    std::unique_ptr<KvBlockPool> kv_pool;
    std::unique_ptr<ModelRunner> runner;
    EngineObserver* observer = nullptr;  // outlives the engine
  };
  explicit EngineCore(Parts parts);

  /// One turn: ends what is to end, plans and runs a step. False if there was nothing to run.
  bool RunOnce();
  /// Turns until Stop, waiting where there is nothing to do; then ends everything with kCancelled.
  void Run();
  void Stop();

  absl::StatusOr<RequestHandle> Submit(GenerationRequest request,
                                       std::shared_ptr<GenerationSink> sink) override;
  void Cancel(RequestHandle handle) override;
  void BeginDrain() override;
  bool FinishDrain(absl::Time deadline) override;
  bool MakingProgress(absl::Duration limit) const override;

  EngineGauges gauges() const override;
  const ModelWeights& weights() const override { return *weights_; }
  const Tokenizer& tokenizer() const override { return *tokenizer_; }
  const EngineOptions& options() const override { return options_; }
  ComputeType compute_type() const override { return compute_; }
  size_t kv_capacity_tokens() const override {
    return kv_pool_->total_blocks() * kernels::kKvBlockTokens;
  }

 private:
  using Owned = std::unique_ptr<LiveRequest>;
  // A slice of the step under way.
  struct StepSlice {
    LiveRequest* request;
    uint32_t sequence;
    uint32_t tokens;
    bool decodes;
  };
  struct Ending {
    uint64_t id;
    FinishReason reason;
    absl::Status status;
  };

  // Any thread.
  absl::Status Validate(const GenerationRequest& request) const;
  absl::Status Refuse(RejectionReason reason, absl::Status status);
  bool HasNews() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool IsIdle() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return unfinished_ == 0; }

  // The engine's thread.
  void TakeInbox();
  void EndCancelledAndExpired();
  StepPlan Plan() const;
  uint32_t ChunkBudget() const;
  std::vector<Owned>::iterator FindRunning(uint64_t id);
  void PreemptPlanned(const std::vector<uint64_t>& ids);
  void AdmitPlanned(const std::vector<uint64_t>& ids);
  void RunStep(const StepPlan& plan);
  void PutStep(const StepPlan& plan);
  void Fail(const absl::Status& status);
  void Advance(absl::Time now);
  void HandOutScores();
  void HandOutTokens(absl::Time now, std::vector<Ending>* ended);
  void Report(absl::Duration duration);
  void LearnCost(const StepReport& report);
  void PublishLoad();
  void End(Owned request, FinishReason reason, absl::Status status);
  void EndRunning(Ending ending);
  void EndWaiting(uint64_t id, FinishReason reason);
  void PublishGauges();

  const std::shared_ptr<const ModelWeights> weights_;
  const std::shared_ptr<const Tokenizer> tokenizer_;
  const ComputeType compute_;
  const EngineOptions options_;
  EngineObserver* const observer_;

  mutable Mutex mutex_;
  CondVar work_;  // something came for the engine's thread
  CondVar idle_;  // nothing is left
  Admission admission_ ABSL_GUARDED_BY(mutex_);
  std::vector<Owned> inbox_ ABSL_GUARDED_BY(mutex_);
  std::unordered_set<uint64_t> cancelled_ ABSL_GUARDED_BY(mutex_);
  uint64_t next_id_ ABSL_GUARDED_BY(mutex_) = 1;
  uint64_t unfinished_ ABSL_GUARDED_BY(mutex_) = 0;  // submitted and not yet ended
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  bool cancel_all_ ABSL_GUARDED_BY(mutex_) = false;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Time last_progress_ ABSL_GUARDED_BY(mutex_);
  EngineGauges gauges_ ABSL_GUARDED_BY(mutex_);

  // Owned by the engine's thread.
  const std::unique_ptr<KvBlockPool> kv_pool_;
  const std::unique_ptr<ModelRunner> runner_;
  WaitingQueue queue_;
  std::unordered_map<uint64_t, Owned> waiting_;  // those in queue_
  std::vector<Owned> running_;                   // in the order of admission
  StepCostFit cost_fit_;
  std::optional<StepCost> cost_;  // as fitted some steps ago; unset: too little was measured
  uint64_t steps_ = 0;
  std::unordered_set<uint64_t> cancel_now_;
  bool cancel_all_now_ = false;
  // The step under way.
  uint32_t chunk_tokens_ = 0;  // of prompts beside what decodes
  uint32_t prefix_queries_ = 0;
  uint32_t prefix_hits_ = 0;
  uint32_t preemptions_ = 0;
  std::vector<StepSlice> step_;
  std::vector<SequenceSlice> batch_;
  std::vector<Draw> draws_;
  std::vector<Score> scores_;
  std::vector<absl::Duration> inter_token_latencies_;
  std::vector<absl::Duration> times_to_first_token_;
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_SCHEDULER_ENGINE_CORE_H_
