#include "runtime/scheduler/policy.h"

#include <algorithm>

namespace firesteel {

StepPlan PlanStep(const SchedulerSnapshot& snapshot) {
  StepPlan plan;
  uint32_t taken = 0;  // places of the batch
  for (const RunningView& view : snapshot.running) {
    taken += view.sequences;
    if (view.tokens_left == 0) plan.slices.push_back({view.id, 1, view.sequence});
  }
  const uint32_t decodes = static_cast<uint32_t>(plan.slices.size());
  uint32_t budget = snapshot.max_batch_tokens - std::min(decodes, snapshot.max_batch_tokens);
  if (decodes > 0) budget = std::min(budget, snapshot.max_prefill_tokens);
  uint32_t scored_budget = snapshot.max_scored_tokens;

  // What the budgets allow of a prompt; false if nothing.
  const auto prefill = [&](uint64_t id, uint32_t tokens_left, bool scored) {
    uint32_t tokens = std::min(budget, tokens_left);
    if (scored) tokens = std::min(tokens, scored_budget);
    if (tokens == 0) return false;
    plan.slices.push_back({id, tokens});
    budget -= tokens;
    if (scored) scored_budget -= tokens;
    return true;
  };
  for (const RunningView& view : snapshot.running) {
    if (view.tokens_left > 0) prefill(view.id, view.tokens_left, view.scored);
  }
  uint32_t free_blocks = snapshot.free_kv_blocks;
  for (const WaitingView& request : snapshot.waiting) {
    if (taken + request.sequences > snapshot.max_batch_size) break;
    if (request.kv_blocks > free_blocks) break;
    if (!prefill(request.id, request.prompt_tokens, request.scored)) break;
    plan.admit.push_back(request.id);
    free_blocks -= request.kv_blocks;
    taken += request.sequences;
  }
  return plan;
}

ChunkBudget::ChunkBudget(absl::Duration target, uint32_t max_tokens)
    : target_(target),
      max_tokens_(max_tokens),
      min_tokens_(std::min(kMinTokens, max_tokens)),
      tokens_(max_tokens) {}

void ChunkBudget::Update(uint32_t prefill_tokens, absl::Duration duration) {
  if (target_ <= absl::ZeroDuration()) return;
  if (duration > target_) {
    const double share = absl::FDivDuration(target_, duration);
    const double tokens = share * std::min(prefill_tokens, tokens_);
    tokens_ = std::max(min_tokens_, static_cast<uint32_t>(tokens));
  } else if (prefill_tokens >= tokens_ && duration < 0.8 * target_) {
    tokens_ = std::min(max_tokens_, tokens_ + std::max(1u, tokens_ / 4));
  }
}

}  // namespace firesteel
