// What counting costs: a step of one decoding sequence, a full batch and a prefill chunk, in the
// shapes of the bundled model and of the paper's 2B model; and its part of the time of a running
// engine.

#include <benchmark/benchmark.h>

#include <chrono>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/synchronization/blocking_counter.h"
#include "runtime/checkpoint/weights.h"
#include "runtime/scheduler/engine.h"
#include "runtime/threading/worker_pool.h"
#include "runtime/tokenizer/tokenizer.h"
#include "server/metrics.h"

namespace firesteel::server {
namespace {

ModelConfig Shape(size_t layers, size_t neurons) {
  ModelConfig config;
  config.architecture = Architecture::kSparkGemma2;
  config.num_layers = layers;
  config.intermediate_size = neurons;
  config.num_heads = 8;
  config.ffn_top_k = neurons * 8 / 100;
  return config;
}

// Arguments: layers, rows of the step.
void BM_OnStep(benchmark::State& state) {
  const auto layers = static_cast<size_t>(state.range(0));
  const auto rows = static_cast<size_t>(state.range(1));
  ServerMetrics metrics;
  const auto model = metrics.AddModel("m", Shape(layers, 13824));
  model->StartCounting();
  std::vector<RowActivity> activity(rows);
  for (size_t i = 0; i < rows; ++i) {
    activity[i] = {.ffn_active = static_cast<uint32_t>(1000 + i % 200),
                   .attended = static_cast<uint32_t>(8 * (i % 300)),
                   .visible = static_cast<uint32_t>(300 + i)};
  }
  const std::vector<LayerActivity> report_layers(layers, {.rows = activity, .ffn_union = 5000});
  const std::vector<absl::Duration> latencies(rows, absl::Milliseconds(12));
  StepReport report;
  report.decode_tokens = static_cast<uint32_t>(rows);
  report.layers = report_layers;
  report.inter_token_latencies = latencies;
  for (auto _ : state) model->OnStep(report);
}
BENCHMARK(BM_OnStep)->ArgsProduct({{7, 26}, {1, 32, 256}})->Unit(benchmark::kMicrosecond);

/// Takes the time of all that an observer is told.
class TimedObserver final : public EngineObserver {
 public:
  using Clock = std::chrono::steady_clock;

  explicit TimedObserver(EngineObserver* observer) : observer_(observer) {}

  void OnRejected(RejectionReason reason) override { observer_->OnRejected(reason); }
  void OnStep(const StepReport& report) override {
    ++steps_;
    step_seconds_ += absl::ToDoubleSeconds(report.duration);
    Time([&] { observer_->OnStep(report); });
  }
  void OnFinish(const FinishReport& report) override {
    Time([&] { observer_->OnFinish(report); });
  }
  void OnGauges(const EngineGauges& gauges) override {
    Time([&] { observer_->OnGauges(gauges); });
  }

  // Read while the engine is idle.
  double steps() const { return static_cast<double>(steps_); }
  double step_seconds() const { return step_seconds_; }
  double observer_seconds() const { return observer_seconds_; }

 private:
  template <typename Call>
  void Time(const Call& call) {
    const Clock::time_point begin = Clock::now();
    call();
    observer_seconds_ += std::chrono::duration<double>(Clock::now() - begin).count();
  }

  EngineObserver* const observer_;
  uint64_t steps_ = 0;
  double step_seconds_ = 0;
  double observer_seconds_ = 0;
};

class EndCounter final : public GenerationSink {
 public:
  explicit EndCounter(int requests) : left_(requests) {}
  void OnDelta(TokenDelta) override {}
  void OnFinish(GenerationResult) override { left_.DecrementCount(); }
  void Wait() { left_.Wait(); }

 private:
  absl::BlockingCounter left_;
};

// The bundled model generates; argument: sequences at once. What observing takes of the steps' time
// is the counter `share`.
void BM_ObserverShare(benchmark::State& state) {
  const std::string path = FIRESTEEL_SOURCE_DIR "/models/spark-stories";
  auto weights = LoadWeights(path, WeightFormat::kAuto);
  if (!weights.ok()) return state.SkipWithError("the bundled model cannot be read");
  const ModelConfig& config = (*weights)->config;
  auto tokenizer = Tokenizer::Load(path, config.vocab_size, config.bos_token_id);
  const auto compute = ResolveComputeType(std::nullopt, (*weights)->types);
  ServerMetrics metrics;
  const auto counted = metrics.AddModel("spark-stories", config);
  counted->StartCounting();
  TimedObserver observer(counted.get());
  WorkerPool pool(2);
  auto engine =
      Engine::Create(*weights, *std::move(tokenizer), *compute, EngineOptions(), &pool, &observer);
  if (!engine.ok()) return state.SkipWithError("the engine cannot be made");
  const auto requests = static_cast<int>(state.range(0));
  uint64_t seed = 0;
  for (auto _ : state) {
    const auto sink = std::make_shared<EndCounter>(requests);
    for (int i = 0; i < requests; ++i) {
      GenerationRequest request;
      request.prompt = {config.bos_token_id};
      request.max_tokens = 200;
      request.stopping.ignore_eos = true;
      request.sampling.seed = ++seed;
      if (!(*engine)->Submit(std::move(request), sink).ok()) std::abort();
    }
    sink->Wait();
  }
  (*engine)->FinishDrain(absl::InfiniteFuture());
  state.counters["step_ms"] = 1e3 * observer.step_seconds() / observer.steps();
  state.counters["observer_us_per_step"] = 1e6 * observer.observer_seconds() / observer.steps();
  state.counters["share"] = observer.observer_seconds() / observer.step_seconds();
}
BENCHMARK(BM_ObserverShare)->Arg(1)->Arg(8)->UseRealTime()->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace firesteel::server
