// MatMul on one thread: GFLOP/s of prefill chunks and GB/s of weights read in decode.

#include "kernels/amx.h"
#include "kernels/bench_util.h"
#include "kernels/matmul.h"

namespace firesteel::kernels {
namespace {

constexpr int64_t kLargeWeights = 256 << 20;  // bytes: past the L3 cache of most machines

void Run(benchmark::State& state, DType x_dtype, size_t tokens, size_t depth, size_t rows) {
  const auto x = NormalFloats(tokens * depth);
  AlignedVector<BF16> x16(tokens * depth);
  RoundToBF16(x.data(), x.size(), x16.data());
  const auto w = SomeBF16(rows * depth);
  AlignedVector<float> y(tokens * rows);
  const void* data = x_dtype == DType::kF32 ? static_cast<const void*>(x.data()) : x16.data();
  const TypedView xv{data, x_dtype, tokens, depth, depth};
  const TypedView wv{w.data(), DType::kBF16, rows, depth, depth};
  for (auto _ : state) {
    MatMul(xv, wv, 0, rows, {y.data(), tokens, rows, rows});
    benchmark::ClobberMemory();
  }
  SetFlops(state, 2.0 * static_cast<double>(tokens * depth * rows));
  SetBytes(state, 2.0 * static_cast<double>(depth * rows));
}

// Args: tokens, depth, rows.
void MatMulF32(benchmark::State& state) {
  Run(state, DType::kF32, static_cast<size_t>(state.range(0)), static_cast<size_t>(state.range(1)),
      static_cast<size_t>(state.range(2)));
}
void MatMulBF16(benchmark::State& state) {
  Run(state, DType::kBF16, static_cast<size_t>(state.range(0)), static_cast<size_t>(state.range(1)),
      static_cast<size_t>(state.range(2)));
}

// The same for prompts on AMX.
void AmxBF16(benchmark::State& state) {
  if (!AmxAvailable()) return state.SkipWithError("no AMX here");
  const auto tokens = static_cast<size_t>(state.range(0)),
             depth = static_cast<size_t>(state.range(1)),
             rows = static_cast<size_t>(state.range(2));
  const auto x = SomeBF16(tokens * depth), w = SomeBF16(rows * depth);
  AlignedVector<int32_t> words(TileColumns::Words(tokens, depth / 2));
  const TileColumns tiles{words.data(), depth / 2 / kTileWords};
  for (size_t t = 0; t < tokens; ++t) SetTileColumn(&x[t * depth], depth, t, tiles);
  AlignedVector<float> y(tokens * rows);
  for (auto _ : state) {
    AmxMatMul(tiles, 0, tokens, {w.data(), DType::kBF16, rows, depth, depth}, 0, rows,
              {y.data(), tokens, rows, rows});
    benchmark::ClobberMemory();
  }
  SetFlops(state, 2.0 * static_cast<double>(tokens * depth * rows));
  SetBytes(state, 2.0 * static_cast<double>(depth * rows));
}
BENCHMARK(AmxBF16)
    ->ArgNames({"tokens", "depth", "rows"})
    ->Args({64, 2304, 4096})
    ->Args({512, 2304, 4096})
    ->Args({512, 1024, 13824});

void Shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"tokens", "depth", "rows"});
  for (const int64_t tokens : {1, 4, 8, 16, 64, 256}) b->Args({tokens, 512, 3072});
  for (const int64_t tokens : {1, 64}) b->Args({tokens, 2304, 9216});
  b->Args({64, 9216, 2304});
  b->Args({1, 2304, kLargeWeights / 2 / 2304});
}
BENCHMARK(MatMulF32)->Apply(Shapes);
BENCHMARK(MatMulBF16)->Apply(Shapes);

void RoundToBF16(benchmark::State& state) {
  const auto x = NormalFloats(static_cast<size_t>(state.range(0)));
  AlignedVector<BF16> out(x.size());
  for (auto _ : state) {
    kernels::RoundToBF16(x.data(), x.size(), out.data());
    benchmark::ClobberMemory();
  }
  SetBytes(state, 6.0 * static_cast<double>(x.size()));
}
BENCHMARK(RoundToBF16)->Arg(2304);

}  // namespace
}  // namespace firesteel::kernels
