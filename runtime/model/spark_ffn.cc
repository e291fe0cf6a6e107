#include "runtime/model/spark_ffn.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "kernels/elementwise.h"
#include "kernels/sparse_ffn.h"
#include "kernels/statistical_topk.h"

namespace firesteel {
namespace {

using kernels::DType;
using kernels::MatView;

// Rows of a step take turns over windows of weights of about so many bytes, so that what one of
// them fetched from memory is in the L2 cache for the others, and the next window beside it.
constexpr size_t kWindowBytes = size_t{1152} << 10;
// In a dense step so many rows are projected up at a time, and so many columns of down_proj are
// brought into the order of tiles: what a worker then reads again and again stays in its L2 cache.
constexpr size_t kDenseRows = 256;
constexpr size_t kDenseCols = 256;

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

// The rows `rows` of a matrix.
kernels::TypedView Rows(kernels::TypedView w, IndexRange rows) {
  w.data = w.RowBytes(rows.begin);
  w.rows = rows.end - rows.begin;
  if (w.row_scales != nullptr) w.row_scales += rows.begin;
  return w;
}

// The part of a rising list, given as indices, whose neurons are within a range.
IndexRange Within(const uint32_t* all, IndexRange list, IndexRange neurons) {
  const auto index = [&](size_t neuron) {
    return static_cast<size_t>(std::lower_bound(all + list.begin, all + list.end, neuron) - all);
  };
  return {index(neurons.begin), index(neurons.end)};
}

float* RowOf(Matrix& matrix, size_t row) { return static_cast<float*>(matrix.MutableRow(row)); }

}  // namespace

SparkFfn::SparkFfn(const ModelConfig& config, DType type, bool tiles, size_t num_threads,
                   size_t max_rows)
    : config_(config),
      num_ranges_(NumRanges(config)),
      stride_(config.intermediate_size + kernels::kCompactionSlack),
      integer_down_(type == DType::kI8),
      quantile_(kernels::NormalQuantile(1.0 - static_cast<double>(config.ffn_top_k) /
                                                  static_cast<double>(config.intermediate_size))),
      excess_(max_rows, stride_, DType::kF32),
      active_(max_rows * stride_),
      num_active_(max_rows),
      range_starts_(max_rows * (num_ranges_ + 1)),
      needed_(config.intermediate_size),
      union_(config.intermediate_size),
      union_sizes_(num_ranges_),
      sums_(std::min(max_rows, kFewRows) * num_ranges_, kernels::SumCols(config.hidden_size),
            DType::kF32),
      scratch_(num_threads) {
  if (!integer_down_) return;
  const size_t rows = std::min(max_rows, std::max(kFewRows, max_rows / num_threads + 1));
  for (WorkerScratch& scratch : scratch_) {
    scratch.coefficients = QuantizedInput(rows, config.intermediate_size / num_ranges_ + 1, 0);
    scratch.sums = Matrix(1, kernels::SumCols(config.hidden_size), DType::kF32);
  }
  if (!tiles || max_rows <= kFewRows) return;
  const size_t widest = config.intermediate_size / num_ranges_ + 1;
  for (WorkerScratch& scratch : scratch_) {
    scratch.projected.resize(widest);
    scratch.dense_up = Matrix(std::min(max_rows, kDenseRows), widest, DType::kF32);
    scratch.dense_down = Matrix(1, kernels::AmxSumBytes(widest, kDenseCols), DType::kI8);
  }
  const size_t padded = hwy::RoundUpTo(max_rows, kernels::kAmxSumRows);
  for (size_t range = 0; range < num_ranges_; ++range) {
    const IndexRange neurons = Neurons(range);
    dense_.emplace_back(padded, neurons.end - neurons.begin, DType::kI8);
  }
  dense_scales_.resize(num_ranges_ * padded);
}

void SparkFfn::Select(const Worker& worker, const MatView& scores, size_t num_rows) {
  if (worker.index() == 0) {
    dense_step_ = MayBeDense(num_rows) && ChooseDense(num_rows);
    next_range_.store(0, std::memory_order_relaxed);
    union_size_.store(0, std::memory_order_relaxed);
  }
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

// For worker 0, while no worker runs: which way the coming Run takes.
bool SparkFfn::ChooseDense(size_t num_rows) {
  constexpr size_t kManyRows = 128;
  constexpr uint32_t kTryOther = 16;  // one choice in so many is for what was slower of late
  if (way_ != FfnWay::kMeasured) {
    measured_ = nullptr;
    return way_ == FfnWay::kDense;
  }
  if (measured_ != nullptr) {
    double seconds = 0;
    for (const WorkerScratch& scratch : scratch_) seconds = std::max(seconds, scratch.seconds);
    seconds /= static_cast<double>(measured_rows_);
    *measured_ = *measured_ == 0 ? seconds : 0.75 * *measured_ + 0.25 * seconds;
  }
  std::array<double, 2>& seconds = seconds_[num_rows >= kManyRows ? 1 : 0];
  const bool dense_is_faster = seconds[1] <= seconds[0];  // both are tried at first
  const bool dense = ++choices_ % kTryOther == 0 ? !dense_is_faster : dense_is_faster;
  measured_ = &seconds[dense ? 1 : 0];
  measured_rows_ = num_rows;
  return dense;
}

// Lists the neurons of a range that some row needs, and leaves `needed_` clear for the next layer.
void SparkFfn::ListUnion(size_t range) {
  const IndexRange neurons = Neurons(range);
  uint32_t* const list = &union_[neurons.begin];
  size_t count = 0;
  for (size_t neuron = neurons.begin; neuron < neurons.end; ++neuron) {
    list[count] = static_cast<uint32_t>(neuron);
    count += std::exchange(needed_[neuron], 0);
  }
  union_sizes_[range] = static_cast<uint32_t>(count);
  union_size_.fetch_add(static_cast<uint32_t>(count), std::memory_order_relaxed);
}

// The worker's next range of those that are left.
size_t SparkFfn::TakeRange(size_t num_rows) {
  const size_t range = next_range_.fetch_add(1, std::memory_order_relaxed);
  if (num_rows > 1 && range < num_ranges_) ListUnion(range);
  return range;
}

void SparkFfn::Run(Worker& worker, const LayerWeights& weights, const Input& input, size_t num_rows,
                   const MatView& up, const MatView& out) {
  if (!MayBeDense(num_rows)) {
    RunSparse(worker, weights, input, num_rows, up, out);
  } else {
    const auto start = std::chrono::steady_clock::now();
    if (dense_step_) {
      RunDense(worker, weights, input, num_rows, out);
    } else {
      RunSparse(worker, weights, input, num_rows, up, out);
    }
    scratch_[worker.index()].seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  if (!integer_down_) return;
  const IndexRange share = worker.Share(num_rows);
  for (size_t row = share.begin; row < share.end; ++row) {
    kernels::ToColumnOrder(config_.hidden_size, out.Row(row));
  }
}

void SparkFfn::RunSparse(Worker& worker, const LayerWeights& weights, const Input& input,
                         size_t num_rows, const MatView& up, const MatView& out) {
  const IndexRange share = worker.Share(num_rows);
  kernels::RowFetcher& fetcher = scratch_[worker.index()].fetcher;
  fetcher = kernels::RowFetcher();
  if (num_rows <= kFewRows) {
    Part part{weights, input, up, {0, num_rows}, TakeRange(num_rows), 0, true, false, fetcher};
    if (part.range < num_ranges_) QueueUp(part, part.range, 0);
    if (part.alone()) fetcher.Fetch(kernels::RowFetcher::kLead);
    for (; part.range < num_ranges_; part.range = part.next) {
      part.next = TakeRange(num_rows);
      AddRange(worker, part, [&](size_t row) { return RangeSum(row, part.range); });
    }
    worker.Barrier();
    for (size_t row = share.begin; row < share.end; ++row) {
      for (size_t range = 0; range < num_ranges_; ++range) {
        AddRangeSum(range, RangeSum(row, range), out.Row(row));
      }
    }
  } else {
    if (worker.index() == 0) {
      for (size_t range = 0; range < num_ranges_; ++range) ListUnion(range);
    }
    Part part{weights, input, up, share, 0, 0, false, false, fetcher};
    for (; part.range < num_ranges_; part.range = part.next) {
      part.next = part.range + 1;
      part.add = part.range > 0;
      AddRange(worker, part, [&](size_t row) { return out.Row(row); });
    }
  }
}

// Every neuron's part of a step of many rows: first the workers share the ranges, then the columns
// of the output. Each weight comes from memory once, those of up_proj once for kDenseRows rows.
void SparkFfn::RunDense(Worker& worker, const LayerWeights& weights, const Input& input,
                        size_t num_rows, const MatView& out) {
  for (size_t range = TakeRange(num_rows); range < num_ranges_; range = TakeRange(num_rows)) {
    DenseUp(worker, weights, input, num_rows, range);
  }
  worker.Barrier();
  auto* const scratch = static_cast<int8_t*>(scratch_[worker.index()].dense_down.MutableRow(0));
  const IndexRange share = worker.Share(kernels::SumCols(config_.hidden_size), kernels::kAlignment);
  for (size_t begin = share.begin; begin < share.end; begin += kDenseCols) {
    const size_t end = std::min(begin + kDenseCols, share.end);
    for (size_t range = 0; range < num_ranges_; ++range) {
      const IndexRange neurons = Neurons(range);
      TellRows(input.probe, worker, weights.down_proj, neurons,
               {begin, std::min(end, weights.down_proj.cols())});
      const kernels::ByteRows c = DenseCoefficients(range, num_rows);
      kernels::AmxSumColumns(c, Rows(weights.down_proj.view(), neurons), begin, end, range > 0,
                             scratch, out);
    }
  }
  worker.Barrier();  // a row's columns are several workers'
}

// The coefficients of a range, zeros where a neuron is not active.
void SparkFfn::DenseUp(const Worker& worker, const LayerWeights& weights, const Input& input,
                       size_t num_rows, size_t range) {
  WorkerScratch& scratch = scratch_[worker.index()];
  const IndexRange neurons = Neurons(range);
  const kernels::TypedView w = Rows(weights.up_proj.view(), neurons);
  const kernels::TypedView up = scratch.dense_up.view();
  const kernels::ByteRows out = DenseCoefficients(range, num_rows);
  for (size_t first = 0; first < num_rows; first += kDenseRows) {
    const size_t count = std::min(kDenseRows, num_rows - first);
    TellRows(input.probe, worker, weights.up_proj, neurons, {0, weights.up_proj.cols()});
    kernels::AmxMatMul(input.integers.From(first, count), input.tiles.From(first), w, 0, w.rows,
                       {RowOf(scratch.dense_up, 0), count, w.rows, up.stride});
    for (size_t row = first; row < first + count; ++row) {
      const IndexRange list = ListOf(row, range);
      const size_t n = list.end - list.begin;
      const uint32_t* const active = &active_[row * stride_ + list.begin];
      float* const excess = RowOf(excess_, row) + list.begin;
      const float* const all = up.Row<float>(row - first);
      float* const projected = &scratch.projected[0];
      for (size_t j = 0; j < n; ++j) projected[j] = all[active[j] - neurons.begin];
      kernels::GeluMul(excess, projected, n, excess);
      kernels::QuantizedRows c = scratch.coefficients.view().From(0, 1);
      c.cols = n;
      kernels::QuantizeCoefficients(excess, active, weights.down_proj.view(), c);
      kernels::SpreadCoefficients(c, active, neurons.begin, out, row);
    }
  }
}

kernels::ByteRows SparkFfn::DenseCoefficients(size_t range, size_t num_rows) {
  Matrix& all = dense_[range];
  return {static_cast<int8_t*>(all.MutableRow(0)), &dense_scales_[range * all.rows()], num_rows,
          all.view().stride};
}

template <typename SumFn>
void SparkFfn::AddRange(Worker& worker, const Part& part, const SumFn& sum) {
  ForActive(worker, part, [&](size_t row, IndexRange list) {
    if (part.alone() && !integer_down_) {  // on their way meanwhile
      kernels::FetchFirstRows(part.weights.down_proj.view(), &active_[row * stride_ + list.begin],
                              list.end - list.begin);
    }
    ProjectUp(part, row, list);
  });
  if (integer_down_) return AddIntegers(worker, part, sum);
  const kernels::TypedView w = part.weights.down_proj.view();
  for (size_t row = part.rows.begin; part.few && row < part.rows.end; ++row) {
    std::memset(sum(row), 0, kernels::SumCols(config_.hidden_size) * sizeof(float));
  }
  ForColumns(worker, part, [&](size_t row, IndexRange cols) {
    const IndexRange list = ListOf(row, part.range);
    const float* const coefficients = RowOf(excess_, row) + list.begin;
    const uint32_t* const active = &active_[row * stride_ + list.begin];
    const size_t count = list.end - list.begin;
    float* const out = sum(row) + cols.begin;
    if (part.few) {
      kernels::AddSparseVecMat(coefficients, active, count, Columns(w, cols), out);
    } else {
      kernels::SumSparseColumns(coefficients, active, count, Columns(w, cols), part.add, out);
    }
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
                                   list.end, part.fetcher, up);
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
  ForColumns(worker, part, [&](size_t row, IndexRange cols) {
    const IndexRange list = ListOf(row, part.range);
    const uint32_t* const active = &active_[row * stride_ + list.begin];
    if (part.alone() && !part.add) {  // one window: all columns
      kernels::SumIntegerRows(coefficients_of(row, list), active, w, part.fetcher,
                              static_cast<int32_t*>(scratch.sums.MutableRow(0)), sum(row));
    } else {
      kernels::SumIntegerColumns(coefficients_of(row, list), active, w, cols.begin,
                                 kernels::SumCols(cols.end), part.add, part.fetcher, sum(row));
    }
  });
}

// Calls visit(row, columns) until each row of `part` has visited all columns of down_proj. Rows
// take turns over windows of columns rather than of neurons, since then their sums are short, too,
// and stay in the L1 cache or in registers.
template <typename VisitFn>
void SparkFfn::ForColumns(const Worker& worker, const Part& part, const VisitFn& visit) const {
  const size_t windows = Windows(part, part.range, part.weights.down_proj);
  for (size_t window = 0; window < windows; ++window) {
    if (!part.alone()) part.fetcher.FetchAll();
    if (window + 1 < windows) {
      QueueDown(part, window + 1);
    } else if (part.next < num_ranges_) {
      QueueUp(part, part.next, 0);
    }
    const IndexRange cols = DownWindow(part, window);
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
  const size_t windows = Windows(part, part.range, part.weights.up_proj);
  for (size_t window = 0; window < windows; ++window) {
    if (!part.alone()) part.fetcher.FetchAll();
    if (window + 1 < windows) {
      QueueUp(part, part.range, window + 1);
    } else {
      QueueDown(part, 0);
    }
    const IndexRange neurons = UpWindow(part, part.range, window);
    for (size_t row = part.rows.begin; row < part.rows.end; ++row) {
      IndexRange list = ListOf(row, part.range);
      if (windows > 1) list = Within(&active_[row * stride_], list, neurons);
      Tell(worker, part, part.weights.up_proj, row, list, {0, part.weights.up_proj.cols()});
      visit(row, list);
    }
  }
}

// Into how many windows the weights of a range are cut. Where its union is known, the next window
// is fetched meanwhile, and two of them share the cache.
size_t SparkFfn::Windows(const Part& part, size_t range, const Matrix& weights) const {
  if (part.alone()) return 1;
  if (!part.few) return hwy::DivCeil(weights.bytes() / num_ranges_, kWindowBytes);
  const size_t needed = union_sizes_[range] * (weights.bytes() / weights.rows());
  return std::max<size_t>(1, hwy::DivCeil(needed, kWindowBytes / 2));
}

IndexRange SparkFfn::UpWindow(const Part& part, size_t range, size_t window) const {
  const size_t windows = Windows(part, range, part.weights.up_proj);
  const IndexRange neurons = Neurons(range);
  const size_t n = neurons.end - neurons.begin;
  return {neurons.begin + n * window / windows, neurons.begin + n * (window + 1) / windows};
}

IndexRange SparkFfn::DownWindow(const Part& part, size_t window) const {
  const size_t windows = Windows(part, part.range, part.weights.down_proj);
  const size_t cols = part.weights.down_proj.cols();
  const size_t groups = hwy::DivCeil(cols, kernels::kI4Group);
  const auto begin = [&](size_t i) {
    return std::min(cols, groups * i / windows * kernels::kI4Group);
  };
  return {begin(window), begin(window + 1)};
}

// The neurons of a range that the part's rows need; empty where that is not known.
std::span<const uint32_t> SparkFfn::Union(const Part& part, size_t range) const {
  if (part.alone()) {
    const IndexRange list = ListOf(part.rows.begin, range);
    return {&active_[part.rows.begin * stride_ + list.begin], list.end - list.begin};
  }
  if (!part.few) return {};
  return {&union_[Neurons(range).begin], union_sizes_[range]};
}

// Only products of integers ask for what is queued: those of floats fetch their own next rows.
void SparkFfn::QueueUp(const Part& part, size_t range, size_t window) const {
  const kernels::TypedView w = part.weights.up_proj.view();
  if (!kernels::IsQuantized(w.dtype)) return;
  const std::span<const uint32_t> all = Union(part, range);
  const IndexRange list = Within(all.data(), {0, all.size()}, UpWindow(part, range, window));
  part.fetcher.Add(w, all.data() + list.begin, list.end - list.begin, 0,
                   kernels::BytesOf(w.dtype, w.stride));
}

void SparkFfn::QueueDown(const Part& part, size_t window) const {
  if (!integer_down_) return;
  const kernels::TypedView w = part.weights.down_proj.view();
  const std::span<const uint32_t> list = Union(part, part.range);
  const IndexRange cols = DownWindow(part, window);
  if (cols.begin == cols.end) return;
  part.fetcher.Add(w, list.data(), list.size(), kernels::BytesOf(w.dtype, cols.begin),
                   kernels::BytesOf(w.dtype, cols.end == w.cols ? w.stride : cols.end));
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
