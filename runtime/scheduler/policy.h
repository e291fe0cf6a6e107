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
  uint32_t tokens_left = 0;  // of the prompt, or of what a preemption lost; 0: it decodes
  uint32_t sequence = 0;     // index in its request; 0 for a prompt
  uint32_t sequences = 1;    // places that it takes: those that will share the prompt
  bool scored = false;       // every token wants logits
  // Its part of the KV cache.
  uint32_t room = kUnlimited;      // positions that it can write without another block
  uint32_t next_block_room = 0;    // positions that the first block it would take has for it
  uint32_t private_kv_blocks = 0;  // what preempting it gives back
  static constexpr uint32_t kUnlimited = ~uint32_t{0};
};

/// A request that waits.
struct WaitingView {
  uint64_t id = 0;
  uint32_t prompt_tokens = 0;  // to compute
  uint32_t kv_blocks = 0;      // that it must be able to take: see SchedulerSnapshot
  uint32_t sequences = 1;
  bool scored = false;
};

/// Admission is either by the worst case, where kv_blocks of a request is all that it can ever
/// take and reserved_kv_blocks what those that run can still take: then nothing is ever preempted.
/// Or it is optimistic, where kv_blocks is what a request takes at first, and nothing is reserved.
struct SchedulerSnapshot {
  std::span<const RunningView> running;  // in the order of admission, a request's together
  std::span<const WaitingView> waiting;  // in the order of admission
  uint32_t max_batch_size = 1;
  uint32_t max_batch_tokens = 1;    // ≥ max_batch_size
  uint32_t max_prefill_tokens = 1;  // of a step in which something decodes; ≥ 1
  uint32_t max_scored_tokens = 1;   // of all prompts that are scored; ≥ 1
  uint32_t free_kv_blocks = 0;      // that nobody holds
  uint32_t reserved_kv_blocks = 0;  // of those
  bool may_preempt = false;         // admission is optimistic
};

/// `tokens` of a request's prompt, or of a sequence: the one that it decodes from, or some that a
/// preemption lost.
struct PlannedSlice {
  uint64_t id = 0;
  uint32_t tokens = 0;
  uint32_t sequence = 0;
  friend bool operator==(const PlannedSlice&, const PlannedSlice&) = default;
};

struct StepPlan {
  std::vector<uint64_t> preempt;  // requests that give up their place and their blocks
  std::vector<uint64_t> admit;    // in this order
  std::vector<PlannedSlice> slices;
};

/// Plans one step:
///  1. every sequence that decodes gets its row; where the cache has too few blocks for that, those
///     admitted last are preempted;
///  2. what is left of the token budget goes to prompts and to what preemptions lost, first
///     admitted first;
///  3. requests are admitted in their order as long as the batch has places, the budget a token and
///     the cache the blocks. One that doesn't fit holds up all behind it, so that none starves.
/// Some slice is planned whenever anything runs, or waits and fits into an empty cache. The request
/// admitted first is never preempted unless it is alone and exceeds the whole cache.
StepPlan PlanStep(const SchedulerSnapshot& snapshot);

/// The prefill budget of steps in which something decodes. With a target it begins at its least:
/// nothing is known yet, and running streams must not pay for finding out. Steps that took longer
/// than the target shrink it in proportion, faster ones let it grow by a quarter. Without a target
/// it stays at its maximum. Not thread-safe.
class ChunkBudget {
 public:
  static constexpr uint32_t kMinTokens = 8;

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
