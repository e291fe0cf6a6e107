// What the kernel benchmarks share: aligned inputs, and rates in GFLOP/s and GB/s.

#ifndef FIRESTEEL_KERNELS_BENCH_UTIL_H_
#define FIRESTEEL_KERNELS_BENCH_UTIL_H_

#include <benchmark/benchmark.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <random>
#include <vector>

#include "kernels/tensor.h"

namespace firesteel::kernels {

template <typename T>
struct AlignedAllocator {
  using value_type = T;
  AlignedAllocator() = default;
  template <typename U>
  // NOLINTNEXTLINE(google-explicit-constructor): allocators convert into each other.
  AlignedAllocator(const AlignedAllocator<U>&) {}
  T* allocate(size_t n) {
    return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(kAlignment)));
  }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(kAlignment)); }
  friend bool operator==(const AlignedAllocator&, const AlignedAllocator&) { return true; }
};
template <typename T>
using AlignedVector = std::vector<T, AlignedAllocator<T>>;

inline AlignedVector<float> NormalFloats(size_t n, uint32_t seed = 1) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  AlignedVector<float> out(n);
  for (float& v : out) v = normal(engine);
  return out;
}

/// Cheap to make, as the large ones are hundreds of megabytes: values of ±[1, 2).
inline AlignedVector<BF16> SomeBF16(size_t n) {
  AlignedVector<BF16> out(n);
  uint32_t state = 1;
  for (BF16& v : out) {
    state = state * 1664525u + 1013904223u;
    v.bits = static_cast<uint16_t>(0x3F80u | ((state >> 16) & 0x807Fu));
  }
  return out;
}

inline void SetFlops(benchmark::State& state, double flops_per_iteration) {
  state.counters["FLOP/s"] =
      benchmark::Counter(flops_per_iteration, benchmark::Counter::kIsIterationInvariantRate,
                         benchmark::Counter::kIs1000);
}
inline void SetBytes(benchmark::State& state, double bytes_per_iteration) {
  state.counters["B/s"] =
      benchmark::Counter(bytes_per_iteration, benchmark::Counter::kIsIterationInvariantRate,
                         benchmark::Counter::kIs1000);
}

}  // namespace firesteel::kernels

#endif  // FIRESTEEL_KERNELS_BENCH_UTIL_H_
