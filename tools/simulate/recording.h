// A run of the real engine, so that the simulator can be held against it: what was asked and when,
// of which machine, and what came of it.

#ifndef FIRESTEEL_TOOLS_SIMULATE_RECORDING_H_
#define FIRESTEEL_TOOLS_SIMULATE_RECORDING_H_

#include <cstddef>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "runtime/scheduler/engine.h"
#include "runtime/scheduler/step_cost.h"
#include "tools/simulate/outcome.h"
#include "tools/simulate/trace.h"

namespace firesteel::simulate {

/// How long steps take, and how much longer or shorter from one moment to the next.
struct Machine {
  static constexpr double kWindowSeconds = 0.05;

  StepCost cost;
  /// What steps took over what `cost` says, in each window since the start; 1 behind the last.
  std::vector<double> pace;

  /// Of a step that begins `start` seconds after the start.
  double Seconds(const StepWork& work, double start) const;
};

/// The machine that took these steps: `cost` is what they fit.
Machine MachineOf(const StepCost& cost, const std::vector<StepRecord>& steps);

struct Recording {
  EngineOptions options;  // neither the clock nor what depends on the model
  size_t kv_cache_tokens = 0;
  size_t context_tokens = 0;
  Machine machine;
  Outcome measured;
  std::vector<Arrival> trace;  // with the times at which requests were submitted
};

/// As JSON; numbers are rounded, so that a recording is short.
std::string ToJson(const Recording& recording);
/// InvalidArgument says what is missing or out of bounds, NotFound that there is no such file.
absl::StatusOr<Recording> ParseRecording(const std::string& text);
absl::StatusOr<Recording> ReadRecording(const std::string& path);

}  // namespace firesteel::simulate

#endif  // FIRESTEEL_TOOLS_SIMULATE_RECORDING_H_
