#include "runtime/scheduler/step_cost.h"

#include <algorithm>
#include <cmath>

namespace firesteel {
namespace {

constexpr int kMaxSweeps = 5000;  // of coordinate descent

}  // namespace

void StepCostFit::Add(const StepWork& work, absl::Duration duration) {
  const double seconds = absl::ToDoubleSeconds(duration);
  if (seconds <= 0) return;
  const Vector terms = {1.0, static_cast<double>(work.prefill_tokens),
                        static_cast<double>(work.decode_rows), static_cast<double>(work.context),
                        work.prefill_tokens > 0 ? 1.0 : 0.0};
  const double weight = WeightOf(work, seconds);
  for (size_t i = 0; i < kTerms; ++i) {
    for (size_t j = 0; j < kTerms; ++j) {
      products_[i][j] = keep_ * products_[i][j] + weight * terms[i] * terms[j];
    }
    targets_[i] = keep_ * targets_[i] + weight * terms[i] * seconds;
  }
  if (++steps_ % kStepsPerFit == 0) expected_ = cost();
}

// An error of a tenth counts the same in a short step and in a long one. What is expected may be
// far too little where nothing alike was seen: no step counts for more than many.
double StepCostFit::WeightOf(const StepWork& work, double seconds) const {
  const double expected =
      steps_ < kStepsPerFit ? seconds : std::max(expected_.Seconds(work), seconds / 16);
  return 1.0 / (expected * expected);
}

// Least squares with no coefficient below zero, by coordinate descent: the problem is convex, so
// that each sweep comes closer, and terms that say nothing stay at zero.
StepCost StepCostFit::cost() const {
  Vector x{};
  bool moved = true;
  for (int sweep = 0; moved && sweep < kMaxSweeps; ++sweep) {
    moved = false;
    for (size_t i = 0; i < kTerms; ++i) {
      if (products_[i][i] <= 0) continue;
      double rest = targets_[i];
      for (size_t j = 0; j < kTerms; ++j) {
        if (j != i) rest -= products_[i][j] * x[j];
      }
      const double better = std::max(0.0, rest / products_[i][i]);
      moved = moved || std::abs(better - x[i]) > 1e-6 * better;
      x[i] = better;
    }
  }
  return {
      .step = x[0], .prefill_token = x[1], .decode_row = x[2], .context = x[3], .prefill = x[4]};
}

ServiceEstimate EstimateService(const StepCost& cost, const Load& load, uint32_t prompt_tokens,
                                double decode_tokens, uint32_t sequences) {
  const double ahead = load.sequences + load.waiting;
  const double places = load.max_batch_size;
  const double chunk = load.chunk_tokens;
  // How full the batch is while this request runs, and what a step takes then: a row for each
  // sequence, and the prompts of those who follow on others that ended.
  const double rows = std::min(places, ahead + sequences);
  const double row = cost.decode_row + cost.context * load.mean_context;
  const double beginning = load.mean_answer > 0 ? cost.prefill / load.mean_answer : 0;
  const double newcomer = cost.prefill_token * load.prompt_per_answer + beginning;
  const double step = cost.step + rows * row + (rows - sequences) * newcomer;
  // A prompt beside decodes takes a step for each chunk.
  const auto prompt = [&](double tokens) {
    if (ahead == 0) return cost.step + cost.prefill + cost.prefill_token * tokens;
    const double steps = std::max(1.0, tokens / chunk);
    return steps * (cost.step + (rows - sequences) * row + cost.prefill) +
           cost.prefill_token * tokens;
  };

  // In a full batch one of `places` sequences ends every so many steps / places.
  const double steps = load.mean_answer * (1 + load.prompt_per_answer / chunk);
  const double excess = ahead + sequences - places;
  const double before = static_cast<double>(load.prompt_tokens);
  const double wait = excess > 0   ? excess * steps / places * (step + sequences * newcomer)
                      : before > 0 ? prompt(before)
                                   : 0;
  const double own = prompt(prompt_tokens) + std::max(0.0, decode_tokens - 1) * step;
  return {.wait = absl::Seconds(wait), .total = absl::Seconds(wait + own)};
}

}  // namespace firesteel
