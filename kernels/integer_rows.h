// Sparse vector × matrix in integers: what the active neurons of a Spark FFN (arXiv 2506.06644,
// section 4) add to its output, for down projections of 8-bit weights.
//
// The coefficients of some neurons are rounded together, as activations are (quantized.h). Four
// rows at a time are interleaved byte by byte, so that an instruction that multiplies four
// neighbouring bytes adds four neurons to sixteen columns: half the work of converting the weights
// to floats. Sums are exact: neither the order of the neurons, nor the SIMD target changes a bit.

#ifndef FIRESTEEL_KERNELS_INTEGER_ROWS_H_
#define FIRESTEEL_KERNELS_INTEGER_ROWS_H_

#include <cstddef>
#include <cstdint>

#include "kernels/quantized.h"
#include "kernels/row_fetcher.h"
#include "kernels/tensor.h"

namespace firesteel::kernels {

/// Columns that sums take: `cols`, padded to whole cache lines of weights.
constexpr size_t SumCols(size_t cols) { return (cols + kAlignment - 1) / kAlignment * kAlignment; }

/// The most coefficients that may be rounded together: their sums stay within 32 bits.
inline constexpr size_t kMaxCoefficients = 65536;

/// Rounds the coefficients of some rows of w together to bytes, each times its row's scale, to
/// `out`, one row of out.cols ≤ kMaxCoefficients elements. Scales `coefficients` [out.cols] in
/// place; `active` [out.cols] are their rows. Values that are not finite make the scale and hence
/// all sums not finite, too.
void QuantizeCoefficients(float* coefficients, const uint32_t* active, const TypedView& w,
                          const QuantizedRows& out);

/// Coefficients of all rows, in memory of somebody else: bytes [rows, stride], scales [rows].
struct ByteRows {
  int8_t* data = nullptr;
  float* scales = nullptr;
  size_t rows = 0;
  size_t stride = 0;  // a multiple of kAlignment

  int8_t* Row(size_t row) const { return data + row * stride; }
};

/// Puts c, the rounded coefficients of the rows `active`, to their places in a row of `out`, whose
/// column 0 is that of row `first` of the weights; all others become zero. Thread-safe for distinct
/// rows.
void SpreadCoefficients(const QuantizedRows& c, const uint32_t* active, size_t first,
                        const ByteRows& out, size_t row);

// Two ways to the same bits. Both take c and `active` as QuantizeCoefficients had them, w kI8 [F,
// D], give columns in an order of the kernel's own, and ask `fetcher` for as many lines as they
// read.

/// For rows that come from memory, which are read one group after the other, each to its end:
/// y [SumCols(w.cols)] = Σ_j c_j · w[active[j], :]. `sums` [SumCols(w.cols)] is scratch that
/// holds zeros before and after.
void SumIntegerRows(const QuantizedRows& c, const uint32_t* active, const TypedView& w,
                    RowFetcher& fetcher, int32_t* sums, float* y);

/// For rows that are in a cache already, since other coefficients needed them, too: y[i] = or (if
/// `add`) += Σ_j c_j · w[active[j], i] for i in [col_begin, col_end), multiples of kAlignment up to
/// SumCols(w.cols). Sums stay in registers.
void SumIntegerColumns(const QuantizedRows& c, const uint32_t* active, const TypedView& w,
                       size_t col_begin, size_t col_end, bool add, RowFetcher& fetcher, float* y);

/// Puts y [SumCols(cols)], in the order of sums, into that of the columns.
void ToColumnOrder(size_t cols, float* y);

}  // namespace firesteel::kernels

#endif  // FIRESTEEL_KERNELS_INTEGER_ROWS_H_
