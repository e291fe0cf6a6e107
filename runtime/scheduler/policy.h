// What the next step does: a pure function of what runs and what waits, so that it can be tested as
// a table.

#ifndef FIRESTEEL_RUNTIME_SCHEDULER_POLICY_H_
#define FIRESTEEL_RUNTIME_SCHEDULER_POLICY_H_

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "absl/time/time.h"
#include "runtime/scheduler/step_cost.h"

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

/// Without a target, what a prompt may add to a step of decodes, of what that takes alone: streams
/// beside a long prompt become slower by that, and twice as slow at worst on a machine that is
/// slower at times.
inline constexpr double kPromptShare = 0.3;
/// Where several prompts are to be computed, each may add as much, up to so many: batches that
/// stay half empty, as prompts come too slowly, cost everybody more than longer steps.
inline constexpr uint32_t kMostPromptShares = 4;
/// Nobody feels a step as short as this: fifty tokens a second are faster than any reader. Small
/// models pay for each chunk as much as for a dozen tokens, and so may take larger ones.
inline constexpr absl::Duration kUnfeltStep = absl::Milliseconds(20);

/// The least prefill budget beside decodes. Before anything is known it is no more: running streams
/// don't pay for finding out.
inline constexpr uint32_t kLeastChunk = 4;

/// What the prefill budget of a step with decodes depends on.
struct ChunkQuestion {
  std::optional<StepCost> cost;  // as measured so far; unset: too little
  StepWork decodes;              // of the step; has decode rows
  uint32_t prompts = 1;          // that are computed or wait
  absl::Duration target;         // of the step's duration; zero: what the constants above say
  uint32_t max_tokens = 1;       // ≥ 1
};

/// As many tokens as fit into what prompts may add to the step, at least the least budget. It
/// depends on ratios of costs where there is no target: a machine that is slow for a while, for
/// decodes and prompts alike, changes nothing.
uint32_t ChunkTokens(const ChunkQuestion& question);

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_SCHEDULER_POLICY_H_
