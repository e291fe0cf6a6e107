// Prefill on the matrix units: operations per second of the dense products in bf16 of Spark Gemma-2
// 2B, on two threads. Weights are taken from more memory than caches hold, as in a model.

#include <benchmark/benchmark.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "runtime/gemm/gemm.h"
#include "runtime/threading/worker_pool.h"

namespace firesteel::gemm {
namespace {

using kernels::BF16;

constexpr size_t kThreads = 2;
constexpr size_t kWeightBytes = size_t{256} << 20;

void Prompt(benchmark::State& state) {
  const auto tokens = static_cast<size_t>(state.range(0));
  const auto outputs = static_cast<size_t>(state.range(1));
  const auto inputs = static_cast<size_t>(state.range(2));
  std::vector<std::unique_ptr<Gemm>> gemms;
  for (size_t i = 0; i < kThreads; ++i) {
    auto gemm = Gemm::Create();
    if (!gemm.ok()) return state.SkipWithError(Description().c_str());
    gemms.push_back(*std::move(gemm));
  }
  const size_t size = outputs * inputs;
  const size_t matrices = kWeightBytes / (size * sizeof(BF16)) + 1;
  // Values do not matter for the speed; pages that were never written would.
  const std::vector<BF16> x(tokens * inputs), w(matrices * size);
  std::vector<float> c(tokens * outputs);
  WorkerPool pool(kThreads);
  bool ok = true;
  const auto multiply = [&](size_t matrix) {
    pool.Run([&](Worker& worker) {
      const IndexRange share = worker.Share(outputs, kRowGrain);
      if (!gemms[worker.index()]
               ->Multiply({x.data(), tokens, inputs, inputs},
                          {&w[matrix * size], outputs, inputs, inputs}, share.begin, share.end,
                          {c.data(), tokens, outputs, outputs})
               .ok()) {
        ok = false;
      }
    });
  };
  multiply(0);
  size_t next = 0;
  for (auto _ : state) {
    next = (next + 1) % matrices;
    multiply(next);
    benchmark::ClobberMemory();
  }
  if (!ok) state.SkipWithError("the product failed");
  state.counters["op/s"] = benchmark::Counter(2.0 * static_cast<double>(tokens * size),
                                              benchmark::Counter::kIsIterationInvariantRate);
}

void Shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"tokens", "outputs", "inputs"})->UseRealTime()->Unit(benchmark::kMillisecond);
  for (const int64_t tokens : {64, 128, 256, 512}) {
    b->Args({tokens, 4096, 2304});   // query, key, value
    b->Args({tokens, 2304, 2048});   // attention output
    b->Args({tokens, 13824, 1024});  // gate
    b->Args({tokens, 9216, 2304});   // gate and up of the dense twin
    b->Args({tokens, 2304, 9216});   // and its down
  }
}
BENCHMARK(Prompt)->Apply(Shapes);

}  // namespace
}  // namespace firesteel::gemm
