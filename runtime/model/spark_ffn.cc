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
constexpr size_t kDenseColsOfBF16 = 576;
// With so few rows, whose sums are small, wider windows are read faster.
constexpr size_t kNarrowRows = 64;
// So many rows of up_proj are gathered at a time, and rows of bf16 that share those of down_proj
// take turns over so many columns.
constexpr size_t kGatherRows = 128;
constexpr size_t kListedCols = 384;

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
      listed_(num_ranges_),
      sums_(std::min(max_rows, kFewRows) * num_ranges_, kernels::SumCols(config.hidden_size),
            DType::kF32),
      scratch_(num_threads) {
  const size_t widest = config.intermediate_size / num_ranges_ + 1;
  if (integer_down_) {
    const size_t rows = std::min(max_rows, std::max(kFewRows, max_rows / num_threads + 1));
    for (WorkerScratch& scratch : scratch_) {
      scratch.coefficients = QuantizedInput(rows, widest, 0);
      scratch.sums = Matrix(1, kernels::SumCols(config.hidden_size), DType::kF32);
    }
  }
  groups_.reserve(max_rows);
  if (!tiles || (type == DType::kI8 ? max_rows <= kFewRows : type != DType::kBF16)) return;
  for (WorkerScratch& scratch : scratch_) {
    scratch.projected.resize(widest);
    scratch.dense_up =
        Matrix(std::min(max_rows, kDenseRows) + kernels::kAmxSumRows, widest, DType::kF32);
    scratch.dense_down =
        Matrix(1, integer_down_ ? kernels::AmxSumBytes(widest, kDenseCols) : kernels::kAmxPairBytes,
               DType::kI8);
    if (integer_down_) continue;
    scratch.gathered =
        Matrix(kGatherRows, config.hidden_size - config.ffn_predictor_dim, DType::kBF16);
  }
  const size_t padded = hwy::RoundUpTo(max_rows, kernels::kAmxSumRows);
  for (size_t range = 0; range < num_ranges_; ++range) {
    const IndexRange neurons = Neurons(range);
    dense_.emplace_back(padded, neurons.end - neurons.begin, type);
  }
  dense_scales_.resize(num_ranges_ * padded);
}

void SparkFfn::Select(const Worker& worker, const MatView& scores, std::span<const RowRun> runs) {
  const size_t num_rows = runs.back().rows.end;
  if (worker.index() == 0) {
    num_rows_ = num_rows;
    ListGroups(runs);
    next_range_.store(0, std::memory_order_relaxed);
    union_size_.store(0, std::memory_order_relaxed);
    std::ranges::fill(listed_, uint8_t{0});
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

// For worker 0, while no worker runs: which rows the coming Run computes together, and how.
void SparkFfn::ListGroups(std::span<const RowRun> runs) {
  groups_.clear();
  if (integer_down_ || dense_.empty()) {
    const bool dense = MayBeDense(num_rows_, false) && ChooseDense(num_rows_);
    groups_.push_back({{0, num_rows_}, dense});
    return;
  }
  for (const RowRun& run : runs) groups_.push_back({run.rows, run.prompt});
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
  if (num_rows_ == 1 || std::exchange(listed_[range], 1) != 0) return;
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
size_t SparkFfn::TakeRange() {
  const size_t range = next_range_.fetch_add(1, std::memory_order_relaxed);
  if (range < num_ranges_) ListUnion(range);
  return range;
}

void SparkFfn::Run(Worker& worker, const LayerWeights& weights, const Input& input,
                   const MatView& up, const MatView& out) {
  const auto start = std::chrono::steady_clock::now();
  for (size_t i = 0; i < groups_.size(); ++i) {
    if (i > 0) {
      worker.Barrier();
      if (worker.index() == 0) next_range_.store(0, std::memory_order_relaxed);
      worker.Barrier();
    }
    const Group& group = groups_[i];
    if (group.dense) {
      RunDense(worker, weights, input, group.rows, out);
    } else {
      RunSparse(worker, weights, input, group.rows, up, out);
    }
  }
  if (groups_.size() > 1) worker.Barrier();  // the shares of a group are not those of the step
  if (!integer_down_) return;
  scratch_[worker.index()].seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const IndexRange share = worker.Share(num_rows_);
  for (size_t row = share.begin; row < share.end; ++row) {
    kernels::ToColumnOrder(config_.hidden_size, out.Row(row));
  }
}

void SparkFfn::RunSparse(Worker& worker, const LayerWeights& weights, const Input& input,
                         IndexRange rows, const MatView& up, const MatView& out) {
  const size_t num_rows = rows.end - rows.begin;
  IndexRange share = worker.Share(num_rows);
  share = {rows.begin + share.begin, rows.begin + share.end};
  kernels::RowFetcher& fetcher = scratch_[worker.index()].fetcher;
  fetcher = kernels::RowFetcher();
  if (num_rows <= kFewRows) {
    const auto sum = [&](size_t row, size_t range) { return RangeSum(row - rows.begin, range); };
    Part part{weights, input, up, rows, TakeRange(), 0, true, false, fetcher};
    if (part.range < num_ranges_) QueueUp(part, part.range, 0);
    if (part.alone()) fetcher.Fetch(kernels::RowFetcher::kLead);
    for (; part.range < num_ranges_; part.range = part.next) {
      part.next = TakeRange();
      AddRange(worker, part, [&](size_t row) { return sum(row, part.range); });
    }
    worker.Barrier();
    for (size_t row = share.begin; row < share.end; ++row) {
      for (size_t range = 0; range < num_ranges_; ++range) {
        AddRangeSum(range, sum(row, range), out.Row(row));
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

// On the matrix unit: first the workers share the ranges, then the columns of the output. Each
// weight comes from memory once, those of up_proj once for kDenseRows rows. A few rows, which are
// of bf16, need few of the weights: of up_proj those are gathered, and those of down_proj are added
// on the vector units, in the order of tiles.
void SparkFfn::RunDense(Worker& worker, const LayerWeights& weights, const Input& input,
                        IndexRange rows, const MatView& out) {
  const size_t num_rows = rows.end - rows.begin;
  for (size_t range = TakeRange(); range < num_ranges_; range = TakeRange()) {
    if (IsGathered(num_rows)) {
      GatheredUp(worker, weights, input, rows, range);
    } else {
      DenseUp(worker, weights, input, rows, range);
    }
  }
  worker.Barrier();
  const kernels::TypedView down = weights.down_proj.view();
  const size_t cols = std::min(kernels::SumCols(config_.hidden_size), down.stride);
  const IndexRange share = worker.Share(cols, kernels::kAlignment);
  if (IsGathered(num_rows)) {
    ListedDown(worker, weights, input, rows, share, out);
  } else {
    DenseDown(worker, weights, input, share, {out.Row(rows.begin), num_rows, out.cols, out.stride});
  }
  worker.Barrier();  // a row's columns are several workers'
}

// The coefficients of a range, zeros where a neuron is not active.
void SparkFfn::DenseUp(const Worker& worker, const LayerWeights& weights, const Input& input,
                       IndexRange rows, size_t range) {
  WorkerScratch& scratch = scratch_[worker.index()];
  const IndexRange neurons = Neurons(range);
  const kernels::TypedView w = Rows(weights.up_proj.view(), neurons);
  for (size_t first = rows.begin; first < rows.end; first += kDenseRows) {
    const IndexRange part{first, std::min(first + kDenseRows, rows.end)};
    TellRows(input.probe, worker, weights.up_proj, neurons, {0, weights.up_proj.cols()});
    const MatView up = MultiplyUp(input, part, w, scratch);
    for (size_t row = part.begin; row < part.end; ++row) {
      const IndexRange list = ListOf(row, range);
      const size_t n = list.end - list.begin;
      const uint32_t* const active = &active_[row * stride_ + list.begin];
      float* const excess = RowOf(excess_, row) + list.begin;
      const float* const all = up.Row(row - part.begin);
      float* const projected = &scratch.projected[0];
      for (size_t j = 0; j < n; ++j) projected[j] = all[active[j] - neurons.begin];
      kernels::GeluMul(excess, projected, n, excess);
      Spread(scratch, weights, row, range, row - rows.begin);
    }
  }
}

// The same for a few rows, with copies of those rows of up_proj that some row of the step needs;
// coefficients are rounded where they stand.
void SparkFfn::GatheredUp(const Worker& worker, const LayerWeights& weights, const Input& input,
                          IndexRange rows, size_t range) {
  WorkerScratch& scratch = scratch_[worker.index()];
  const kernels::TypedView w = weights.up_proj.view();
  const size_t row_bytes = kernels::BytesOf(w.dtype, w.stride);
  const std::span<const uint32_t> needed = Needed(range);
  scratch.fetcher = kernels::RowFetcher();
  scratch.fetcher.Add(w, needed.data(), needed.size(), 0, row_bytes);
  scratch.fetcher.Fetch(kernels::RowFetcher::kLead);
  for (size_t begin = 0; begin < needed.size(); begin += kGatherRows) {
    const auto gathered = needed.subspan(begin, std::min(kGatherRows, needed.size() - begin));
    for (size_t i = 0; i < gathered.size(); ++i) {
      TellRows(input.probe, worker, weights.up_proj, {gathered[i], gathered[i] + 1}, {0, w.cols});
      scratch.fetcher.Fetch(row_bytes);
      std::memcpy(scratch.gathered.MutableRow(i), w.RowBytes(gathered[i]), row_bytes);
    }
    const MatView up =
        MultiplyUp(input, rows, Rows(scratch.gathered.view(), {0, gathered.size()}), scratch);
    for (size_t row = rows.begin; row < rows.end; ++row) {
      const uint32_t* const active = &active_[row * stride_];
      const IndexRange list =
          Within(active, ListOf(row, range), {gathered.front(), gathered.back() + 1});
      const size_t n = list.end - list.begin;
      float* const excess = RowOf(excess_, row) + list.begin;
      const float* const all = up.Row(row - rows.begin);
      size_t at = 0;
      for (size_t j = 0; j < n; ++j) {
        while (gathered[at] < active[list.begin + j]) ++at;
        scratch.projected[j] = all[at];
      }
      kernels::GeluMul(excess, &scratch.projected[0], n, excess);
      for (size_t j = 0; j < n; ++j) excess[j] = kernels::ToF32(kernels::ToBF16(excess[j]));
    }
  }
}

// up_proj · x of some rows of weights, on tiles, for at most kDenseRows rows: to scratch, whose
// rows are returned.
MatView SparkFfn::MultiplyUp(const Input& input, IndexRange rows, const kernels::TypedView& w,
                             WorkerScratch& scratch) const {
  const size_t tile = rows.begin / kernels::kAmxSumRows * kernels::kAmxSumRows;
  const MatView up{RowOf(scratch.dense_up, 0), rows.end - tile, w.rows,
                   scratch.dense_up.view().stride};
  const kernels::TileColumns x = input.tiles.From(tile);
  if (integer_down_) {
    kernels::AmxMatMul(input.integers.From(tile, rows.end - tile), x, w, 0, w.rows, up);
  } else {
    kernels::AmxMatMul(x, rows.begin - tile, rows.end - tile, w, 0, w.rows, up);
  }
  return {up.Row(rows.begin - tile), rows.end - rows.begin, up.cols, up.stride};
}

// The columns `cols` of `out`, whose rows have coefficients in dense_.
void SparkFfn::DenseDown(const Worker& worker, const LayerWeights& weights, const Input& input,
                         IndexRange cols, const MatView& out) {
  auto* const scratch = static_cast<int8_t*>(scratch_[worker.index()].dense_down.MutableRow(0));
  const kernels::TypedView down = weights.down_proj.view();
  const size_t width = integer_down_            ? kDenseCols
                       : out.rows > kNarrowRows ? kDenseColsOfBF16
                                                : kernels::kAmxPairCols / 4;
  for (size_t begin = cols.begin; begin < cols.end; begin += width) {
    const size_t end = std::min(begin + width, cols.end);
    for (size_t range = 0; range < num_ranges_; ++range) {
      const IndexRange neurons = Neurons(range);
      TellRows(input.probe, worker, weights.down_proj, neurons, {begin, std::min(end, down.cols)});
      const kernels::TypedView w = Rows(down, neurons);
      const bool add = range > 0;
      if (integer_down_) {
        kernels::AmxSumColumns(DenseBytes(range, out.rows), w, begin, end, add, scratch, out);
      } else {
        kernels::AmxSumColumns(DenseFloats(range, out.rows), w, begin, end, add, scratch, out);
      }
    }
  }
}

// The same for a few rows of bf16, with the weights of their active neurons alone. The next window
// is fetched meanwhile.
void SparkFfn::ListedDown(const Worker& worker, const LayerWeights& weights, const Input& input,
                          IndexRange rows, IndexRange cols, const MatView& out) {
  const kernels::TypedView w = weights.down_proj.view();
  kernels::RowFetcher& fetcher = scratch_[worker.index()].fetcher;
  fetcher = kernels::RowFetcher();
  const size_t width = rows.end - rows.begin == 1 ? cols.end - cols.begin : kListedCols;
  const auto window_of = [&](size_t begin) {
    return IndexRange{begin, std::min(begin + width, cols.end)};
  };
  const auto queue = [&](size_t range, IndexRange window) {
    const std::span<const uint32_t> needed = Needed(range);
    fetcher.Add(w, needed.data(), needed.size(), kernels::BytesOf(w.dtype, window.begin),
                kernels::BytesOf(w.dtype, window.end));
  };
  if (cols.begin < cols.end) queue(0, window_of(cols.begin));
  for (size_t begin = cols.begin; begin < cols.end; begin += width) {
    const IndexRange window = window_of(begin);
    for (size_t range = 0; range < num_ranges_; ++range) {
      fetcher.FetchAll();
      if (range + 1 < num_ranges_) {
        queue(range + 1, window);
      } else if (window.end < cols.end) {
        queue(0, window_of(window.end));
      }
      for (size_t row = rows.begin; row < rows.end; ++row) {
        const IndexRange list = ListOf(row, range);
        const uint32_t* const active = &active_[row * stride_];
        for (size_t j = list.begin; input.probe != nullptr && j < list.end; ++j) {
          TellRows(input.probe, worker, weights.down_proj, {active[j], active[j] + 1},
                   {window.begin, std::min(window.end, w.cols)});
        }
        kernels::SumInTileOrder(RowOf(excess_, row) + list.begin, active + list.begin,
                                list.end - list.begin, w, Neurons(range).begin, window.begin,
                                window.end, range > 0, fetcher, out.Row(row));
      }
    }
  }
}

// The neurons of a range that some row of the step needs.
std::span<const uint32_t> SparkFfn::Needed(size_t range) const {
  if (num_rows_ > 1) return {&union_[Neurons(range).begin], union_sizes_[range]};
  const IndexRange own = ListOf(0, range);
  return {&active_[own.begin], own.end - own.begin};
}

// Rounds a row's coefficients of a range, and puts them to their places in a row of dense_.
void SparkFfn::Spread(WorkerScratch& scratch, const LayerWeights& weights, size_t row, size_t range,
                      size_t place) {
  const IndexRange list = ListOf(row, range);
  const size_t n = list.end - list.begin;
  const size_t first = Neurons(range).begin;
  const uint32_t* const active = &active_[row * stride_ + list.begin];
  float* const coefficients = RowOf(excess_, row) + list.begin;
  if (integer_down_) {
    kernels::QuantizedRows c = scratch.coefficients.view().From(0, 1);
    c.cols = n;
    kernels::QuantizeCoefficients(coefficients, active, weights.down_proj.view(), c);
    kernels::SpreadCoefficients(c, active, first, DenseBytes(range, place + 1), place);
  } else {
    auto* const out = static_cast<kernels::BF16*>(dense_[range].MutableRow(place));
    kernels::SpreadCoefficients(coefficients, active, n, first, out, dense_[range].view().stride);
  }
}

kernels::ByteRows SparkFfn::DenseBytes(size_t range, size_t num_rows) {
  Matrix& all = dense_[range];
  return {static_cast<int8_t*>(all.MutableRow(0)), &dense_scales_[range * all.rows()], num_rows,
          all.view().stride};
}

kernels::TypedView SparkFfn::DenseFloats(size_t range, size_t num_rows) const {
  kernels::TypedView view = dense_[range].view();
  view.rows = num_rows;
  return view;
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
