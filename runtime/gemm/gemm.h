// Dense products of many tokens with a weight matrix in bf16, x · wᵀ, on the CPU's matrix units
// (AMX). For weights of 8 bits see kernels/amx.h.
//
// The one place that knows oneDNN. Where the build or the CPU has none of it, Available() says so
// and callers take kernels/matmul.h; the interface is the same on every machine.
//
// Weights stay as they are in memory. Each call packs one block of them at a time into a buffer
// that fits the L2 cache and multiplies it with all tokens, so that weights are read from memory
// once per call, whatever the number of tokens.

#ifndef FIRESTEEL_RUNTIME_GEMM_GEMM_H_
#define FIRESTEEL_RUNTIME_GEMM_GEMM_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/tensor.h"

namespace firesteel::gemm {

/// A matrix [rows, cols] that somebody else owns, `stride` elements from one row to the next.
template <typename T>
struct View {
  T* data = nullptr;
  size_t rows = 0;
  size_t cols = 0;
  size_t stride = 0;

  T* Row(size_t row) const { return data + row * stride; }
};

/// Callers cut N among threads at multiples of this where they can: other cuts give the same bits
/// and cost the product of a whole block.
inline constexpr size_t kRowGrain = 64;

/// Whether this build and this CPU multiply on matrix units, and the operating system lets them.
/// Found out once, by a small product. Thread-safe.
bool Available();

/// What multiplies, for logs: "oneDNN 2.6.3, avx512_core_amx", or why there is nothing.
/// Thread-safe.
const std::string& Description();

/// One thread's means to multiply: its buffers and its compiled kernels. Not thread-safe: each
/// thread has its own, and threads share a product by taking disjoint ranges of outputs. No
/// threads are started, whatever OpenMP's settings are.
///
/// The first product of a depth K compiles its kernels (milliseconds), and the first of a number of
/// tokens grows the buffers. After that nothing is allocated here; oneDNN itself makes a few small
/// allocations for the arguments of each block.
class Gemm {
 public:
  /// Unavailable where Available() is false.
  static absl::StatusOr<std::unique_ptr<Gemm>> Create();
  ~Gemm();
  Gemm(const Gemm&) = delete;
  Gemm& operator=(const Gemm&) = delete;

  /// c[m, n] = Σ_k x[m, k] · w[n, k] in f32, for every token m and n in [row_begin, row_end).
  ///
  /// x [M, K], w [N, K], c [M, N]. The bits of c[m, n] depend on x[m, :], w[n, :] and K only:
  /// neither on M, on m nor on the range. Denormals count as zero. InvalidArgument for shapes that
  /// do not fit; Internal if oneDNN fails, c then being undefined.
  absl::Status Multiply(const View<const kernels::BF16>& x, const View<const kernels::BF16>& w,
                        size_t row_begin, size_t row_end, const View<float>& c);

 private:
  struct State;
  explicit Gemm(std::unique_ptr<State> state);
  const std::unique_ptr<State> state_;
};

}  // namespace firesteel::gemm

#endif  // FIRESTEEL_RUNTIME_GEMM_GEMM_H_
