// Integer arithmetic: weights of 8 and 4 bits, activations of 16 or 8, and their dot products.
//
// Activations are rounded to 16 bits, kept as two planes of 8, since CPUs multiply bytes four at a
// time (vpdpbusd and its kin): x ≈ scale · (256 · high + low). Weights of 8 bits take both planes,
// so that the rounding of activations is lost in that of the weights; weights of 4 bits take `high`
// alone, which is the same x rounded to 8 bits.
//
// Sums of products are exact integers: for 8-bit weights a result depends on neither the tiling nor
// the SIMD target. For 4-bit weights the blocks of a row are added in f32, in one order a target.

#ifndef FIRESTEEL_KERNELS_QUANTIZED_H_
#define FIRESTEEL_KERNELS_QUANTIZED_H_

#include <cstddef>
#include <cstdint>

#include "kernels/row_fetcher.h"
#include "kernels/tensor.h"

namespace firesteel::kernels {

/// Rows of quantized matrices and activations have zeros up to a multiple of this, in elements.
inline constexpr size_t kQuantizedPadding = kI4Group;
/// The longest row: sums of products of bytes stay within 32 bits.
inline constexpr size_t kMaxQuantizedCols = 65536;

/// Activations [rows, cols] as integers, in memory that somebody else owns. The planes of a row lie
/// side by side, so that both are rows of one matrix [2 · rows, plane] of bytes.
struct QuantizedRows {
  int8_t* planes = nullptr;           // [rows, high and low, plane], zeros from cols on
  int32_t* nibble_offsets = nullptr;  // [rows, plane / 4]: −8 · the sum of four neighbours of high
  float* scales = nullptr;            // [rows]
  int32_t* high_sums = nullptr;       // [rows]
  int32_t* low_sums = nullptr;        // [rows]
  size_t rows = 0;
  size_t cols = 0;
  size_t plane = 0;  // a multiple of kQuantizedPadding

  int8_t* High(size_t row) const { return planes + row * 2 * plane; }  // in [−127, 127]
  int8_t* Low(size_t row) const { return High(row) + plane; }
  int32_t* NibbleOffsets(size_t row) const { return nibble_offsets + row * plane / 4; }

  /// `count` rows from `first` on.
  QuantizedRows From(size_t first, size_t count) const {
    return {High(first),
            NibbleOffsets(first),
            scales + first,
            high_sums + first,
            low_sums + first,
            count,
            cols,
            plane};
  }
};

/// Rounds x [out.cols] into one row of `out`. Values that are not finite make the scale and hence
/// all products not finite, too. Thread-safe for distinct rows.
void QuantizeActivations(const float* x, const QuantizedRows& out, size_t row);

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
