#include "kernels/row_fetcher.h"

namespace firesteel::kernels {

void RowFetcher::Add(const TypedView& w, const uint32_t* rows, size_t num, size_t begin,
                     size_t end) {
  HWY_DASSERT(begin % kAlignment == 0 && end % kAlignment == 0 && begin <= end);
  if (num == 0 || begin == end) return;
  if (num_parts_ == kMaxParts) FetchAll();
  Part& part = parts_[(first_part_ + num_parts_++) % kMaxParts];
  part = {w.RowBytes(0), BytesOf(w.dtype, w.stride), rows, num, begin, end};
  if (w.dtype != DType::kI8) return;
  constexpr size_t kScalesPerLine = kAlignment / sizeof(float);
  size_t line = SIZE_MAX;
  for (size_t j = 0; j < num; ++j) {
    if (rows[j] / kScalesPerLine == line) continue;
    line = rows[j] / kScalesPerLine;
    FetchToL2(w.row_scales + rows[j]);
  }
}

}  // namespace firesteel::kernels
