// The sparse half of a Spark FFN (arXiv 2506.06644, section 3.1): from the predictor's scores to
// what the active neurons add.

#ifndef FIRESTEEL_RUNTIME_MODEL_SPARK_FFN_H_
#define FIRESTEEL_RUNTIME_MODEL_SPARK_FFN_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/amx.h"
#include "kernels/integer_rows.h"
#include "kernels/quantized.h"
#include "kernels/row_fetcher.h"
#include "kernels/tensor.h"
#include "runtime/checkpoint/model_config.h"
#include "runtime/checkpoint/weights.h"
#include "runtime/model/activity.h"
#include "runtime/model/quantized_input.h"
#include "runtime/threading/worker_pool.h"

namespace firesteel {

/// Neighbouring rows of a step: tokens of prompts, or tokens that were generated.
struct RowRun {
  IndexRange rows;
  bool prompt;
};

/// Ways to compute the FFN of a step of many rows: see SparkFfn.
enum class FfnWay : uint8_t { kMeasured, kSparse, kDense };

/// down_proj · (gelu(a) ⊙ (up_proj · x)) for the rows of a step, with a the soft threshold of their
/// scores. Only weights of active neurons are read.
///
/// The neurons are cut into ranges, whose number is the model's own. What a range contributes to a
/// row is added up apart, and the ranges in their order: so neither the other rows nor the workers
/// change a bit, whoever computes what. Where down_proj has 8 bits, a range's coefficients are
/// rounded together and its sums are exact integers (kernels/integer_rows.h).
///
/// With a matrix unit (kernels/amx.h) all neurons of many rows may be computed, those that are not
/// active with coefficients of zero: twelve times the work, on weights of which nearly all are
/// needed anyway. In 8 bits that gives the same bits, since sums are exact. So steps of many rows
/// take the way that is faster, which changes within seconds where neighbours share the cores, and
/// is measured all the time. In bf16 the unit adds in an order of its own, and takes coefficients
/// of bf16; so the order of rows of prompts is always that one, and that of others never. A few
/// rows of a prompt keep to it without reading weights that nobody needs.
///
/// The members of a team call Select and, behind a barrier, Run. One step at a time.
class SparkFfn {
 public:
  /// The other half of the FFN's input, normed[r:] of all rows [rows, d − r]: in f32 or bf16, or
  /// with quantized weights as integers.
  struct Input {
    kernels::TypedView floats;
    kernels::QuantizedRows integers;
    kernels::TileColumns tiles;      // the same of rows that MayBeDense
    ActivityProbe* probe = nullptr;  // sees the rows that are read
  };

  /// Steps have at most `max_rows` rows. `type` is that of all up_proj and down_proj. `tiles`: the
  /// matrix unit may be used.
  SparkFfn(const ModelConfig& config, kernels::DType type, bool tiles, size_t num_threads,
           size_t max_rows);

  /// Statistical top-k (section 3.2) of the worker's share of the rows of `scores` [rows, F].
  /// `runs` are all rows of the step, in their order.
  void Select(const Worker& worker, const kernels::MatView& scores, std::span<const RowRun> runs);
  /// The neurons that Select found for a row, rising.
  std::span<const uint32_t> active(size_t row) const {
    return {&active_[row * stride_], num_active_[row]};
  }

  /// The output of the worker's share of all rows, to `out` [rows, SumCols(d)]; ends without a
  /// barrier. `up` [rows, F] is scratch.
  void Run(Worker& worker, const LayerWeights& weights, const Input& input,
           const kernels::MatView& up, const kernels::MatView& out);
  /// How steps of many rows are computed where there is a choice: kMeasured takes what was faster
  /// lately. All give the same bits. To be set between steps.
  void SetWay(FfnWay way) { way_ = way; }
  /// Whether Run may take a row of a step of `num_rows` to the matrix unit, and read its
  /// Input::tiles.
  bool MayBeDense(size_t num_rows, bool prompt) const {
    return !dense_.empty() && (integer_down_ ? num_rows > kFewRows : prompt);
  }
  /// For worker 0 after Run: how many neurons some row needed.
  uint32_t union_size(size_t num_rows) const {
    return num_rows == 1 ? num_active_[0] : union_size_.load(std::memory_order_relaxed);
  }
  /// For worker 0 after Run: of how many neurons the weights were read.
  uint32_t num_read(size_t num_rows) const {
    for (const Group& group : groups_) {
      if (group.dense && !IsGathered(group.rows.end - group.rows.begin)) {
        return static_cast<uint32_t>(config_.intermediate_size);
      }
    }
    return union_size(num_rows);
  }

 private:
  // Neighbouring rows of a step that are computed in one way.
  struct Group {
    IndexRange rows;
    bool dense;  // on the matrix unit
  };
  // A part of a group: which weights and inputs, whose rows, which range of neurons.
  struct Part {
    const LayerWeights& weights;
    const Input& input;
    const kernels::MatView& up;
    IndexRange rows;
    size_t range;  // of neurons
    size_t next;   // the worker's next range, if there is one
    bool few;      // the workers share the ranges, whose unions are known
    bool add;      // to what the sums hold (many rows)
    kernels::RowFetcher& fetcher;

    bool alone() const { return rows.end - rows.begin == 1; }
  };
  struct WorkerScratch {
    QuantizedInput coefficients;   // [rows of a worker, the widest range]
    Matrix sums;                   // [SumCols(d)] of int32, zeros between uses
    std::vector<float> projected;  // [the widest range]
    Matrix dense_up;               // [kDenseRows and a pair of tiles, the widest range]
    Matrix gathered;               // [kGatherRows, d − r] of bf16: rows of up_proj
    Matrix dense_down;             // bytes: some columns of some rows of down_proj
    kernels::RowFetcher fetcher;
    double seconds = 0;  // of the last Run of a step that may be dense
  };

  // Up to here the workers share the ranges, each with sums of its own; beyond, they share the rows
  // or, in a dense step, first the ranges and then the columns.
  static constexpr size_t kFewRows = 32;
  // Up to here rows of a prompt in bf16 read the weights of their active neurons alone.
  static constexpr size_t kGatheredRows = 20;

  void ListGroups(std::span<const RowRun> runs);
  bool ChooseDense(size_t num_rows);
  void RunSparse(Worker& worker, const LayerWeights& weights, const Input& input, IndexRange rows,
                 const kernels::MatView& up, const kernels::MatView& out);
  void RunDense(Worker& worker, const LayerWeights& weights, const Input& input, IndexRange rows,
                const kernels::MatView& out);
  void DenseUp(const Worker& worker, const LayerWeights& weights, const Input& input,
               IndexRange rows, size_t range);
  void Spread(WorkerScratch& scratch, const LayerWeights& weights, size_t row, size_t range,
              size_t place);
  void GatheredUp(const Worker& worker, const LayerWeights& weights, const Input& input,
                  IndexRange rows, size_t range);
  kernels::MatView MultiplyUp(const Input& input, IndexRange rows, const kernels::TypedView& w,
                              WorkerScratch& scratch) const;
  void DenseDown(const Worker& worker, const LayerWeights& weights, const Input& input,
                 IndexRange cols, const kernels::MatView& out);
  void ListedDown(const Worker& worker, const LayerWeights& weights, const Input& input,
                  IndexRange rows, IndexRange cols, const kernels::MatView& out);
  std::span<const uint32_t> Needed(size_t range) const;
  bool IsGathered(size_t num_rows) const { return !integer_down_ && num_rows <= kGatheredRows; }
  kernels::ByteRows DenseBytes(size_t range, size_t num_rows);
  kernels::TypedView DenseFloats(size_t range, size_t num_rows) const;
  void ListUnion(size_t range);
  size_t TakeRange();
  // sum(row) = what the part's neurons contribute to each of its rows.
  template <typename SumFn>
  void AddRange(Worker& worker, const Part& part, const SumFn& sum);
  void ProjectUp(const Part& part, size_t row, IndexRange list);
  template <typename SumFn>
  void AddIntegers(Worker& worker, const Part& part, const SumFn& sum);
  template <typename VisitFn>
  void ForActive(const Worker& worker, const Part& part, const VisitFn& visit) const;
  template <typename VisitFn>
  void ForColumns(const Worker& worker, const Part& part, const VisitFn& visit) const;
  // Windows of a range: of rows of up_proj, then of columns of down_proj.
  size_t Windows(const Part& part, size_t range, const Matrix& weights) const;
  IndexRange UpWindow(const Part& part, size_t range, size_t window) const;
  IndexRange DownWindow(const Part& part, size_t window) const;
  std::span<const uint32_t> Union(const Part& part, size_t range) const;
  void QueueUp(const Part& part, size_t range, size_t window) const;
  void QueueDown(const Part& part, size_t window) const;
  // Where the active neurons of a range stand in a row's list.
  IndexRange ListOf(size_t row, size_t range) const {
    const uint32_t* const starts = &range_starts_[row * (num_ranges_ + 1) + range];
    return {starts[0], starts[1]};
  }
  void Tell(const Worker& worker, const Part& part, const Matrix& weights, size_t row,
            IndexRange list, IndexRange cols) const;
  IndexRange Neurons(size_t range) const;
  float* RangeSum(size_t row, size_t range);
  void AddRangeSum(size_t range, const float* sum, float* out) const;

  const ModelConfig& config_;
  const size_t num_ranges_;
  const size_t stride_;  // of lists
  const bool integer_down_;
  const double quantile_;
  Matrix excess_;                       // [R, stride]: a, then the coefficients, compacted
  std::vector<uint32_t> active_;        // [R, stride]: their neurons
  std::vector<uint32_t> num_active_;    // [R]
  std::vector<uint32_t> range_starts_;  // [R, ranges + 1]: where a range begins in a list
  std::vector<uint8_t> needed_;         // [F]: 1 where a row of the step needs the neuron
  std::vector<uint32_t> union_;         // [F]: those neurons, rising, from each range's place on
  std::vector<uint32_t> union_sizes_;   // [ranges]
  std::vector<uint8_t> listed_;         // [ranges]: 1 where union_ is that of the step
  std::atomic<uint32_t> union_size_{0};
  Matrix sums_;  // [few rows · ranges, SumCols(d)]
  std::vector<WorkerScratch> scratch_;
  FfnWay way_ = FfnWay::kMeasured;
  size_t num_rows_ = 0;        // of the step
  std::vector<Group> groups_;  // of the step's layer that was selected last
  // Of steps of many rows, fewer and more than kManyRows: seconds a row of late, sparse and dense;
  // 0 where nothing was measured.
  std::array<std::array<double, 2>, 2> seconds_{};
  double* measured_ = nullptr;  // what the last Run is to be told to
  size_t measured_rows_ = 0;
  uint32_t choices_ = 0;
  std::vector<Matrix> dense_;        // [ranges], each [R, neurons] of int8 or bf16; empty: never
  std::vector<float> dense_scales_;  // [ranges, R]
  std::atomic<size_t> next_range_{0};
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_MODEL_SPARK_FFN_H_
