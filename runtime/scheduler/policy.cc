#include "runtime/scheduler/policy.h"

#include <algorithm>

namespace firesteel {

StepPlan PlanStep(const SchedulerSnapshot& snapshot) {
  StepPlan plan;
  for (const RunningView& sequence : snapshot.running) {
    if (sequence.prompt_left == 0) plan.slices.push_back({sequence.id, 1});
  }
  const uint32_t decodes = static_cast<uint32_t>(plan.slices.size());
  uint32_t budget = snapshot.max_batch_tokens - std::min(decodes, snapshot.max_batch_tokens);
  if (decodes > 0) budget = std::min(budget, snapshot.max_prefill_tokens);

  const auto prefill = [&](uint64_t id, uint32_t prompt_left) {
    const uint32_t tokens = std::min(budget, prompt_left);
    plan.slices.push_back({id, tokens});
    budget -= tokens;
  };
  for (const RunningView& sequence : snapshot.running) {
    if (sequence.prompt_left > 0 && budget > 0) prefill(sequence.id, sequence.prompt_left);
  }
  uint32_t places =
      snapshot.max_batch_size -
      std::min<uint32_t>(snapshot.max_batch_size, static_cast<uint32_t>(snapshot.running.size()));
  uint32_t free_blocks = snapshot.free_kv_blocks;
  for (const WaitingView& request : snapshot.waiting) {
    if (places == 0 || budget == 0 || request.kv_blocks > free_blocks) break;
    plan.admit.push_back(request.id);
    prefill(request.id, request.prompt_tokens);
    free_blocks -= request.kv_blocks;
    --places;
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
