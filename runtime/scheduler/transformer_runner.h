// The engine's model: a transformer and one sampler a thread.

#ifndef FIRESTEEL_RUNTIME_SCHEDULER_TRANSFORMER_RUNNER_H_
#define FIRESTEEL_RUNTIME_SCHEDULER_TRANSFORMER_RUNNER_H_

#include <memory>
#include <span>
#include <vector>

#include "runtime/sampling/sampler.h"
#include "runtime/scheduler/engine.h"
#include "runtime/scheduler/model_runner.h"

namespace firesteel {

class TransformerRunner final : public ModelRunner {
 public:
  /// Options are resolved; `pool` outlives it. At most `max_logit_rows` rows of a step want logits.
  TransformerRunner(const std::shared_ptr<const ModelWeights>& weights, ComputeType compute,
                    const EngineOptions& options, uint32_t max_logit_rows, WorkerPool* pool);

  absl::Status Forward(std::span<const SequenceSlice> batch) override {
    transformer_.Forward(batch);
    return absl::OkStatus();
  }
  void ReadLogits(std::span<Draw> draws, std::span<Score> scores) override;
  std::span<const LayerActivity> activity() const override { return transformer_.activity(); }
  std::span<const HeadActivity> head_activity() const override {
    return transformer_.head_activity();
  }
  const CostModel& cost() const override { return cost_; }

 private:
  void DrawToken(Sampler& sampler, Draw& draw);

  WorkerPool* const pool_;
  Transformer transformer_;
  const CostModel cost_;
  std::vector<Sampler> samplers_;  // one a worker
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_SCHEDULER_TRANSFORMER_RUNNER_H_
