#include "runtime/model/spark_ffn.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels/elementwise.h"
#include "kernels/integer_rows.h"
#include "kernels/sparse_ffn.h"
#include "kernels/statistical_topk.h"

namespace firesteel {
namespace {

using kernels::DType;
using kernels::MatView;

// Up to here the workers share the ranges, each with sums of its own; beyond, they share the rows.
constexpr size_t kFewRows = 32;
// Rows of a step take turns over windows of weights of about so many bytes, so that what one of
// them fetched from memory is in the L2 cache for the others.
constexpr size_t kWindowBytes = size_t{1152} << 10;

// A range has enough active neurons to work on, and there are enough ranges to share; none has more
// than can be added in integers.
size_t NumRanges(const ModelConfig& config) {
  const size_t least = config.intermediate_size / kernels::kMaxCoefficients + 1;
  return std::max(least, std::clamp<size_t>(config.ffn_top_k / 60, 4, 16));
}

// The columns `cols` of all rows; they begin at a multiple of kI4Group.
kernels::TypedView Columns(kernels::TypedView w, IndexRange cols) {
  w.data = w.RowBytes(0) + kernels::BytesOf(w.dtype, cols.begin);
  w.cols = cols.end - cols.begin;
  if (w.block_scales != nullptr) w.block_scales += cols.begin / kernels::kI4Block;
  return w;
}

float* RowOf(Matrix& matrix, size_t row) { return static_cast<float*>(matrix.MutableRow(row)); }

}  // namespace

SparkFfn::SparkFfn(const ModelConfig& config, DType down, size_t num_threads, size_t max_rows)
    : config_(config),
      num_ranges_(NumRanges(config)),
      stride_(config.intermediate_size + kernels::kCompactionSlack),
      integer_down_(down == DType::kI8),
      quantile_(kernels::NormalQuantile(1.0 - static_cast<double>(config.ffn_top_k) /
                                                  static_cast<double>(config.intermediate_size))),
      excess_(max_rows, stride_, DType::kF32),
      active_(max_rows * stride_),
      num_active_(max_rows),
      range_starts_(max_rows * (num_ranges_ + 1)),
      needed_(config.intermediate_size),
      sums_(std::max(max_rows, std::min(max_rows, kFewRows) * num_ranges_),
            kernels::SumCols(config.hidden_size), DType::kF32),
      scratch_(num_threads) {
  if (!integer_down_) return;
  const size_t rows = std::min(max_rows, std::max(kFewRows, max_rows / num_threads + 1));
  for (WorkerScratch& scratch : scratch_) {
    scratch.coefficients = QuantizedInput(rows, config.intermediate_size / num_ranges_ + 1, 0);
    scratch.sums = Matrix(1, 2 * kernels::SumCols(config.hidden_size), DType::kF32);
  }
}

void SparkFfn::Select(const Worker& worker, const MatView& scores, size_t num_rows) {
  if (worker.index() == 0) next_range_.store(0, std::memory_order_relaxed);
  const size_t f = config_.intermediate_size;
  const IndexRange rows = worker.Share(num_rows);
  for (size_t row = rows.begin; row < rows.end; ++row) {
    uint32_t* const list = &active_[row * stride_];
    const double theta = kernels::StatisticalThreshold(scores.Row(row), f, quantile_);
    const size_t count =
        kernels::CompactAbove(scores.Row(row), f, theta, list, RowOf(excess_, row));
    num_active_[row] = static_cast<uint32_t>(count);
    uint32_t* const starts = &range_starts_[row * (num_ranges_ + 1)];
    uint32_t at = 0;
    for (size_t range = 0; range < num_ranges_; ++range) {
      starts[range] = at;
      const size_t end = Neurons(range).end;
      at = static_cast<uint32_t>(std::lower_bound(list + at, list + count, end) - list);
    }
    starts[num_ranges_] = at;
    if (num_rows == 1) continue;  // the union is the row itself
    for (size_t j = 0; j < count; ++j) {
      std::atomic_ref<uint8_t>(needed_[list[j]]).store(1, std::memory_order_relaxed);
    }
  }
}

// Leaves `needed_` clear for the next layer.
uint32_t SparkFfn::CountUnion(size_t num_rows) {
  if (num_rows == 1) return num_active_[0];
  uint32_t count = 0;
  for (uint8_t& needed : needed_) count += std::exchange(needed, 0);
  return count;
}

void SparkFfn::Run(Worker& worker, const LayerWeights& weights, const Input& input, size_t num_rows,
                   const MatView& up, const MatView& out) {
  const IndexRange share = worker.Share(num_rows);
  if (num_rows <= kFewRows) {
    for (size_t range = next_range_.fetch_add(1, std::memory_order_relaxed); range < num_ranges_;
         range = next_range_.fetch_add(1, std::memory_order_relaxed)) {
      AddRange(worker, {weights, input, up, {0, num_rows}, range, false},
               [&](size_t row) { return RangeSum(row, range); });
    }
    worker.Barrier();
    for (size_t row = share.begin; row < share.end; ++row) {
      for (size_t range = 0; range < num_ranges_; ++range) {
        AddRangeSum(range, RangeSum(row, range), out.Row(row));
      }
    }
  } else if (integer_down_) {
    for (size_t range = 0; range < num_ranges_; ++range) {
      AddRange(worker, {weights, input, up, share, range, range > 0},
               [&](size_t row) { return out.Row(row); });
    }
  } else {
    for (size_t range = 0; range < num_ranges_; ++range) {
      AddRange(worker, {weights, input, up, share, range, false},
               [&](size_t row) { return RowOf(sums_, row); });
      for (size_t row = share.begin; row < share.end; ++row) {
        AddRangeSum(range, RowOf(sums_, row), out.Row(row));
      }
    }
  }
  if (!integer_down_) return;
  for (size_t row = share.begin; row < share.end; ++row) {
    kernels::ToColumnOrder(config_.hidden_size, out.Row(row));
  }
}

template <typename SumFn>
void SparkFfn::AddRange(Worker& worker, const Part& part, const SumFn& sum) {
  ForActive(worker, part, [&](size_t row, IndexRange list) {
    if (part.alone()) {  // on their way meanwhile
      kernels::FetchFirstRows(part.weights.down_proj.view(), &active_[row * stride_ + list.begin],
                              list.end - list.begin);
    }
    ProjectUp(part, row, list);
  });
  if (integer_down_) return AddIntegers(worker, part, sum);
  for (size_t row = part.rows.begin; row < part.rows.end; ++row) {
    std::memset(sum(row), 0, kernels::SumCols(config_.hidden_size) * sizeof(float));
  }
  const kernels::TypedView w = part.weights.down_proj.view();
  ForColumns(worker, part, [&](size_t row, IndexRange cols) {
    const IndexRange list = ListOf(row, part.range);
    kernels::AddSparseVecMat(RowOf(excess_, row) + list.begin, &active_[row * stride_ + list.begin],
                             list.end - list.begin, Columns(w, cols), sum(row) + cols.begin);
  });
}

// Coefficients of a part of a row's list: gelu(a) ⊙ (up_proj · x).
void SparkFfn::ProjectUp(const Part& part, size_t row, IndexRange list) {
  const kernels::TypedView w = part.weights.up_proj.view();
  const uint32_t* const active = &active_[row * stride_];
  float* const up = part.up.Row(row);
  float* const excess = RowOf(excess_, row) + list.begin;
  if (kernels::IsQuantized(w.dtype)) {
    kernels::QuantizedMaskedMatVec(part.input.integers.From(row, 1), w, active, list.begin,
                                   list.end, up);
  } else {
    kernels::TypedView x = part.input.floats;
    x.data = static_cast<const std::byte*>(x.data) + kernels::BytesOf(x.dtype, row * x.stride);
    x.rows = 1;
    kernels::MaskedMatVec(x, w, active, list.begin, list.end, up);
  }
  kernels::GeluMul(excess, up + list.begin, list.end - list.begin, excess);
}

// The same sums in integers.
template <typename SumFn>
void SparkFfn::AddIntegers(Worker& worker, const Part& part, const SumFn& sum) {
  WorkerScratch& scratch = scratch_[worker.index()];
  const kernels::TypedView w = part.weights.down_proj.view();
  const auto coefficients_of = [&](size_t row, IndexRange list) {
    kernels::QuantizedRows c = scratch.coefficients.view().From(row - part.rows.begin, 1);
    c.cols = list.end - list.begin;
    return c;
  };
  for (size_t row = part.rows.begin; row < part.rows.end; ++row) {
    const IndexRange list = ListOf(row, part.range);
    kernels::QuantizeCoefficients(RowOf(excess_, row) + list.begin,
                                  &active_[row * stride_ + list.begin], w,
                                  coefficients_of(row, list));
  }
  if (part.alone() && !part.add) {
    const size_t row = part.rows.begin;
    const IndexRange list = ListOf(row, part.range);
    Tell(worker, part, part.weights.down_proj, row, list, {0, w.cols});
    kernels::SumIntegerRows(coefficients_of(row, list), &active_[row * stride_ + list.begin], w,
                            static_cast<int32_t*>(scratch.sums.MutableRow(0)), sum(row));
    return;
  }
  ForColumns(worker, part, [&](size_t row, IndexRange cols) {
    const IndexRange list = ListOf(row, part.range);
    kernels::SumIntegerColumns(coefficients_of(row, list), &active_[row * stride_ + list.begin], w,
                               cols.begin, kernels::SumCols(cols.end), part.add, sum(row));
  });
}

// Calls visit(row, columns) until each row of `part` has visited all columns of down_proj. Rows
// take turns over windows of columns rather than of neurons, since then their sums are short, too,
// and stay in the L1 cache or in registers.
template <typename VisitFn>
void SparkFfn::ForColumns(const Worker& worker, const Part& part, const VisitFn& visit) const {
  const kernels::TypedView w = part.weights.down_proj.view();
  const IndexRange neurons = Neurons(part.range);
  const size_t group_bytes =
      (neurons.end - neurons.begin) * kernels::BytesOf(w.dtype, kernels::kI4Group);
  const size_t window = part.alone()
                            ? w.cols
                            : std::max<size_t>(1, kWindowBytes / std::max<size_t>(1, group_bytes)) *
                                  kernels::kI4Group;
  for (size_t first = 0; first < w.cols; first += window) {
    const IndexRange cols{first, std::min(w.cols, first + window)};
    for (size_t row = part.rows.begin; row < part.rows.end; ++row) {
      Tell(worker, part, part.weights.down_proj, row, ListOf(row, part.range), cols);
      visit(row, cols);
    }
  }
}

// Calls visit(row, part of the row's list) until each row's active neurons of `part` were visited;
// one call a row and window of rows of up_proj.
template <typename VisitFn>
void SparkFfn::ForActive(const Worker& worker, const Part& part, const VisitFn& visit) const {
  const Matrix& up = part.weights.up_proj;
  const size_t row_bytes = up.bytes() / up.rows() + 1;
  const IndexRange neurons = Neurons(part.range);
  const size_t window = part.alone() ? neurons.end : std::max<size_t>(1, kWindowBytes / row_bytes);
  for (size_t first = neurons.begin; first < neurons.end; first += window) {
    const bool whole = first + window >= neurons.end && first == neurons.begin;
    for (size_t row = part.rows.begin; row < part.rows.end; ++row) {
      IndexRange list = ListOf(row, part.range);
      if (!whole) {
        const uint32_t* const all = &active_[row * stride_];
        const auto index = [&](size_t neuron) {
          return static_cast<size_t>(std::lower_bound(all + list.begin, all + list.end, neuron) -
                                     all);
        };
        list = {index(first), index(first + window)};
      }
      Tell(worker, part, up, row, list, {0, up.cols()});
      visit(row, list);
    }
  }
}

// Tells the probe, if there is one, which weights are read next: those of a part of a row's list.
void SparkFfn::Tell(const Worker& worker, const Part& part, const Matrix& weights, size_t row,
                    IndexRange list, IndexRange cols) const {
  if (part.input.probe == nullptr) return;
  for (size_t j = list.begin; j < list.end; ++j) {
    part.input.probe->OnWeightRow(weights, worker.index(), active_[row * stride_ + j], cols.begin,
                                  cols.end);
  }
}

IndexRange SparkFfn::Neurons(size_t range) const {
  const size_t f = config_.intermediate_size;
  return {f * range / num_ranges_, f * (range + 1) / num_ranges_};
}

float* SparkFfn::RangeSum(size_t row, size_t range) {
  return RowOf(sums_, row * num_ranges_ + range);
}

// Ranges are added in their order; the first one starts the sum.
void SparkFfn::AddRangeSum(size_t range, const float* sum, float* out) const {
  const size_t width = kernels::SumCols(config_.hidden_size);
  if (range == 0) {
    std::memcpy(out, sum, width * sizeof(float));
  } else {
    kernels::Add(sum, width, out);
  }
}

}  // namespace firesteel
