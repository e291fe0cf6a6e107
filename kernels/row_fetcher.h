// Rows of weights that will be needed soon, asked for a few cache lines at a time while something
// else is computed.
//
// Scattered rows are no streams that a hardware prefetcher could follow, and what a core computes
// with one row is too short to cover the latency of the next. So who knows which rows come next
// queues them here, and every kernel that reads rows asks for as many lines as it reads: memory
// never waits for the end of a list, of a window of weights or of a matrix.

#ifndef FIRESTEEL_KERNELS_ROW_FETCHER_H_
#define FIRESTEEL_KERNELS_ROW_FETCHER_H_

#include <cstddef>
#include <cstdint>

#include "hwy/base.h"
#include "hwy/cache_control.h"
#include "kernels/tensor.h"

namespace firesteel::kernels {

/// Fetches a line into the L2 cache, which can wait for more lines at once than the L1 cache. Reads
/// nothing.
HWY_INLINE void FetchToL2(const void* p) {
#if HWY_COMPILER_GCC || HWY_COMPILER_CLANG
  __builtin_prefetch(p, /*rw=*/0, /*locality=*/2);
#else
  hwy::Prefetch(p);
#endif
}

/// A queue of rows to fetch into the L2 cache. Reads nothing and changes no result. Not
/// thread-safe: each worker has its own.
class RowFetcher {
 public:
  /// Lines that one call of Next asks for, of as many rows: memory serves four rows at once faster
  /// than one after the other.
  static constexpr size_t kLines = 4;
  /// How far ahead of a lone row's kernels to be: several times what memory gives in its latency,
  /// and little beside an L2 cache.
  static constexpr size_t kLead = size_t{40} << 10;

  /// Queues the bytes [begin, end), multiples of kAlignment, of the rows `rows` [num] of w, and
  /// asks for their scales at once. `rows` must stay as they are until they were fetched.
  void Add(const TypedView& w, const uint32_t* rows, size_t num, size_t begin, size_t end);

  /// Asks for the next few lines, if there are any.
  HWY_INLINE void Next() {
    if (at_ == end_ && !NextRows()) return;
    FetchToL2(rows_[0] + at_);
    FetchToL2(rows_[1] + at_);
    FetchToL2(rows_[2] + at_);
    FetchToL2(rows_[3] + at_);
    at_ += kAlignment;
  }

  /// Lines of four rows that a loop asks for itself: line `i` < count of each.
  struct Lines {
    HWY_INLINE void Fetch(size_t i) const {
      for (size_t r = 0; r < kLines; ++r) FetchToL2(rows[r] + i * kAlignment);
    }
    const uint8_t* rows[kLines];
    size_t count;
  };
  /// The next lines, at most `most` of each row; none if nothing is queued.
  HWY_INLINE Lines Take(size_t most) {
    if (at_ == end_ && !NextRows()) return {{}, 0};
    const size_t left = (end_ - at_) / kAlignment;
    const size_t count = left < most ? left : most;
    const Lines lines{{rows_[0] + at_, rows_[1] + at_, rows_[2] + at_, rows_[3] + at_}, count};
    at_ += count * kAlignment;
    return lines;
  }

  /// Asks for about `bytes`.
  void Fetch(size_t bytes) {
    for (size_t i = 0; i < bytes; i += kLines * kAlignment) Next();
  }
  /// Asks for all that is queued.
  void FetchAll() {
    while (at_ != end_ || num_parts_ != 0) Next();
  }

 private:
  static constexpr size_t kMaxParts = 4;
  static_assert(kLines == 4);

  struct Part {
    const uint8_t* base;
    size_t row_bytes;
    const uint32_t* rows;
    size_t num;
    size_t begin;
    size_t end;
  };

  // Four rows of the first part, or fewer at its end, which then are fetched again. Inlined, since
  // a call would cost the loops around it their registers.
  HWY_INLINE bool NextRows() {
    if (num_parts_ == 0) return false;
    const Part& part = parts_[first_part_];
    const size_t last = part.num - 1;
    for (size_t r = 0; r < kLines; ++r) {
      const size_t row = taken_ + r;
      rows_[r] = part.base + part.rows[row < last ? row : last] * part.row_bytes;
    }
    at_ = part.begin;
    end_ = part.end;
    taken_ += kLines;
    if (taken_ > last) {
      taken_ = 0;
      first_part_ = (first_part_ + 1) % kMaxParts;
      --num_parts_;
    }
    return true;
  }

  const uint8_t* rows_[kLines] = {};
  size_t at_ = 0;     // the next line of rows_
  size_t end_ = 0;    // of rows_
  size_t taken_ = 0;  // rows of the first part
  size_t first_part_ = 0;
  size_t num_parts_ = 0;
  Part parts_[kMaxParts];
};

}  // namespace firesteel::kernels

#endif  // FIRESTEEL_KERNELS_ROW_FETCHER_H_
