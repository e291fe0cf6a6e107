// What came of a trace: latencies, throughput, goodput, refusals.

#ifndef FIRESTEEL_TOOLS_SIMULATE_OUTCOME_H_
#define FIRESTEEL_TOOLS_SIMULATE_OUTCOME_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "runtime/scheduler/clock.h"
#include "runtime/scheduler/observer.h"
#include "runtime/scheduler/request.h"
#include "runtime/scheduler/step_cost.h"
#include "runtime/threading/mutex.h"

namespace firesteel::simulate {

/// Percentiles of a latency, in seconds.
struct Percentiles {
  double p50 = 0;
  double p90 = 0;
  double p99 = 0;
  double max = 0;
};

/// Of `values`, in any order; zeros where there are none.
Percentiles PercentilesOf(std::vector<double> values);

/// What counts as served well.
struct Objectives {
  double ttft_seconds = 1;
  double itl_seconds = 0.1;  // mean between a request's tokens
};

/// One step, as the engine ran it.
struct StepRecord {
  double end = 0;       // seconds since the start
  double duration = 0;  // from the end of the step before, or from its own start where it was idle
  StepWork work;
};

struct Outcome {
  double seconds = 0;  // from the first arrival to the last end
  uint64_t requests = 0;
  uint64_t completed = 0;
  uint64_t deadline_exceeded = 0;
  std::array<uint64_t, kNumRejectionReasons> refused{};
  uint64_t served_well = 0;  // completed within the objectives
  uint64_t prompt_tokens = 0;
  uint64_t cached_tokens = 0;
  uint64_t generated_tokens = 0;
  uint64_t steps = 0;
  uint64_t preemptions = 0;
  uint32_t most_waiting = 0;
  double mean_batch = 0;  // sequences in a step
  double most_kv = 0;     // of the cache, 0 to 1
  Percentiles ttft;
  Percentiles itl;
  StepCost cost;  // fitted to the steps, each from the end of the one before

  double tokens_per_second() const { return static_cast<double>(generated_tokens) / seconds; }
  double goodput() const { return static_cast<double>(served_well) / seconds; }
};

/// Watches an engine and its requests. It is the sink of all of them: what it needs of one is in
/// its result. Thread-safe as both interfaces ask.
class Recorder final : public EngineObserver, public GenerationSink {
 public:
  /// `clock` is the engine's; it and `steps`, which are appended to where wanted, outlive the
  /// recorder.
  Recorder(const Objectives& objectives, const Clock* clock,
           std::vector<StepRecord>* steps = nullptr)
      : objectives_(objectives), clock_(clock), start_(clock->Now()), steps_(steps) {}

  /// Steps count their time from now on. Before the first request.
  void Start() { start_ = clock_->Now(); }

  void OnRejected(RejectionReason reason) override { ++refused_[static_cast<size_t>(reason)]; }
  void OnStep(const StepReport& report) override;
  void OnFinish(const FinishReport&) override {}
  void OnGauges(const EngineGauges& gauges) override;
  void OnDelta(TokenDelta) override {}
  void OnFinish(GenerationResult result) override;

  /// When everything has ended, after `seconds`.
  Outcome Finish(double seconds) const;

 private:
  const Objectives objectives_;
  const Clock* const clock_;
  absl::Time start_;
  std::vector<StepRecord>* const steps_;
  std::array<std::atomic<uint64_t>, kNumRejectionReasons> refused_{};
  // The engine's thread.
  Outcome outcome_;
  uint64_t batch_sum_ = 0;
  absl::Time step_end_;  // of the last step,
  bool idle_ = true;     // after which there was nothing to do
  StepCostFit cost_fit_{1};
  std::vector<double> ttft_;
  std::vector<double> itl_;
};

/// As the option --cost takes it.
std::string ToOption(const StepCost& cost);
std::string ToTable(const Outcome& outcome);
/// How far a prediction was from what was measured: throughput and time to the first token.
std::string ToComparison(const Outcome& simulated, const Outcome& measured);
std::string ToJson(const Outcome& outcome);
/// CSV, a line a step: end_seconds, seconds, prefill_tokens, decode_rows, context.
std::string ToCsv(const std::vector<StepRecord>& steps);

}  // namespace firesteel::simulate

#endif  // FIRESTEEL_TOOLS_SIMULATE_OUTCOME_H_
