// Threshold and compaction of one token's FFN scores.

#include "kernels/bench_util.h"
#include "kernels/statistical_topk.h"

namespace firesteel::kernels {
namespace {

void StatisticalThreshold(benchmark::State& state) {
  const auto scores = NormalFloats(static_cast<size_t>(state.range(0)));
  const double quantile = NormalQuantile(0.92);
  for (auto _ : state) {
    benchmark::DoNotOptimize(kernels::StatisticalThreshold(scores.data(), scores.size(), quantile));
  }
  SetBytes(state, 4.0 * static_cast<double>(scores.size()));
}
BENCHMARK(StatisticalThreshold)->Arg(3072)->Arg(13824);

void CompactAbove(benchmark::State& state) {
  const auto scores = NormalFloats(static_cast<size_t>(state.range(0)));
  std::vector<uint32_t> indices(scores.size() + kCompactionSlack);
  AlignedVector<float> excess(scores.size() + kCompactionSlack);
  for (auto _ : state) {
    benchmark::DoNotOptimize(
        kernels::CompactAbove(scores.data(), scores.size(), 1.4, indices.data(), excess.data()));
    benchmark::ClobberMemory();
  }
  SetBytes(state, 4.0 * static_cast<double>(scores.size()));
}
BENCHMARK(CompactAbove)->Arg(3072)->Arg(13824);

}  // namespace
}  // namespace firesteel::kernels
