// The engine's own loop on a clock that only steps of a cost model move: hours of load in seconds.

#ifndef FIRESTEEL_TOOLS_SIMULATE_SIMULATOR_H_
#define FIRESTEEL_TOOLS_SIMULATE_SIMULATOR_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "runtime/checkpoint/weights.h"
#include "runtime/scheduler/engine.h"
#include "runtime/scheduler/step_cost.h"
#include "runtime/tokenizer/tokenizer.h"
#include "tools/simulate/outcome.h"
#include "tools/simulate/recording.h"
#include "tools/simulate/trace.h"

namespace firesteel::simulate {

/// How arrivals reach the engine.
enum class Intake : uint8_t {
  kOpen,    // when their time has come
  kStatic,  // max_batch_size at a time, the next when all of them have ended
};

/// The engine as it is served, but for its model: queue, policy, KV cache and prefix cache are the
/// real ones, so that what is learned here holds there as far as the cost model does.
/// `options.clock` is not looked at; kv_cache_tokens positions are cached. InvalidArgument names
/// the option that is wrong. Where wanted, each step is appended to `steps`.
absl::StatusOr<Outcome> Simulate(const std::vector<Arrival>& trace, const Machine& machine,
                                 EngineOptions options, size_t kv_cache_tokens,
                                 size_t context_tokens, Intake intake, const Objectives& objectives,
                                 std::vector<StepRecord>* steps = nullptr);

/// The same trace through the engine and a model, in real time.
absl::StatusOr<Recording> RunForReal(const std::vector<Arrival>& trace,
                                     const std::shared_ptr<const ModelWeights>& weights,
                                     const EngineOptions& options, size_t threads, Intake intake,
                                     const Objectives& objectives,
                                     std::vector<StepRecord>* steps = nullptr);

/// Runs some requests of different lengths through the engine and the model, and fits a cost to
/// their steps. Takes some hundred steps.
absl::StatusOr<StepCost> MeasureCost(const std::shared_ptr<const ModelWeights>& weights,
                                     EngineOptions options, size_t threads);

}  // namespace firesteel::simulate

#endif  // FIRESTEEL_TOOLS_SIMULATE_SIMULATOR_H_
