// Prefill on the matrix units: operations per second of the dense products of Spark Gemma-2 2B, on
// two threads. Weights are taken from more memory than caches hold, as in a model.

#include <benchmark/benchmark.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "runtime/gemm/gemm.h"
#include "runtime/threading/worker_pool.h"

namespace firesteel::gemm {
namespace {

constexpr size_t kThreads = 2;
constexpr size_t kWeightBytes = size_t{256} << 20;

// Values do not matter for the speed; pages that were never written would.
template <typename T>
class Array {
 public:
  explicit Array(size_t count)
      : data_(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64}))) {
    std::memset(static_cast<void*>(data_.get()), 1, count * sizeof(T));
  }
  T* get() const { return data_.get(); }

 private:
  struct Delete {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Delete> data_;
};

template <typename T>
void Run(benchmark::State& state, WeightLayout layout) {
  using C = std::conditional_t<sizeof(T) == 1, int32_t, float>;
  const auto tokens = static_cast<size_t>(state.range(0));
  const auto outputs = static_cast<size_t>(state.range(1));
  const auto inputs = static_cast<size_t>(state.range(2));
  std::vector<std::unique_ptr<Gemm>> gemms;
  for (size_t i = 0; i < kThreads; ++i) {
    auto gemm = Gemm::Create();
    if (!gemm.ok()) {
      state.SkipWithError(Description().c_str());
      return;
    }
    gemms.push_back(*std::move(gemm));
  }
  const size_t size = outputs * inputs;
  const size_t matrices = kWeightBytes / (size * sizeof(T)) + 1;
  const Array<T> x(tokens * inputs);
  const Array<T> w(matrices * size);
  const Array<C> c(tokens * outputs);
  const bool out_in = layout == WeightLayout::kOutIn;
  WorkerPool pool(kThreads);
  bool ok = true;
  const auto multiply = [&](size_t matrix) {
    pool.Run([&](Worker& worker) {
      const IndexRange share = worker.Share(outputs, kRowGrain);
      const View<const T> xv{x.get(), tokens, inputs, inputs};
      const View<const T> wv{w.get() + matrix * size, out_in ? outputs : inputs,
                             out_in ? inputs : outputs, out_in ? inputs : outputs};
      const View<C> cv{c.get(), tokens, outputs, outputs};
      Gemm& gemm = *gemms[worker.index()];
      absl::Status status;
      if constexpr (sizeof(T) == 1) {
        status = gemm.Int8(xv, wv, layout, share.begin, share.end, cv);
      } else {
        status = gemm.BF16(xv, wv, layout, share.begin, share.end, cv);
      }
      if (!status.ok()) ok = false;
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

void Int8(benchmark::State& state) { Run<int8_t>(state, WeightLayout::kOutIn); }
void Int8Transposed(benchmark::State& state) { Run<int8_t>(state, WeightLayout::kInOut); }
void BF16(benchmark::State& state) { Run<kernels::BF16>(state, WeightLayout::kOutIn); }
void BF16Transposed(benchmark::State& state) { Run<kernels::BF16>(state, WeightLayout::kInOut); }

void Shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"tokens", "outputs", "inputs"})->UseRealTime()->Unit(benchmark::kMillisecond);
  for (const int64_t tokens : {64, 128, 256, 512}) {
    b->Args({tokens, 4096, 2304});   // query, key, value
    b->Args({tokens, 2304, 2048});   // attention output
    b->Args({tokens, 13824, 1024});  // gate
    b->Args({tokens, 13824, 1280});  // up
    b->Args({tokens, 9216, 2304});   // gate and up of the dense twin
    b->Args({tokens, 2304, 9216});   // and its down
  }
}
void Down(benchmark::internal::Benchmark* b) {
  b->ArgNames({"tokens", "outputs", "inputs"})->UseRealTime()->Unit(benchmark::kMillisecond);
  for (const int64_t tokens : {64, 128, 256, 512}) b->Args({tokens, 2304, 13824});
}
BENCHMARK(Int8)->Apply(Shapes);
BENCHMARK(Int8Transposed)->Apply(Down);
BENCHMARK(BF16)->Apply(Shapes);
BENCHMARK(BF16Transposed)->Apply(Down);

}  // namespace
}  // namespace firesteel::gemm
