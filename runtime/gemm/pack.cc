#include "runtime/gemm/pack.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace firesteel::gemm {
namespace {

constexpr size_t kLine = 16;  // groups of 4 bytes in a cache line

uint32_t LoadGroup(const void* from) {
  uint32_t group;
  std::memcpy(&group, from, sizeof(group));
  return group;
}

// Weights [N, K], elements of any size as bytes. A panel of 64 outputs is transposed in groups of
// 4 bytes, a cache line of 16 rows at a time: rows are read to their end, so that 16 streams come
// from memory, and the panel is written as whole lines.
void PackPanelOutIn(const uint8_t* from, size_t stride, size_t rows, size_t bytes, size_t depth,
                    uint32_t* panel) {
  const size_t whole = bytes / (4 * kLine) * kLine;  // groups
  for (size_t j = 0; j < kPackCols; j += kLine) {
    const size_t count = rows > j ? std::min(kLine, rows - j) : 0;
    size_t g = 0;
    if (count == kLine) {
      for (; g < whole; g += kLine) {
        const uint8_t* corner = from + j * stride + 4 * g;
        uint32_t* to = panel + g * kPackCols + j;
        for (size_t i = 0; i < kLine; ++i) {
          for (size_t r = 0; r < kLine; ++r) {
            to[i * kPackCols + r] = LoadGroup(corner + r * stride + 4 * i);
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

// Weights [K, N]: the rows of a group are interleaved.
template <typename T>
void PackPanelInOut(const T* from, size_t stride, size_t cols, size_t rows, size_t depth,
                    T* panel) {
  constexpr size_t kGroup = 4 / sizeof(T);
  for (size_t k = 0; k < depth; k += kGroup) {
    const T* row = from + k * stride;
    T* to = panel + k * kPackCols;
    if (cols == kPackCols && k + kGroup <= rows) {
      for (size_t j = 0; j < kPackCols; ++j) {
        for (size_t i = 0; i < kGroup; ++i) to[j * kGroup + i] = row[i * stride + j];
      }
      continue;
    }
    for (size_t j = 0; j < kPackCols; ++j) {
      for (size_t i = 0; i < kGroup; ++i) {
        to[j * kGroup + i] = j < cols && k + i < rows ? row[i * stride + j] : T{0};
      }
    }
  }
}

template <typename T>
void PackInOut(const WeightBlock& block, size_t depth, T* packed) {
  const T* from = static_cast<const T*>(block.data);
  for (size_t n = 0; n < block.cols; n += kPackCols) {
    PackPanelInOut(from + n, block.stride, std::min(kPackCols, block.cols - n), block.depth, depth,
                   packed + n * depth);
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
