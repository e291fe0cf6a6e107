// What the next step does: a pure function of what runs and what waits, so that it can be tested as
// a table.

#ifndef FIRESTEEL_RUNTIME_SCHEDULER_POLICY_H_
#define FIRESTEEL_RUNTIME_SCHEDULER_POLICY_H_

#include <cstdint>
#include <span>
#include <vector>

#include "absl/time/time.h"

namespace firesteel {

/// What may compute tokens in a step: a request's prompt, or one of its sequences behind it.
struct RunningView {
  uint64_t id = 0;           // of the request
  uint32_t tokens_left = 0;  // of the prompt; 0: the sequence decodes
  uint32_t sequence = 0;     // index in its request; 0 for a prompt
  uint32_t sequences = 1;    // places that it takes: those that will share the prompt
  bool scored = false;       // every token wants logits
};

/// A request of the queue.
struct WaitingView {
  uint64_t id = 0;  // ids rise in the order of arrival
  int32_t priority = 0;
  uint32_t prompt_tokens = 0;
  uint32_t kv_blocks = 0;  // in the worst case
  uint32_t sequences = 1;
  bool scored = false;
};

/// The order of admission: the higher priority first, then the earlier arrival.
inline bool AdmittedBefore(const WaitingView& a, const WaitingView& b) {
  return a.priority != b.priority ? a.priority > b.priority : a.id < b.id;
}

struct SchedulerSnapshot {
  std::span<const RunningView> running;  // in the order of admission
  std::span<const WaitingView> waiting;  // in the order of admission
  uint32_t max_batch_size = 1;
  uint32_t max_batch_tokens = 1;    // ≥ max_batch_size
  uint32_t max_prefill_tokens = 1;  // of a step in which something decodes; ≥ 1
  uint32_t max_scored_tokens = 1;   // of all prompts that are scored; ≥ 1
  uint32_t free_kv_blocks = 0;
};

/// `tokens` of a request's prompt, or the one token that a sequence decodes from.
struct PlannedSlice {
  uint64_t id = 0;
  uint32_t tokens = 0;
  uint32_t sequence = 0;
  friend bool operator==(const PlannedSlice&, const PlannedSlice&) = default;
};

struct StepPlan {
  std::vector<uint64_t> admit;  // in this order
  std::vector<PlannedSlice> slices;
};

/// Plans one step:
///  1. every sequence that decodes gets its row;
///  2. what is left of the token budget goes to prompts, first admitted first;
///  3. requests are admitted in their order as long as the batch has a place, the budget a token
///  and the cache the
///     blocks of their worst case. One that doesn't fit holds up all behind it, so that none
///     starves.
/// Some slice is planned whenever anything runs, or waits and fits into an empty cache.
StepPlan PlanStep(const SchedulerSnapshot& snapshot);

/// The prefill budget of steps in which something decodes. Steps that took longer than the target
/// shrink it in proportion, faster ones let it grow by a quarter. Without a target it stays at its
/// maximum. Not thread-safe.
class ChunkBudget {
 public:
  static constexpr uint32_t kMinTokens = 16;

  /// `target`: of a step's duration; zero for none. `max_tokens` ≥ 1.
  ChunkBudget(absl::Duration target, uint32_t max_tokens);

  uint32_t tokens() const { return tokens_; }
  /// Learns from a step in which `prefill_tokens` > 0 were computed beside decodes.
  void Update(uint32_t prefill_tokens, absl::Duration duration);

 private:
  const absl::Duration target_;
  const uint32_t max_tokens_;
  const uint32_t min_tokens_;
  uint32_t tokens_;
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_SCHEDULER_POLICY_H_
