// What the engine's loop needs of a model: to compute a step, and to draw from what came of it. The
// transformer is one, the simulator's clock another.

#ifndef FIRESTEEL_RUNTIME_SCHEDULER_MODEL_RUNNER_H_
#define FIRESTEEL_RUNTIME_SCHEDULER_MODEL_RUNNER_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/model/activity.h"
#include "runtime/model/cost_model.h"
#include "runtime/model/transformer.h"
#include "runtime/sampling/logprobs.h"
#include "runtime/scheduler/live_request.h"

namespace firesteel {

/// A token to draw from a row of logits.
struct Draw {
  LiveRequest* request = nullptr;
  Sequence* sequence = nullptr;
  size_t logit_row = 0;
  absl::StatusOr<int32_t> token = 0;    // the answer
  std::optional<TokenLogprob> logprob;  // the same, where the request asks for it
};

/// A token of a prompt, to be scored by a row of logits.
struct Score {
  LiveRequest* request = nullptr;
  int32_t token = 0;
  size_t logit_row = 0;
  TokenLogprob logprob;  // the answer
};

/// One caller at a time.
class ModelRunner {
 public:
  virtual ~ModelRunner() = default;

  /// An error leaves logits and what was written to the cache undefined.
  virtual absl::Status Forward(std::span<const SequenceSlice> batch) = 0;
  /// Answers all, from the logits of the last Forward.
  virtual void ReadLogits(std::span<Draw> draws, std::span<Score> scores) = 0;
  /// Of the last Forward, as Transformer has them.
  virtual std::span<const LayerActivity> activity() const = 0;
  virtual std::span<const HeadActivity> head_activity() const = 0;
  virtual const CostModel& cost() const = 0;
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_SCHEDULER_MODEL_RUNNER_H_
