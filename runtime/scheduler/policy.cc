#include "runtime/scheduler/policy.h"

#include <algorithm>
#include <utility>

#include "kernels/attention.h"

namespace firesteel {
namespace {

// Blocks that a sequence takes for `tokens` more positions.
uint32_t BlocksFor(const RunningView& view, uint32_t tokens) {
  if (tokens <= view.room) return 0;
  const uint32_t beyond = tokens - view.room;
  if (beyond <= view.next_block_room) return 1;
  constexpr uint32_t kTokens = kernels::kKvBlockTokens;
  return 1 + (beyond - view.next_block_room + kTokens - 1) / kTokens;
}

// As many of `tokens` as `blocks` more blocks hold.
uint32_t TokensThatFit(const RunningView& view, uint32_t tokens, uint32_t blocks) {
  while (tokens > 0 && BlocksFor(view, tokens) > blocks) --tokens;
  return tokens;
}

// A step in the making.
class Planner {
 public:
  explicit Planner(const SchedulerSnapshot& snapshot)
      : snapshot_(snapshot), running_(snapshot.running), free_blocks_(snapshot.free_kv_blocks) {}

  StepPlan Plan() {
    do {
      plan_.slices.clear();
      PreemptForDecodes();
      PlanDecodes();
      PlanPrefills();
      // Nothing moves: what preemptions lost needs blocks that later requests hold.
    } while (plan_.slices.empty() && PreemptLast());
    if (plan_.preempt.empty()) PlanAdmissions();
    return std::move(plan_);
  }

 private:
  uint32_t BlocksOfDecodes() const {
    uint32_t blocks = 0;
    for (const RunningView& view : running_) {
      if (view.tokens_left == 0) blocks += BlocksFor(view, 1);
    }
    return blocks;
  }

  void PreemptForDecodes() {
    while (BlocksOfDecodes() > free_blocks_ && PreemptLast()) {
    }
  }

  // The request admitted last, unless it is the only one.
  bool PreemptLast() {
    if (!snapshot_.may_preempt || running_.empty()) return false;
    if (running_.front().id == running_.back().id) return false;
    const uint64_t id = running_.back().id;
    while (running_.back().id == id) {
      free_blocks_ += running_.back().private_kv_blocks;
      running_ = running_.first(running_.size() - 1);
    }
    plan_.preempt.push_back(id);
    return true;
  }

  void PlanDecodes() {
    taken_blocks_ = 0;
    places_ = 0;
    for (const RunningView& view : running_) {
      places_ += view.sequences;
      if (view.tokens_left > 0) continue;
      plan_.slices.push_back({view.id, 1, view.sequence});
      taken_blocks_ += BlocksFor(view, 1);
    }
    const uint32_t decodes = static_cast<uint32_t>(plan_.slices.size());
    budget_ = snapshot_.max_batch_tokens - std::min(decodes, snapshot_.max_batch_tokens);
    if (decodes > 0) budget_ = std::min(budget_, snapshot_.max_prefill_tokens);
    scored_budget_ = snapshot_.max_scored_tokens;
  }

  void PlanPrefills() {
    for (const RunningView& view : running_) {
      if (view.tokens_left == 0) continue;
      const uint32_t blocks = free_blocks_ - std::min(taken_blocks_, free_blocks_);
      const uint32_t tokens = TokensThatFit(view, Allowed(view.tokens_left, view.scored), blocks);
      taken_blocks_ += BlocksFor(view, tokens);
      Put(view.id, tokens, view.sequence, view.scored);
    }
  }

  void PlanAdmissions() {
    const uint32_t spoken_for = std::max(snapshot_.reserved_kv_blocks, taken_blocks_);
    uint32_t blocks = free_blocks_ - std::min(spoken_for, free_blocks_);
    for (const WaitingView& request : snapshot_.waiting) {
      if (places_ + request.sequences > snapshot_.max_batch_size) break;
      if (request.kv_blocks > blocks) break;
      const uint32_t tokens = Allowed(request.prompt_tokens, request.scored);
      if (tokens == 0) break;
      Put(request.id, tokens, 0, request.scored);
      plan_.admit.push_back(request.id);
      blocks -= request.kv_blocks;
      places_ += request.sequences;
    }
  }

  // What the budgets leave of so many tokens of a prompt.
  uint32_t Allowed(uint32_t tokens, bool scored) const {
    return std::min({tokens, budget_, scored ? scored_budget_ : tokens});
  }

  void Put(uint64_t id, uint32_t tokens, uint32_t sequence, bool scored) {
    if (tokens == 0) return;
    plan_.slices.push_back({id, tokens, sequence});
    budget_ -= tokens;
    if (scored) scored_budget_ -= tokens;
  }

  const SchedulerSnapshot& snapshot_;
  std::span<const RunningView> running_;  // what is not preempted
  uint32_t free_blocks_;
  uint32_t taken_blocks_ = 0;  // by the slices planned so far
  uint32_t places_ = 0;
  uint32_t budget_ = 0;
  uint32_t scored_budget_ = 0;
  StepPlan plan_;
};

}  // namespace

StepPlan PlanStep(const SchedulerSnapshot& snapshot) { return Planner(snapshot).Plan(); }

uint32_t ChunkTokens(const ChunkQuestion& question) {
  // Nothing was seen of prompts, or nothing of how their length counts.
  if (!question.cost.has_value() || question.cost->prefill_token <= 0) {
    return std::min(kLeastChunk, question.max_tokens);
  }
  const StepCost& cost = *question.cost;
  const double alone = cost.Seconds(question.decodes);
  const double unfelt = absl::ToDoubleSeconds(kUnfeltStep) - alone;
  const double share = kPromptShare * std::min(question.prompts, kMostPromptShares) * alone;
  const double allowed = question.target > absl::ZeroDuration()
                             ? absl::ToDoubleSeconds(question.target) - alone
                             : std::max(share, unfelt);
  const double tokens =
      std::max<double>(kLeastChunk, (allowed - cost.prefill) / cost.prefill_token);
  return static_cast<uint32_t>(std::min<double>(tokens, question.max_tokens));
}

}  // namespace firesteel
