// Integer products on one thread; the rate is of the bytes of weights.

#include <algorithm>

#include "kernels/amx.h"
#include "kernels/bench_util.h"
#include "kernels/quantized.h"

namespace firesteel::kernels {
namespace {

AlignedVector<uint8_t> SomeBytes(size_t n) {
  AlignedVector<uint8_t> out(n);
  uint32_t state = 1;
  for (uint8_t& v : out) {
    state = state * 1664525u + 1013904223u;
    v = static_cast<uint8_t>(state >> 24);
  }
  return out;
}

// Tokens [tokens, depth], rounded, with the memory that they need.
class Rounded {
 public:
  Rounded(size_t tokens, size_t depth)
      : memory_(QuantizedRows::Bytes(tokens, depth)),
        view_(QuantizedRows::Place(memory_.data(), tokens, depth)) {
    const auto values = NormalFloats(depth);
    for (size_t t = 0; t < tokens; ++t) QuantizeActivations(values.data(), view_, t);
  }
  const QuantizedRows& view() const { return view_; }

 private:
  AlignedVector<uint8_t> memory_;
  QuantizedRows view_;
};

// Args: tokens, rows, depth, 1 for 4 bits (2: 8 bits on AMX). Copies of the weights are used in
// turn, so that no cache below 512 MB keeps them.
void MatMul(benchmark::State& state) {
  const auto tokens = static_cast<size_t>(state.range(0)),
             rows = static_cast<size_t>(state.range(1)),
             depth = static_cast<size_t>(state.range(2));
  const DType dtype = state.range(3) == 1 ? DType::kI4 : DType::kI8;
  const size_t bytes = BytesOf(dtype, rows * depth);
  const size_t copies = rows <= 256 ? 1 : (size_t{512} << 20) / bytes;
  const auto memory = SomeBytes(copies * bytes);
  const AlignedVector<float> row_scales(rows, 0.01f);
  const AlignedVector<BF16> block_scales(rows * depth / kI4Block, ToBF16(0.01f));

  Rounded rounded(tokens, depth);
  const QuantizedRows x = rounded.view();
  const size_t plane_words = TileColumns::Words(tokens, depth / 4);
  AlignedVector<int32_t> words(2 * plane_words);
  const TileColumns tiles{words.data(), depth / 64, words.data() + plane_words};
  const bool amx = state.range(3) == 2;
  if (amx && !AmxAvailable()) return state.SkipWithError("no AMX here");
  AlignedVector<float> y(tokens * (rows + 16));
  size_t at = 0;
  for (auto _ : state) {
    at = (at + 1) % copies;
    const TypedView w{memory.data() + at * bytes, dtype, rows, depth, depth, row_scales.data(),
                      block_scales.data()};
    if (amx) {
      AmxMatMul(x, tiles, w, 0, rows, {y.data(), tokens, rows, rows + 16});
    } else {
      QuantizedMatMul(x, w, 0, rows, {y.data(), tokens, rows, rows + 16});
    }
    benchmark::ClobberMemory();
  }
  SetBytes(state, static_cast<double>(bytes));
  SetFlops(state, 2.0 * static_cast<double>(tokens * rows * depth));
}

BENCHMARK(MatMul)
    ->ArgNames({"tokens", "rows", "depth", "int4"})
    ->Args({1, 13824, 1024, 0})
    ->Args({1, 4096, 2304, 0})
    ->Args({8, 4096, 2304, 0})
    ->Args({64, 4096, 2304, 0})
    ->Args({1, 4096, 2304, 2})
    ->Args({8, 4096, 2304, 2})
    ->Args({8, 256, 2304, 2})
    ->Args({256, 4096, 2304, 2})
    ->Args({256, 224, 2304, 2})
    ->Args({1, 13824, 1024, 1})
    ->Args({1, 4096, 2304, 1})
    ->Args({8, 4096, 2304, 1})
    ->Args({1, 256, 2304, 0})
    ->Args({8, 256, 2304, 0})
    ->Args({1, 256, 2304, 1})
    ->Args({8, 256, 2304, 1});

// Args: rows, depth, listed: 8-bit rows here and there, all from L2 where there are few.
void Masked(benchmark::State& state) {
  const auto rows = static_cast<size_t>(state.range(0)),
             depth = static_cast<size_t>(state.range(1)),
             listed = static_cast<size_t>(state.range(2));
  const auto memory = SomeBytes(rows * depth);
  const AlignedVector<float> row_scales(rows, 0.01f);
  Rounded rounded(1, depth);
  const QuantizedRows x = rounded.view();
  const TypedView w{memory.data(), DType::kI8, rows, depth, depth, row_scales.data(), nullptr};
  std::vector<uint32_t> list(listed);
  for (size_t i = 0; i < listed; ++i) list[i] = static_cast<uint32_t>(i * rows / listed);
  AlignedVector<float> y(listed + 16);
  for (auto _ : state) {
    RowFetcher fetcher;
    fetcher.Add(w, list.data(), listed, 0, depth);
    fetcher.Fetch(RowFetcher::kLead);
    QuantizedMaskedMatVec(x, w, list.data(), 0, listed, fetcher, y.data());
    benchmark::ClobberMemory();
  }
  SetBytes(state, static_cast<double>(listed * depth));
}

BENCHMARK(Masked)
    ->ArgNames({"rows", "depth", "listed"})
    ->Args({864, 1280, 69})
    ->Args({864, 2304, 69});

void Activations(benchmark::State& state) {
  const auto depth = static_cast<size_t>(state.range(0));
  Rounded rounded(1, depth);
  const QuantizedRows x = rounded.view();
  const auto values = NormalFloats(depth);
  for (auto _ : state) {
    QuantizeActivations(values.data(), x, 0);
    benchmark::ClobberMemory();
  }
}

BENCHMARK(Activations)->ArgName("depth")->Arg(2304);

}  // namespace
}  // namespace firesteel::kernels
