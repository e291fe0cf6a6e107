// The runtime's only way to the outside world of metrics and logs: it reports, somebody else
// counts.

#ifndef FIRESTEEL_RUNTIME_SCHEDULER_OBSERVER_H_
#define FIRESTEEL_RUNTIME_SCHEDULER_OBSERVER_H_

#include <cstddef>
#include <cstdint>
#include <span>

#include "absl/time/time.h"
#include "runtime/model/activity.h"
#include "runtime/scheduler/request.h"

namespace firesteel {

/// Why a request was refused before any work. Names for labels: "queue_full", "queue_tokens",
/// "queue_wait" (its turn would come too late), "kv_cache", "draining", "deadline" (it could not be
/// met).
enum class RejectionReason : uint8_t {
  kQueueFull,
  kQueueTokens,
  kQueueWait,
  kKvCache,
  kDraining,
  kDeadline
};
inline constexpr size_t kNumRejectionReasons = 6;
const char* RejectionReasonName(RejectionReason reason);

enum class StepPhase : uint8_t { kPrefill, kDecode, kMixed };
inline constexpr size_t kNumStepPhases = 3;
/// "prefill", "decode", "mixed".
const char* StepPhaseName(StepPhase phase);

/// One step of the batch. Spans are valid during the call only.
struct StepReport {
  StepPhase phase = StepPhase::kDecode;
  absl::Duration duration;
  uint32_t sequences = 0;  // in the batch, prefilling or decoding
  uint32_t prefill_tokens = 0;
  uint32_t decode_tokens = 0;
  uint64_t context = 0;               // positions before each of these tokens, summed
  uint32_t prefix_cache_queries = 0;  // prompt tokens of requests that joined for this step
  uint32_t prefix_cache_hits = 0;     // those of them that the cache had
  uint32_t preemptions = 0;           // requests that lost their place to others before this step
  uint32_t requests_running = 0;      // after the step
  uint32_t requests_waiting = 0;
  double kv_usage_ratio = 0;  // after the step: used blocks / all blocks
  std::span<const LayerActivity> layers;
  std::span<const absl::Duration>
      inter_token_latencies;  // of tokens that are not a request's first
  std::span<const absl::Duration>
      times_to_first_token;  // of requests whose first token came in this step
  double flops_performed = 0;
  double flops_skipped = 0;
  double weight_bytes_read = 0;
  double weight_bytes_skipped = 0;
};

/// How a request ended; once for each that was admitted to the queue.
struct FinishReport {
  FinishReason reason = FinishReason::kError;
  Usage usage;
  Timings timings;
};

/// The state that gauges show, also between steps.
struct EngineGauges {
  uint32_t requests_running = 0;
  uint32_t requests_waiting = 0;
  double kv_usage_ratio = 0;
};

/// Methods are called from the engine's thread, except OnRejected (any thread). They must not
/// block.
class EngineObserver {
 public:
  virtual ~EngineObserver() = default;
  virtual void OnRejected(RejectionReason reason) = 0;
  virtual void OnStep(const StepReport& report) = 0;
  virtual void OnFinish(const FinishReport& report) = 0;
  /// Whenever requests join, leave or free memory, and after each step.
  virtual void OnGauges(const EngineGauges& gauges) = 0;
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_SCHEDULER_OBSERVER_H_
