// Integer arithmetic: weights of 8 and 4 bits, activations of 8 with room for outliers, and their
// dot products.
//
// CPUs multiply bytes four at a time (vpdpbusd and its kin), so activations are rounded to bytes,
// by a step that suits most of them. The few that are too large keep what a byte cannot hold in a
// second plane: x ≈ scale · (256 · high + low). Where a block of `high` is all zeros, and nearly
// all are, its products are left out, which changes nothing.
//
// Sums of products are exact integers: for 8-bit weights a result depends on neither the tiling nor
// the SIMD target. For 4-bit weights the blocks of a row are added in f32, in one order a target.

#ifndef FIRESTEEL_KERNELS_QUANTIZED_H_
#define FIRESTEEL_KERNELS_QUANTIZED_H_

#include <cstddef>
#include <cstdint>
#include <limits>

#include "kernels/row_fetcher.h"
#include "kernels/tensor.h"

namespace firesteel::kernels {

/// Rows of quantized matrices and activations have zeros up to a multiple of this, in elements.
inline constexpr size_t kQuantizedPadding = kI4Group;
/// The longest row: sums of products of bytes stay within 32 bits.
inline constexpr size_t kMaxQuantizedCols = 65536;

/// Elements of a plane that have a bit of QuantizedRows::high_blocks.
inline constexpr size_t kHighBlock = 64;

/// Activations [rows, cols] as integers, in memory that somebody else owns.
struct QuantizedRows {
  int8_t* planes = nullptr;         // [rows, low and high, plane], zeros from cols on
  uint64_t* high_blocks = nullptr;  // [rows, HighWords()]: bits of the blocks that high is not 0 in
  int32_t* nibble_offsets = nullptr;  // [rows, plane / 4]: −8 · the sum of four neighbours of low
  float* scales = nullptr;            // [rows]
  int32_t* low_sums = nullptr;        // [rows]
  int32_t* high_sums = nullptr;       // [rows]
  size_t rows = 0;
  size_t cols = 0;
  size_t plane = 0;  // a multiple of kQuantizedPadding

  /// Bytes that Place needs.
  static constexpr size_t Bytes(size_t rows, size_t cols);
  /// Rows in `memory`, aligned like uint64_t.
  static QuantizedRows Place(void* memory, size_t rows, size_t cols);

  int8_t* Low(size_t row) const { return planes + row * 2 * plane; }  // in [−128, 127]
  int8_t* High(size_t row) const { return Low(row) + plane; }         // in [−127, 127]
  size_t HighWords() const { return (plane / kHighBlock + 63) / 64; }
  uint64_t* HighBlocks(size_t row) const { return high_blocks + row * HighWords(); }
  int32_t* NibbleOffsets(size_t row) const { return nibble_offsets + row * plane / 4; }
  bool HasHigh(size_t row) const {
    uint64_t any = 0;
    for (size_t i = 0; i < HighWords(); ++i) any |= HighBlocks(row)[i];
    return any != 0;
  }

  /// `count` rows from `first` on.
  QuantizedRows From(size_t first, size_t count) const {
    return {Low(first),
            HighBlocks(first),
            NibbleOffsets(first),
            scales + first,
            low_sums + first,
            high_sums + first,
            count,
            cols,
            plane};
  }
};

constexpr size_t QuantizedRows::Bytes(size_t rows, size_t cols) {
  const size_t plane = (cols + kQuantizedPadding - 1) / kQuantizedPadding * kQuantizedPadding;
  const size_t words = (plane / kHighBlock + 63) / 64;
  return rows * (2 * plane + words * sizeof(uint64_t) + plane + 3 * sizeof(float));
}

/// Calls visit(block) for each bit of `words` that is set, rising.
template <typename VisitFn>
inline void ForHighBlocks(const uint64_t* words, size_t num_words, const VisitFn& visit) {
  for (size_t i = 0; i < num_words; ++i) {
    for (uint64_t left = words[i]; left != 0; left &= left - 1) {
      visit(64 * i + static_cast<size_t>(__builtin_ctzll(left)));
    }
  }
}

/// How many times the mean magnitude of activations a byte reaches to: some five standard
/// deviations of values that are normal, so that their blocks of `high` are empty.
inline constexpr float kReachOfBytes = 6;

/// Rounds x [out.cols] into one row of `out`. A byte reaches to `reach` times the mean magnitude,
/// or to the largest value if that is less; `high` holds what is beyond. Values that are not finite
/// make the scale and hence all products not finite, too. Thread-safe for distinct rows.
void QuantizeActivations(const float* x, const QuantizedRows& out, size_t row,
                         float reach = kReachOfBytes);

/// The same with a byte that reaches to the largest value: `high` is zero.
inline void QuantizeToBytes(const float* x, const QuantizedRows& out, size_t row) {
  QuantizeActivations(x, out, row, std::numeric_limits<float>::infinity());
}

/// Rounds one row of weights w [cols] to 8 bits with one scale: q [cols padded to
/// kAlignment], zeros from cols on. Returns the scale, max |w| / 127.
float QuantizeWeightsI8(const float* w, size_t cols, int8_t* q);

/// Rounds one row of weights w [cols] to 4 bits: q [cols / 2, padded to whole groups] in the layout
/// of DType::kI4, `scales` one a block, zeros from cols on. Of five scales between 0.8 and 1 times
/// that which covers the block's largest weight, each block takes the one with the least squared
/// error.
void QuantizeWeightsI4(const float* w, size_t cols, uint8_t* q, BF16* scales);

/// out[i] = the weight at (row, first + i) as a float, i < n; any DType; for kI4 `first` is a
/// multiple of kI4Group.
void Dequantize(const TypedView& w, size_t row, size_t first, size_t n, float* out);

/// y[t, n] = Σ_k x[t, k] · w[n, k] for every row t of x and for n in [row_begin, row_end); w kI8 or
/// kI4 [N, x.cols]. The bits of y[t, n] depend on x[t, :], w[n, :] and (kI4) the SIMD target only.
/// Thread-safe for disjoint row ranges of one y.
void QuantizedMatMul(const QuantizedRows& x, const TypedView& w, size_t row_begin, size_t row_end,
                     const MatView& y);

/// Vector-masked matvec: out[j] = Σ_k x[0, k] · w[active[j], k] for j in [begin, end), with the
/// bits of QuantizedMatMul. active: indices < w.rows. Asks `fetcher` for as many lines as it reads.
/// Thread-safe for disjoint ranges.
void QuantizedMaskedMatVec(const QuantizedRows& x, const TypedView& w, const uint32_t* active,
                           size_t begin, size_t end, RowFetcher& fetcher, float* out);

}  // namespace firesteel::kernels

#endif  // FIRESTEEL_KERNELS_QUANTIZED_H_
