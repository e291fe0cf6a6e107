// One token in one layer of the shape of Gemma-2 2B (8 query heads, 4 KV heads of 256), spark
// beside dense, over a KV cache of f32 and of bf16.

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "kernels/attention.h"
#include "kernels/bench_util.h"
#include "kernels/statistical_topk.h"

namespace firesteel::kernels {
namespace {

constexpr size_t kHeads = 8;
constexpr size_t kKvHeads = 4;
constexpr size_t kHeadDim = 256;

// A cache of several layers, which are read in turn: as in a model, where all weights pass through
// the CPU's caches in between, a layer's keys and values are in none of them.
class Cache {
 public:
  Cache(const AttentionShape& shape, size_t positions)
      : num_blocks_((positions + kKvBlockTokens - 1) / kKvBlockTokens),
        head_bytes_(shape.BlockBytes()),
        layers_(kFootprint / (num_blocks_ * kKvHeads * head_bytes_) + 1),
        bytes_(num_blocks_ * layers_ * kKvHeads * head_bytes_),
        memory_(static_cast<std::byte*>(
            mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))) {
    madvise(memory_, bytes_, MADV_HUGEPAGE);
    // The same numbers over and over: to draw all of them would take longer than what is measured.
    const auto floats = NormalFloats(99991);
    AlignedVector<BF16> rounded;
    for (const float v : floats) rounded.push_back(ToBF16(v));
    const bool bf16 = shape.kv_dtype == DType::kBF16;
    const void* const table = bf16 ? static_cast<const void*>(rounded.data()) : floats.data();
    const size_t table_bytes = floats.size() * BytesOf(shape.kv_dtype, 1);
    for (size_t at = 0; at < bytes_; at += table_bytes) {
      std::memcpy(memory_ + at, table, std::min(table_bytes, bytes_ - at));
    }
    for (size_t b = 0; b < num_blocks_; ++b) {
      blocks_.push_back(memory_ + b * layers_ * kKvHeads * head_bytes_);
    }
  }
  Cache(const Cache&) = delete;
  Cache& operator=(const Cache&) = delete;
  ~Cache() { munmap(memory_, bytes_); }

  const std::byte* const* blocks() const { return blocks_.data(); }
  size_t layers() const { return layers_; }
  size_t Offset(size_t layer, size_t kv_head) const {
    return (layer * kKvHeads + kv_head) * head_bytes_;
  }

 private:
  static constexpr size_t kFootprint = size_t{384} << 20;

  const size_t num_blocks_, head_bytes_, layers_, bytes_;
  std::byte* const memory_;
  std::vector<const std::byte*> blocks_;
};

void Run(benchmark::State& state, const AttentionShape& shape) {
  const auto positions = static_cast<size_t>(state.range(0));
  const Cache cache(shape, positions);
  constexpr size_t kGroup = kHeads / kKvHeads;
  const auto queries = NormalFloats(kHeads * kHeadDim, 2);
  AlignedVector<float> scratch(AttentionScratchFloats(kGroup, positions)), out(kHeads * kHeadDim);
  const double quantile =
      shape.top_k == 0 || positions <= shape.top_k
          ? 0.0
          : NormalQuantile(1.0 - static_cast<double>(shape.top_k) / static_cast<double>(positions));
  size_t kept[kHeads] = {};
  size_t layer = 0;
  for (auto _ : state) {
    for (size_t g = 0; g < kKvHeads; ++g) {
      Attend(shape, &queries[g * kGroup * kHeadDim], kGroup, cache.blocks(), cache.Offset(layer, g),
             0, positions, quantile, scratch.data(), &out[g * kGroup * kHeadDim], kept + g * kGroup,
             nullptr, 0);
    }
    layer = (layer + 1) % cache.layers();
    benchmark::ClobberMemory();
  }
  state.counters["kept"] = static_cast<double>(kept[0]);
  // Predictor keys are read once a KV head; the rest once a query head where heads choose.
  const double exact = static_cast<double>((shape.spark() ? kHeads : kKvHeads) * kept[0] *
                                           (2 * kHeadDim - shape.predictor_dim));
  const double read = static_cast<double>(kKvHeads * positions * shape.predictor_dim) + exact;
  SetBytes(state, static_cast<double>(BytesOf(shape.kv_dtype, 1)) * read);
}

// Args: positions, bf16.
DType TypeArg(const benchmark::State& state) {
  return state.range(1) != 0 ? DType::kBF16 : DType::kF32;
}
void AttendSpark(benchmark::State& state) {
  Run(state, {kHeadDim, kHeadDim / 2, 256, 0.0625f, 50.0f, TypeArg(state)});
}
void AttendDense(benchmark::State& state) {
  Run(state, {kHeadDim, kHeadDim, 0, 0.0625f, 50.0f, TypeArg(state)});
}
BENCHMARK(AttendSpark)
    ->ArgNames({"positions", "bf16"})
    ->ArgsProduct({{32, 1024, 8192}, {0, 1}})
    ->Unit(benchmark::kMicrosecond);
BENCHMARK(AttendDense)
    ->ArgNames({"positions", "bf16"})
    ->ArgsProduct({{32, 1024, 8192}, {0, 1}})
    ->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace firesteel::kernels
