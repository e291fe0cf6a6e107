#include "runtime/model/sublinear_head.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>

#include "kernels/statistical_topk.h"

namespace firesteel {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Shares of the vocabulary are cut at these, so that no two workers write one cache line.
constexpr size_t kGrain = 64;
// ‖h − ĥ‖ / ‖h‖ up to which the radii need not grow. The largest element of a rotated h is seldom
// above 5 root mean squares: steps of 5/127, an error of 5/127/sqrt(12) = 1/88.
constexpr double kRounding = 1.0 / 64;
// The soft cap's tanh is right to fewer units in the last place than this share of the cap.
constexpr double kCapMargin = 2e-6;

// The signs are the same in every process: a model's candidates never change.
std::vector<float> RandomSigns(size_t n) {
  std::vector<float> signs(n);
  uint64_t state = 0x5EED;
  for (float& sign : signs) {  // splitmix64 (Steele et al., OOPSLA 2014)
    uint64_t x = state += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    sign = (x >> 63) != 0 ? -1.0f : 1.0f;
  }
  return signs;
}

}  // namespace

SublinearHead::SublinearHead(const Matrix& embedding, double soft_cap, WorkerPool* pool,
                             size_t max_rows, const SublinearHeadOptions& options)
    : options_(options),
      vocab_(embedding.rows()),
      cols_(embedding.cols()),
      soft_cap_(soft_cap),
      team_(pool->num_threads()),
      signs_(RandomSigns(3 * cols_)),
      scales_(vocab_),
      radii_(vocab_),
      codes_(vocab_, kernels::BytesOfI2Row(cols_), kernels::DType::kI8),
      input_(max_rows, kernels::PaddedI2Cols(cols_), 0),
      rotated_(max_rows, kernels::PaddedI2Cols(cols_), kernels::DType::kF32),
      states_(max_rows),
      seeds_(max_rows * team_),
      counts_(max_rows * team_),
      share_begins_(team_),
      segments_(new uint32_t[max_rows * (vocab_ + team_ * kernels::kCompactionSlack)]),
      ids_(new uint32_t[max_rows * vocab_]) {
  pool->Run([&](Worker& worker) {
    std::vector<float> scratch(kernels::PaddedI2Cols(cols_));
    const IndexRange share = worker.Share(vocab_, kGrain);
    for (size_t row = share.begin; row < share.end; ++row) AddRow(embedding, row, scratch.data());
  });
}

void SublinearHead::AddRow(const Matrix& embedding, size_t row, float* scratch) {
  kernels::Dequantize(embedding.view(), row, 0, cols_, scratch);
  kernels::RotateAtRandom(signs_.data(), cols_, scratch);
  const kernels::I2Row about =
      kernels::QuantizeWeightsI2(scratch, cols_, static_cast<uint8_t*>(codes_.MutableRow(row)));
  scales_[row] = about.scale;
  const double rounding = kRounding * static_cast<double>(about.norm);
  radii_[row] = static_cast<float>(std::hypot(static_cast<double>(about.residual), rounding));
}

size_t SublinearHead::bytes() const {
  return vocab_ * (kernels::BytesOfI2Row(cols_) + 2 * sizeof(float));
}

uint32_t* SublinearHead::SegmentOf(size_t row, size_t worker, size_t begin) {
  const size_t stride = vocab_ + team_ * kernels::kCompactionSlack;
  return &segments_[row * stride + begin + worker * kernels::kCompactionSlack];
}

void SublinearHead::SetInput(size_t row, const float* h) {
  float* const x = static_cast<float*>(rotated_.MutableRow(row));
  std::copy(h, h + cols_, x);
  kernels::RotateAtRandom(signs_.data(), cols_, x);
  const kernels::QuantizedRows q = input_.view();
  kernels::QuantizeToBytes(x, q, row);

  double square = 0, rounding = 0;
  const auto step = static_cast<double>(q.scales[row]);
  for (size_t i = 0; i < cols_; ++i) {
    const double value = static_cast<double>(x[i]);
    const double error = value - step * q.Low(row)[i];
    square += value * value;
    rounding += error * error;
  }
  State& state = states_[row];
  state.norm = std::sqrt(square);
  const double growth = square > 0 ? std::sqrt(rounding / square) / kRounding : 0.0;
  state.width = static_cast<float>(static_cast<double>(options_.confidence) * state.norm *
                                   std::max(1.0, growth) /
                                   std::sqrt(std::max(1.0, static_cast<double>(cols_) - 1)));
}

void SublinearHead::Run(Worker& worker, std::span<const uint32_t> top_k,
                        const kernels::MatView& logits, const ExactLogits& exact) {
  const size_t rows = top_k.size();
  const IndexRange share = worker.Share(vocab_, kGrain);
  share_begins_[worker.index()] = share.begin;
  const kernels::I2View copy{codes_.view().RowBytes(0), scales_.data(), vocab_, cols_};
  kernels::ScreenMatMul(input_.view().From(0, rows), copy, share.begin, share.end, logits);
  for (size_t row = 0; row < rows; ++row) {
    FindSeeds(worker, row, top_k[row], share, logits.Row(row));
  }
  worker.Barrier();

  for (size_t row = worker.index(); row < rows; row += team_) {
    SetThreshold(row, top_k[row], team_, exact);
  }
  worker.Barrier();

  for (size_t row = 0; row < rows; ++row) ListCandidates(worker, row, share, logits.Row(row));
  worker.Barrier();  // the estimates have been read: their place is for logits now

  // Candidates crowd in some parts of a vocabulary, so they are shared anew.
  for (size_t row = 0; row < rows; ++row) {
    const size_t* const counts = &counts_[row * team_];
    const size_t total = std::accumulate(counts, counts + team_, size_t{0});
    if (worker.index() == 0) states_[row].num_candidates = total;
    const IndexRange mine = worker.Share(total, 16);
    uint32_t* const ids = &ids_[row * vocab_];
    size_t first = 0;  // of the segment's candidates among all
    for (size_t member = 0; member < team_; ++member) {
      const size_t begin = std::max(first, mine.begin);
      const size_t end = std::min(first + counts[member], mine.end);
      if (begin < end) {
        const uint32_t* const segment = SegmentOf(row, member, share_begins_[member]);
        std::copy(segment + (begin - first), segment + (end - first), ids + begin);
      }
      first += counts[member];
    }
    exact(row, ids, mine.begin, mine.end, logits.Row(row));
  }
}

// The largest estimates of the worker's share. Which rows are seeds is decided by one order of all
// rows (estimate, then id), so it does not depend on how they are shared.
void SublinearHead::FindSeeds(Worker& worker, size_t row, uint32_t top_k, IndexRange share,
                              const float* estimates) {
  const auto before = [](const Seed& a, const Seed& b) {
    return a.estimate > b.estimate || (a.estimate == b.estimate && a.id < b.id);
  };
  const size_t wanted = top_k + options_.extra_seeds;
  std::vector<Seed>& best = SeedsOf(row, worker.index());
  best.clear();
  constexpr size_t kBlock = 512;
  std::array<uint32_t, kBlock + kernels::kCompactionSlack> above;
  for (size_t begin = share.begin; begin < share.end; begin += kBlock) {
    const size_t n = std::min(kBlock, share.end - begin);
    // A heap with the last of the best on top: whatever equals it has a higher id and comes after.
    const float least = best.size() < wanted ? -kInfinity : best.front().estimate;
    const size_t count = kernels::CompactAbove(estimates + begin, n, static_cast<double>(least),
                                               above.data(), nullptr);
    for (size_t i = 0; i < count; ++i) {
      const Seed seed{estimates[begin + above[i]], static_cast<uint32_t>(begin + above[i])};
      if (best.size() == wanted) {
        if (!before(seed, best.front())) continue;
        std::pop_heap(best.begin(), best.end(), before);
        best.pop_back();
      }
      best.push_back(seed);
      std::push_heap(best.begin(), best.end(), before);
    }
  }
}

void SublinearHead::SetThreshold(size_t row, uint32_t top_k, size_t team,
                                 const ExactLogits& exact) {
  std::vector<Seed>& best = SeedsOf(row, 0);
  for (size_t member = 1; member < team; ++member) {
    const std::vector<Seed>& more = SeedsOf(row, member);
    best.insert(best.end(), more.begin(), more.end());
  }
  std::sort(best.begin(), best.end(), [](const Seed& a, const Seed& b) {
    return a.estimate > b.estimate || (a.estimate == b.estimate && a.id < b.id);
  });
  best.resize(std::min<size_t>(best.size(), top_k + options_.extra_seeds));
  State& state = states_[row];
  state.seeds.clear();
  for (const Seed& seed : best) state.seeds.push_back(seed.id);
  std::sort(state.seeds.begin(), state.seeds.end());

  std::array<float, kMaxTopK + 256> values;
  const size_t n = std::min(state.seeds.size(), values.size());
  bool usable = n >= top_k && std::isfinite(state.width);
  if (usable) {
    exact(row, state.seeds.data(), 0, n, values.data());
    usable = std::all_of(values.begin(), values.begin() + static_cast<ptrdiff_t>(n),
                         [](float v) { return std::isfinite(v); });
  }
  if (usable) {
    std::nth_element(values.begin(), values.begin() + (top_k - 1),
                     values.begin() + static_cast<ptrdiff_t>(n), std::greater<>());
    state.threshold = BeforeSoftCap(values[top_k - 1]);
    usable = std::isfinite(state.threshold);
  }
  // Inputs that are not finite: every row is listed, as the full head would.
  state.all = !usable;
}

// The largest value known to be below every logit that the soft cap turns into `logit` or more.
// Near the cap, different logits become equal, and greedy sampling takes the first of equals.
float SublinearHead::BeforeSoftCap(float logit) const {
  if (soft_cap_ == 0.0) return logit;
  const double capped = static_cast<double>(logit) / soft_cap_ - kCapMargin;
  return static_cast<float>(soft_cap_ * std::atanh(std::clamp(capped, -1.0 + 1e-12, 1.0)));
}

void SublinearHead::ListCandidates(Worker& worker, size_t row, IndexRange share,
                                   const float* estimates) {
  const State& state = states_[row];
  uint32_t* const segment = SegmentOf(row, worker.index(), share.begin);
  size_t& count = counts_[row * team_ + worker.index()];
  if (state.all) {
    count = share.end - share.begin;
    std::iota(segment, segment + count, static_cast<uint32_t>(share.begin));
  } else {
    count = kernels::ListPossible(estimates, radii_.data(), state.width, state.threshold,
                                  share.begin, share.end, segment);
  }
}

}  // namespace firesteel
