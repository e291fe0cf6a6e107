// The real engine beside the simulated one: the same trace in real time, and what steps cost.

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "runtime/threading/mutex.h"
#include "runtime/threading/worker_pool.h"
#include "tools/simulate/simulator.h"

namespace firesteel::simulate {
namespace {

constexpr size_t kMeasuringRuns = 5;
constexpr absl::Duration kMeasuringTime = absl::Seconds(15);

ComputeType ComputeFor(const ModelWeights& weights) {
  return ResolveComputeType(std::nullopt, weights.types).value_or(ComputeType::kF32);
}

class NoText final : public Tokenizer {
 public:
  absl::StatusOr<std::vector<int32_t>> EncodePrompt(absl::string_view) const override {
    return std::vector<int32_t>{2};
  }
  const std::string& TokenBytes(int32_t) const override { return empty_; }

 private:
  const std::string empty_;
};

/// Hands results on, and lets a caller wait for them.
class CountingSink final : public GenerationSink {
 public:
  explicit CountingSink(Recorder* recorder) : recorder_(recorder) {}
  void OnDelta(TokenDelta) override {}
  void OnFinish(GenerationResult result) override {
    recorder_->OnFinish(std::move(result));
    MutexLock lock(&mutex_);
    ++ended_;
    changed_.NotifyAll();
  }
  void WaitFor(uint64_t ended) {
    MutexLock lock(&mutex_);
    while (ended_ < ended) changed_.Wait(&mutex_);
  }

 private:
  Recorder* const recorder_;
  Mutex mutex_;
  CondVar changed_;
  uint64_t ended_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace

absl::StatusOr<Recording> RunForReal(const std::vector<Arrival>& trace,
                                     const std::shared_ptr<const ModelWeights>& weights,
                                     const EngineOptions& options, size_t threads, Intake intake,
                                     const Objectives& objectives, std::vector<StepRecord>* steps) {
  WorkerPool pool(threads);
  std::vector<StepRecord> all_steps;
  Recorder recorder(objectives, options.clock, &all_steps);
  const size_t vocab = weights->config.vocab_size;
  auto engine = Engine::Create(weights, std::make_shared<NoText>(), ComputeFor(*weights), options,
                               &pool, &recorder);
  if (!engine.ok()) return engine.status();
  const auto sink = std::make_shared<CountingSink>(&recorder);
  uint64_t accepted = 0;
  Recording recording = {.options = options,
                         .kv_cache_tokens = (*engine)->kv_capacity_tokens(),
                         .context_tokens = weights->config.max_position_embeddings,
                         .machine = {},
                         .measured = {},
                         .trace = trace};
  recorder.Start();
  const absl::Time start = options.clock->Now();
  for (size_t i = 0; i < trace.size(); ++i) {
    if (intake == Intake::kOpen) {
      absl::SleepFor(start + absl::Seconds(trace[i].seconds) - options.clock->Now());
    } else if (i % options.max_batch_size == 0) {
      sink->WaitFor(accepted);
    }
    GenerationRequest request = ToRequest(trace[i], i, vocab);
    recording.trace[i].seconds = absl::ToDoubleSeconds(options.clock->Now() - start);
    if (trace[i].timeout_seconds > 0) {
      request.deadline = options.clock->Now() + absl::Seconds(trace[i].timeout_seconds);
    }
    const absl::Status status = (*engine)->Submit(std::move(request), sink).status();
    if (status.code() == absl::StatusCode::kInvalidArgument) return status;
    if (status.ok()) ++accepted;
  }
  (*engine)->FinishDrain(absl::InfiniteFuture());
  const double first = intake == Intake::kOpen ? trace.front().seconds : 0;
  const double seconds = absl::ToDoubleSeconds(options.clock->Now() - start) - first;
  engine->reset();
  recording.measured = recorder.Finish(seconds);
  recording.measured.requests = trace.size();
  recording.machine = MachineOf(recording.measured.cost, all_steps);
  if (steps != nullptr) *steps = std::move(all_steps);
  return recording;
}

// All at once and of very different lengths: the batch is full at first and empties towards the
// end, prompts come alone and beside any number of rows.
absl::StatusOr<StepCost> MeasureCost(const std::shared_ptr<const ModelWeights>& weights,
                                     EngineOptions options, size_t threads) {
  const size_t context = weights->config.max_position_embeddings;
  PoissonTrace trace;
  trace.requests = std::clamp<size_t>(3 * options.max_batch_size, 16, 64);
  trace.rate = 1e6;
  trace.mean_prompt_tokens = static_cast<double>(std::min<size_t>(context, 1024)) / 6;
  trace.mean_answer_tokens = 48;
  trace.spread = 1;
  trace.max_prompt_tokens = static_cast<uint32_t>(context / 2);
  trace.max_answer_tokens = static_cast<uint32_t>(context / 4);
  trace.seed = 4711;
  options.max_queue_requests = static_cast<uint32_t>(trace.requests);
  options.max_queue_tokens = static_cast<uint32_t>(trace.requests * context);
  options.max_queue_wait = absl::ZeroDuration();
  // The middle one of a few runs, where they don't take long: a machine has quick and slow minutes.
  std::vector<StepCost> costs;
  const absl::Time start = absl::Now();
  do {
    const auto run = RunForReal(MakeTrace(trace), weights, options, threads, Intake::kOpen, {});
    if (!run.ok()) return run.status();
    costs.push_back(run->machine.cost);
  } while (costs.size() < kMeasuringRuns && absl::Now() - start < kMeasuringTime);
  std::sort(costs.begin(), costs.end(), [](const StepCost& a, const StepCost& b) {
    constexpr StepWork kTypical = {.prefill_tokens = 16, .decode_rows = 4};
    return a.Seconds(kTypical) < b.Seconds(kTypical);
  });
  return costs[costs.size() / 2];
}

}  // namespace firesteel::simulate
