#include "runtime/gemm/pack.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace firesteel::gemm {
namespace {

constexpr size_t kLine = 16;  // groups of 4 bytes in a cache line

// 16 bytes as SSE2 and every later CPU interleaves them; elsewhere the compiler makes do.
using Bytes = uint8_t __attribute__((vector_size(16)));
using Words = uint32_t __attribute__((vector_size(16)));
using Halves = uint16_t __attribute__((vector_size(16)));

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

Bytes ZipLower(Bytes a, Bytes b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
Bytes ZipUpper(Bytes a, Bytes b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                 31);
}
Halves ZipLower(Halves a, Halves b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
Halves ZipUpper(Halves a, Halves b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
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

// Weights [N, K], elements of any size as bytes. A panel of 64 outputs is transposed in groups of
// 4 bytes, a cache line of 16 rows at a time: rows are read to their end, so that 16 streams come
// from memory, and the panel is written as whole lines.
void PackPanelOutIn(const uint8_t* from, size_t stride, size_t rows, size_t bytes, size_t depth,
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
        // Fetched meanwhile: the same line of the next rows. Without it int8 comes from memory a
        // quarter slower.
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

// 64 elements of each of the rows of a group, side by side.
void Interleave(const uint8_t* row, size_t stride, uint8_t* to) {
  for (size_t j = 0; j < kPackCols; j += 16, to += 64) {
    const auto r0 = Load<Bytes>(row + j);
    const auto r1 = Load<Bytes>(row + j + stride);
    const auto r2 = Load<Bytes>(row + j + 2 * stride);
    const auto r3 = Load<Bytes>(row + j + 3 * stride);
    const auto lower01 = reinterpret_cast<Halves>(ZipLower(r0, r1));
    const auto upper01 = reinterpret_cast<Halves>(ZipUpper(r0, r1));
    const auto lower23 = reinterpret_cast<Halves>(ZipLower(r2, r3));
    const auto upper23 = reinterpret_cast<Halves>(ZipUpper(r2, r3));
    Store(ZipLower(lower01, lower23), to);
    Store(ZipUpper(lower01, lower23), to + 16);
    Store(ZipLower(upper01, upper23), to + 32);
    Store(ZipUpper(upper01, upper23), to + 48);
  }
}
void Interleave(const uint16_t* row, size_t stride, uint16_t* to) {
  for (size_t j = 0; j < kPackCols; j += 8, to += 16) {
    const auto r0 = Load<Halves>(row + j);
    const auto r1 = Load<Halves>(row + j + stride);
    Store(ZipLower(r0, r1), to);
    Store(ZipUpper(r0, r1), to + 8);
  }
}

// Weights [K, N]: the rows of a group are interleaved. Each row is read over all panels before the
// next, as a panel alone has but a line or two of it.
template <typename T>
void PackInOut(const WeightBlock& block, size_t depth, T* packed) {
  constexpr size_t kGroup = 4 / sizeof(T);
  constexpr size_t kAhead = 8;  // groups that are fetched meanwhile
  const T* from = static_cast<const T*>(block.data);
  for (size_t k = 0; k < depth; k += kGroup) {
    const bool whole_group = k + kGroup <= block.depth;
    const T* row = from + k * block.stride;
    const bool more = k + (kAhead + 1) * kGroup <= block.depth;
    for (size_t n = 0; n < block.cols; n += kPackCols) {
      T* to = packed + n * depth + k * kPackCols;
      if (more) {
        for (size_t i = 0; i < kGroup; ++i) {
          const T* ahead = row + (kAhead * kGroup + i) * block.stride + n;
          for (size_t j = 0; j < kPackCols * sizeof(T); j += 64) {
            __builtin_prefetch(reinterpret_cast<const char*>(ahead) + j);
          }
        }
      }
      if (whole_group && n + kPackCols <= block.cols) {
        Interleave(row + n, block.stride, to);
        continue;
      }
      for (size_t j = 0; j < kPackCols; ++j) {
        for (size_t i = 0; i < kGroup; ++i) {
          const bool inside = n + j < block.cols && k + i < block.depth;
          to[j * kGroup + i] = inside ? row[i * block.stride + n + j] : T{0};
        }
      }
    }
  }
}

}  // namespace

void PackBlock(const WeightBlock& block, size_t depth, void* packed) {
  const size_t size = SizeOf(block.type);
  if (block.layout == WeightLayout::kInOut) {
    if (block.type == Type::kInt8) {
      PackInOut(block, depth, static_cast<uint8_t*>(packed));
    } else {
      PackInOut(block, depth, static_cast<uint16_t*>(packed));
    }
    return;
  }
  const auto* from = static_cast<const uint8_t*>(block.data);
  const size_t groups = depth / PackGroup(block.type);
  for (size_t n = 0; n < block.cols; n += kPackCols) {
    PackPanelOutIn(from + n * block.stride * size, block.stride * size, block.cols - n,
                   block.depth * size, groups, static_cast<uint32_t*>(packed) + n * groups);
  }
}

}  // namespace firesteel::gemm
