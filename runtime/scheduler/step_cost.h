// What a step takes, as a linear model of what it computes: learned while serving, for estimates of
// when a request would be served, and the clock of the simulator.

#ifndef FIRESTEEL_RUNTIME_SCHEDULER_STEP_COST_H_
#define FIRESTEEL_RUNTIME_SCHEDULER_STEP_COST_H_

#include <array>
#include <cstddef>
#include <cstdint>

#include "absl/time/time.h"

namespace firesteel {

/// What a step computes, as far as its duration depends on it.
struct StepWork {
  uint32_t prefill_tokens = 0;
  uint32_t decode_rows = 0;
  uint64_t context = 0;  // positions before each row, summed over rows
};

/// Seconds of a step.
struct StepCost {
  double step = 0;           // any step
  double prefill_token = 0;  // each more token of a prompt
  double decode_row = 0;     // each more sequence that decodes
  double context = 0;        // each position that a row may attend to
  double prefill = 0;        // prompts of whatever length: all weights are read for them

  double Seconds(const StepWork& work) const {
    return step + prefill_token * work.prefill_tokens + decode_row * work.decode_rows +
           context * static_cast<double>(work.context) + (work.prefill_tokens > 0 ? prefill : 0);
  }
};

/// Fits a StepCost to measured steps by least squares on errors relative to what the fit so far
/// expects, older steps counting ever less (by default half after about 350). Sums of steps are
/// met, those that were held up among them: errors relative to what was measured would count a step
/// the less the longer it took. No coefficient is negative. Not thread-safe. Costs some hundred
/// nanoseconds a step, and some ten microseconds every kStepsPerFit.
class StepCostFit {
 public:
  /// Each step leaves the older ones this share of their weight; 1: all count alike.
  explicit StepCostFit(double keep = 0.998) : keep_(keep) {}

  void Add(const StepWork& work, absl::Duration duration);
  /// Whether enough was seen to say anything.
  bool known() const { return steps_ >= kMinSteps; }
  StepCost cost() const;

 private:
  double WeightOf(const StepWork& work, double seconds) const;

  static constexpr size_t kTerms = 5;
  static constexpr size_t kMinSteps = 32;
  static constexpr size_t kStepsPerFit = 16;
  using Vector = std::array<double, kTerms>;

  const double keep_;
  // Normal equations, weighted.
  std::array<Vector, kTerms> products_{};
  Vector targets_{};
  size_t steps_ = 0;
  StepCost expected_;  // the fit some steps ago
};

/// What the engine has before it, for an estimate.
struct Load {
  uint32_t sequences = 0;        // that run
  uint32_t waiting = 0;          // sequences of requests that wait
  uint64_t prompt_tokens = 0;    // to compute, of requests that run and wait
  double mean_answer = 0;        // tokens of a sequence that runs or waits, as expected
  double mean_context = 0;       // positions of a sequence that decodes
  double prompt_per_answer = 0;  // tokens: who ends makes room for another, whose prompt takes time
  uint32_t max_batch_size = 1;   // sequences at once
  uint32_t chunk_tokens = ~0u;   // of a prompt, in a step beside decodes
};

/// When a new request would be served, from now.
struct ServiceEstimate {
  absl::Duration wait;   // until its own prompt begins
  absl::Duration total;  // until it is done
};

/// It shares the batch with what is before it or, where the batch is full, waits until so many have
/// ended that it has a place. `prompt_tokens` and `decode_tokens` of the request itself, the latter
/// each sequence's.
ServiceEstimate EstimateService(const StepCost& cost, const Load& load, uint32_t prompt_tokens,
                                double decode_tokens, uint32_t sequences);

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_SCHEDULER_STEP_COST_H_
