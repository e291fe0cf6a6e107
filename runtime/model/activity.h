// What was active where: the raw material of every sparsity figure.

#ifndef FIRESTEEL_RUNTIME_MODEL_ACTIVITY_H_
#define FIRESTEEL_RUNTIME_MODEL_ACTIVITY_H_

#include <cstddef>
#include <cstdint>
#include <span>

#include "runtime/checkpoint/weights.h"
#include "runtime/threading/worker_pool.h"

namespace firesteel {

/// What one layer did for one row (one token at one position) of a step.
struct RowActivity {
  uint32_t ffn_active = 0;  // neurons with a > 0; F in a dense model
  uint32_t attended = 0;    // kept positions, summed over the query heads
  uint32_t visible = 0;     // n: positions that a head may see
};

/// What one layer did in one step. The span is valid until the next step.
struct LayerActivity {
  std::span<const RowActivity> rows;  // [rows of the step]
  uint32_t ffn_union = 0;             // neurons that at least one row needed
  uint32_t ffn_read = 0;              // neurons whose weights were read: those, or all
};

/// What the output head did for one row that wanted logits.
struct HeadActivity {
  bool screened = false;  // by the sublinear head; otherwise every row of the embedding was exact
  uint32_t exact = 0;     // screened: rows of the embedding that were multiplied exactly
};

/// Sees the active sets themselves, for tests and analysis. Called from the worker threads, at once
/// for different (layer, row, head).
class ActivityProbe {
 public:
  virtual ~ActivityProbe() = default;
  /// Neurons with a > 0, rising.
  virtual void OnFfnActive(size_t layer, size_t row, std::span<const uint32_t> neurons) = 0;
  /// Positions that a query head kept, absolute, rising.
  virtual void OnAttended(size_t layer, size_t row, size_t head,
                          std::span<const uint32_t> positions) = 0;
  /// A row of a layer's weights, or its columns [begin, end), goes to a kernel, which reads it once
  /// for all tokens of that call. Called by the worker that reads, in the order of reading.
  virtual void OnWeightRow(const Matrix& /*weights*/, size_t /*worker*/, size_t /*row*/,
                           size_t /*begin*/, size_t /*end*/) {}
};

/// Tells `probe`, if there is one, of the columns `cols` of the rows `rows`.
inline void TellRows(ActivityProbe* probe, const Worker& worker, const Matrix& weights,
                     IndexRange rows, IndexRange cols) {
  if (probe == nullptr) return;
  for (size_t row = rows.begin; row < rows.end; ++row) {
    probe->OnWeightRow(weights, worker.index(), row, cols.begin, cols.end);
  }
}

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_MODEL_ACTIVITY_H_
