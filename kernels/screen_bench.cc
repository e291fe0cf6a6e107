// The first pass of the sublinear head on one thread; the rate is of the bytes of 2-bit weights.

#include "kernels/bench_util.h"
#include "kernels/screen.h"

namespace firesteel::kernels {
namespace {

// Args: tokens, rows, columns.
void Screen(benchmark::State& state) {
  const auto tokens = static_cast<size_t>(state.range(0)),
             rows = static_cast<size_t>(state.range(1)), cols = static_cast<size_t>(state.range(2));
  const size_t padded = PaddedI2Cols(cols);
  AlignedVector<uint8_t> codes(rows * BytesOfI2Row(cols));
  uint32_t random = 1;
  for (uint8_t& v : codes) {
    random = random * 1664525u + 1013904223u;
    v = static_cast<uint8_t>(random >> 24);
  }
  const AlignedVector<float> row_scales(rows, 0.01f);
  AlignedVector<uint8_t> memory(QuantizedRows::Bytes(tokens, padded));
  const QuantizedRows x = QuantizedRows::Place(memory.data(), tokens, padded);
  const auto values = NormalFloats(padded);
  for (size_t t = 0; t < tokens; ++t) QuantizeToBytes(values.data(), x, t);
  AlignedVector<float> y(tokens * rows);
  for (auto _ : state) {
    ScreenMatMul(x, {codes.data(), row_scales.data(), rows, cols}, 0, rows,
                 {y.data(), tokens, rows, rows});
    benchmark::ClobberMemory();
  }
  SetBytes(state, static_cast<double>(codes.size()));
}

// The second shape is the head of Gemma-2 2B: 147 MB, more than most caches.
BENCHMARK(Screen)
    ->ArgNames({"tokens", "rows", "cols"})
    ->Args({1, 8192, 512})
    ->Args({1, 256000, 2304})
    ->Args({2, 256000, 2304})
    ->Args({8, 256000, 2304});

void Rotate(benchmark::State& state) {
  const auto n = static_cast<size_t>(state.range(0));
  auto x = NormalFloats(n);
  const AlignedVector<float> signs(3 * n, -1.0f);
  for (auto _ : state) {
    RotateAtRandom(signs.data(), n, x.data());
    benchmark::ClobberMemory();
  }
}

BENCHMARK(Rotate)->ArgName("cols")->Arg(512)->Arg(2304);

}  // namespace
}  // namespace firesteel::kernels
