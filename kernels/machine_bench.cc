// What one core of this machine can do: the roofs that the other benchmarks' rates are fractions
// of. Run in the same process order as they are, as neighbours on the machine and its clock change
// from minute to minute.

#include <numeric>

#include "kernels/bench_util.h"
#include "kernels/compute_peak.h"
#include "kernels/memory_read.h"

namespace firesteel::kernels {
namespace {

void FmaPeak(benchmark::State& state) {
  float values[3] = {0.5f, 1.0f, 0.0f};
  double flops = 0.0;
  for (auto _ : state) {
    flops = MultiplyAdds(10000, values);
    benchmark::DoNotOptimize(values);
  }
  SetFlops(state, flops);
}
BENCHMARK(FmaPeak);

// Arg: MiB; 1 stays in L2, 3 is one weight matrix of a small model, 256 is past most L3 caches.
void ReadBandwidth(benchmark::State& state) {
  const size_t bytes = static_cast<size_t>(state.range(0)) << 20;
  AlignedVector<uint32_t> memory(bytes / sizeof(uint32_t));
  std::iota(memory.begin(), memory.end(), 0u);
  for (auto _ : state) {
    benchmark::DoNotOptimize(ReadAll(memory.data(), bytes));
  }
  SetBytes(state, static_cast<double>(bytes));
}
BENCHMARK(ReadBandwidth)->Arg(1)->Arg(3)->Arg(40)->Arg(256);

}  // namespace
}  // namespace firesteel::kernels
