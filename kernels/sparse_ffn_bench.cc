// The sparse products on one thread; the rate is of the bytes of active rows.

#include <algorithm>

#include "kernels/bench_util.h"
#include "kernels/sparse_ffn.h"

namespace firesteel::kernels {
namespace {

// `percent` of the neurons, scattered like real activations.
std::vector<uint32_t> Active(size_t neurons, int64_t percent) {
  std::mt19937 engine(1);
  std::bernoulli_distribution keep(static_cast<double>(percent) / 100.0);
  std::vector<uint32_t> active;
  for (size_t i = 0; i < neurons; ++i) {
    if (keep(engine)) active.push_back(static_cast<uint32_t>(i));
  }
  return active;
}

// Copies of the weights are used in turn, so that no cache below 256 MB keeps the rows of the last
// call.
struct Layers {
  Layers(size_t num_neurons, size_t row_width)
      : bytes(num_neurons * row_width * 2),
        count(std::max<size_t>(1, (size_t{256} << 20) / bytes)),
        memory(SomeBF16(count * num_neurons * row_width)),
        neurons(num_neurons),
        width(row_width) {}
  TypedView Next() {
    at = (at + 1) % count;
    return {memory.data() + at * neurons * width, DType::kBF16, neurons, width, width};
  }
  size_t bytes, count;
  AlignedVector<BF16> memory;
  size_t neurons, width, at = 0;
};

// Args: neurons, row width, percent active.
void MaskedMatVec(benchmark::State& state) {
  const auto neurons = static_cast<size_t>(state.range(0)),
             depth = static_cast<size_t>(state.range(1));
  Layers layers(neurons, depth);
  const auto active = Active(neurons, state.range(2));
  const auto x = NormalFloats(depth);
  AlignedVector<float> out(active.size());
  const TypedView xv{x.data(), DType::kF32, 1, depth, depth};
  for (auto _ : state) {
    kernels::MaskedMatVec(xv, layers.Next(), active.data(), 0, active.size(), out.data());
    benchmark::ClobberMemory();
  }
  SetBytes(state, 2.0 * static_cast<double>(active.size() * depth));
}

void SparseVecMat(benchmark::State& state) {
  const auto neurons = static_cast<size_t>(state.range(0)),
             width = static_cast<size_t>(state.range(1));
  Layers layers(neurons, width);
  const auto active = Active(neurons, state.range(2));
  const auto coefficients = NormalFloats(active.size());
  AlignedVector<float> y(width);
  for (auto _ : state) {
    AddSparseVecMat(coefficients.data(), active.data(), active.size(), layers.Next(), y.data());
    benchmark::ClobberMemory();
  }
  SetBytes(state, 2.0 * static_cast<double>(active.size() * width));
}

BENCHMARK(MaskedMatVec)
    ->ArgNames({"neurons", "depth", "percent"})
    ->Args({3072, 256, 8})
    ->Args({3072, 256, 100})
    ->Args({13824, 1280, 8});
BENCHMARK(SparseVecMat)
    ->ArgNames({"neurons", "width", "percent"})
    ->Args({3072, 512, 8})
    ->Args({3072, 512, 100})
    ->Args({13824, 2304, 8});

}  // namespace
}  // namespace firesteel::kernels
