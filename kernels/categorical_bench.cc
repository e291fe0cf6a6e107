// What a draw reads of a whole vocabulary; bytes are those of the logits.

#include "kernels/bench_util.h"
#include "kernels/categorical.h"

namespace firesteel::kernels {
namespace {

void LargestLogit(benchmark::State& state) {
  const auto logits = NormalFloats(static_cast<size_t>(state.range(0)));
  for (auto _ : state) {
    benchmark::DoNotOptimize(kernels::LargestLogit(logits.data(), logits.size()));
  }
  SetBytes(state, 4.0 * static_cast<double>(logits.size()));
}
void CategoricalBlockSums(benchmark::State& state) {
  const auto logits = NormalFloats(static_cast<size_t>(state.range(0)));
  std::vector<double> sums(logits.size() / kCategoricalBlock + 1);
  for (auto _ : state) {
    kernels::CategoricalBlockSums(logits.data(), logits.size(), 6.0f, 1.0f, sums.data());
    benchmark::ClobberMemory();
  }
  SetBytes(state, 4.0 * static_cast<double>(logits.size()));
}
BENCHMARK(LargestLogit)->Arg(32768)->Arg(256000);
BENCHMARK(CategoricalBlockSums)->Arg(32768)->Arg(256000);

}  // namespace
}  // namespace firesteel::kernels
