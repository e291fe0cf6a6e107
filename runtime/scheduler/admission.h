// Whether a new request may wait: bounds of the queue in requests, tokens and time, and whether its
// deadline can be met.

#ifndef FIRESTEEL_RUNTIME_SCHEDULER_ADMISSION_H_
#define FIRESTEEL_RUNTIME_SCHEDULER_ADMISSION_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "runtime/scheduler/engine.h"
#include "runtime/scheduler/observer.h"
#include "runtime/scheduler/request.h"
#include "runtime/scheduler/step_cost.h"

namespace firesteel {

/// Why a request is refused before any work.
struct Refusal {
  RejectionReason reason = RejectionReason::kQueueFull;
  absl::Status status;
};

/// Counts what waits and knows how fast the engine is. Not thread-safe: the engine's lock guards
/// it.
class Admission {
 public:
  explicit Admission(const EngineOptions& options) : options_(options) {}

  /// Nothing if the request may join what waits.
  std::optional<Refusal> Check(const GenerationRequest& request, absl::Time now) const;

  /// A request begins to wait, and ends waiting in whatever way.
  void BeginWait(const GenerationRequest& request) { Count(request, 1); }
  void EndWait(const GenerationRequest& request) { Count(request, -1); }
  uint32_t waiting_requests() const { return requests_; }

  /// What was learned: of a request that ended, of a step's cost, of what runs.
  void LearnEnd(const GenerationRequest& request, const GenerationResult& result);
  void SetCost(const StepCost& cost) { cost_ = cost; }
  /// `answer_tokens` of what runs, in the worst case.
  void SetRunning(const Load& running, double answer_tokens) {
    running_ = running;
    running_answer_tokens_ = answer_tokens;
  }

 private:
  void Count(const GenerationRequest& request, int sign);
  Load LoadBefore(const GenerationRequest& request) const;
  uint32_t SequencesBefore(const GenerationRequest& request) const;
  std::optional<Refusal> CheckTime(const GenerationRequest& request, absl::Time now) const;
  absl::Duration RetryAfter() const;

  const EngineOptions options_;
  // Of requests that wait.
  uint32_t requests_ = 0;
  uint32_t sequences_ = 0;
  std::map<std::pair<int32_t, std::string>, uint32_t> lines_;  // sequences by priority and client
  uint64_t prompt_tokens_ = 0;
  double answer_tokens_ = 0;  // in the worst case

  double mean_service_seconds_ = 0.5;  // admitted → end
  double mean_answer_share_ = 1;       // generated of max_tokens, where the model could end
  double mean_prompt_tokens_ = 0;      // computed, of requests that ended
  double mean_answer_tokens_ = 0;      // of all sequences
  std::optional<StepCost> cost_;       // unset: too little was measured
  Load running_;
  double running_answer_tokens_ = 0;
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_SCHEDULER_ADMISSION_H_
