#include "runtime/gemm/pack.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace firesteel::gemm {
namespace {

constexpr size_t kLine = 16;  // groups of 4 bytes in a cache line

// 16 bytes as SSE2 and every later CPU interleaves them; elsewhere the compiler makes do.
using Words = uint32_t __attribute__((vector_size(16)));

template <typename V>
V Load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}
template <typename V>
void Store(V v, void* to) {
  std::memcpy(to, &v, sizeof(v));
}

// 4 × 4 groups.
void Transpose(const uint8_t* from, size_t stride, uint32_t* to) {
  const auto r0 = Load<Words>(from);
  const auto r1 = Load<Words>(from + stride);
  const auto r2 = Load<Words>(from + 2 * stride);
  const auto r3 = Load<Words>(from + 3 * stride);
  const Words lower01 = __builtin_shufflevector(r0, r1, 0, 4, 1, 5);
  const Words upper01 = __builtin_shufflevector(r0, r1, 2, 6, 3, 7);
  const Words lower23 = __builtin_shufflevector(r2, r3, 0, 4, 1, 5);
  const Words upper23 = __builtin_shufflevector(r2, r3, 2, 6, 3, 7);
  Store(Words(__builtin_shufflevector(lower01, lower23, 0, 1, 4, 5)), to);
  Store(Words(__builtin_shufflevector(lower01, lower23, 2, 3, 6, 7)), to + kPackCols);
  Store(Words(__builtin_shufflevector(upper01, upper23, 0, 1, 4, 5)), to + 2 * kPackCols);
  Store(Words(__builtin_shufflevector(upper01, upper23, 2, 3, 6, 7)), to + 3 * kPackCols);
}

// Weights [N, K] as bytes. A panel of 64 outputs is transposed in groups of
// 4 bytes, a cache line of 16 rows at a time: rows are read to their end, so that 16 streams come
// from memory, and the panel is written as whole lines.
void PackPanel(const uint8_t* from, size_t stride, size_t rows, size_t bytes, size_t depth,
               uint32_t* panel) {
  const size_t whole = bytes / (4 * kLine) * kLine;  // groups
  for (size_t j = 0; j < kPackCols; j += kLine) {
    const size_t count = rows > j ? std::min(kLine, rows - j) : 0;
    const size_t ahead = rows > j ? std::min(2 * kLine, rows - j) : 0;
    size_t g = 0;
    if (count == kLine) {
      for (; g < whole; g += kLine) {
        const uint8_t* corner = from + j * stride + 4 * g;
        uint32_t* to = panel + g * kPackCols + j;
        // Fetched meanwhile: the same line of the next rows. Without it bytes come from memory
        // a quarter slower.
        for (size_t r = kLine; r < ahead; ++r) __builtin_prefetch(corner + r * stride);
        for (size_t r = 0; r < kLine; r += 4) {
          for (size_t i = 0; i < kLine; i += 4) {
            Transpose(corner + r * stride + 4 * i, stride, to + i * kPackCols + r);
          }
        }
      }
    }
    for (; g < depth; ++g) {
      for (size_t r = 0; r < kLine; ++r) {
        uint32_t group = 0;
        if (r < count && 4 * g < bytes) {
          std::memcpy(&group, from + (j + r) * stride + 4 * g, std::min<size_t>(4, bytes - 4 * g));
        }
        panel[g * kPackCols + j + r] = group;
      }
    }
  }
}

}  // namespace

void PackBlock(const View<const kernels::BF16>& w, size_t depth, kernels::BF16* packed) {
  constexpr size_t kSize = sizeof(kernels::BF16);
  const auto* from = reinterpret_cast<const uint8_t*>(w.data);
  const size_t groups = depth * kSize / sizeof(uint32_t);
  for (size_t n = 0; n < w.rows; n += kPackCols) {
    PackPanel(from + n * w.stride * kSize, w.stride * kSize, w.rows - n, w.cols * kSize, groups,
              reinterpret_cast<uint32_t*>(packed) + n * groups);
  }
}

}  // namespace firesteel::gemm
