// What counting a step costs, for one decoding sequence, a full batch and a prefill chunk, in the
// shapes of the bundled model and of the paper's 2B model.

#include <benchmark/benchmark.h>

#include <vector>

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
  EngineMetrics* const model = metrics.AddModel("m", Shape(layers, 13824));
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

}  // namespace
}  // namespace firesteel::server
