// One query head at the end of a context, spark beside dense attention of the same head.

#include "kernels/attention.h"
#include "kernels/bench_util.h"
#include "kernels/statistical_topk.h"

namespace firesteel::kernels {
namespace {

void Run(benchmark::State& state, const AttentionShape& shape) {
  const auto positions = static_cast<size_t>(state.range(0));
  const size_t num_blocks = (positions + kKvBlockTokens - 1) / kKvBlockTokens;
  const auto memory = NormalFloats(num_blocks * shape.BlockFloats());
  std::vector<const float*> blocks;
  for (size_t b = 0; b < num_blocks; ++b) blocks.push_back(&memory[b * shape.BlockFloats()]);
  const auto query = NormalFloats(shape.head_dim, 2);
  AlignedVector<float> scratch(AttentionScratchFloats(positions)), out(shape.head_dim);
  const double quantile =
      shape.top_k == 0 || positions <= shape.top_k
          ? 0.0
          : NormalQuantile(1.0 - static_cast<double>(shape.top_k) / static_cast<double>(positions));
  size_t kept = 0;
  for (auto _ : state) {
    kept = Attend(shape, query.data(), blocks.data(), 0, 0, positions, quantile, scratch.data(),
                  out.data(), nullptr);
    benchmark::ClobberMemory();
  }
  state.counters["kept"] = static_cast<double>(kept);
  const double read = static_cast<double>(positions * shape.predictor_dim) +
                      static_cast<double>(kept * (2 * shape.head_dim - shape.predictor_dim));
  SetBytes(state, 4.0 * read);
}

// Args: positions, head_dim, top_k.
void AttendSpark(benchmark::State& state) {
  const auto dim = static_cast<size_t>(state.range(1));
  Run(state, {dim, dim / 2, static_cast<size_t>(state.range(2)), 0.1f, 50.0f});
}
void AttendDense(benchmark::State& state) {
  const auto dim = static_cast<size_t>(state.range(1));
  Run(state, {dim, dim, 0, 0.1f, 50.0f});
}
BENCHMARK(AttendSpark)
    ->ArgNames({"positions", "head_dim", "top_k"})
    ->Args({256, 64, 64})
    ->Args({1024, 64, 64})
    ->Args({4096, 256, 256});
BENCHMARK(AttendDense)
    ->ArgNames({"positions", "head_dim"})
    ->Args({256, 64})
    ->Args({1024, 64})
    ->Args({4096, 256});

}  // namespace
}  // namespace firesteel::kernels
