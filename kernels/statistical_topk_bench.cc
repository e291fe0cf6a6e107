// Threshold and compaction of one token's FFN scores, and what selecting exactly k would cost.

#include <algorithm>
#include <functional>

#include "hwy/contrib/sort/vqsort.h"
#include "kernels/bench_util.h"
#include "kernels/statistical_topk.h"

namespace firesteel::kernels {
namespace {

void StatisticalThreshold(benchmark::State& state) {
  const auto scores = NormalFloats(static_cast<size_t>(state.range(0)));
  const double quantile = NormalQuantile(0.92);
  for (auto _ : state) {
    benchmark::DoNotOptimize(kernels::StatisticalThreshold(scores.data(), scores.size(), quantile));
  }
  SetBytes(state, 4.0 * static_cast<double>(scores.size()));
}
BENCHMARK(StatisticalThreshold)->Arg(3072)->Arg(13824);

void CompactAbove(benchmark::State& state) {
  const auto scores = NormalFloats(static_cast<size_t>(state.range(0)));
  std::vector<uint32_t> indices(scores.size() + kCompactionSlack);
  AlignedVector<float> excess(scores.size() + kCompactionSlack);
  for (auto _ : state) {
    benchmark::DoNotOptimize(
        kernels::CompactAbove(scores.data(), scores.size(), 1.4, indices.data(), excess.data()));
    benchmark::ClobberMemory();
  }
  SetBytes(state, 4.0 * static_cast<double>(scores.size()));
}
BENCHMARK(CompactAbove)->Arg(3072)->Arg(13824);

// The k-th largest of the scores, then compaction: what `select(copy of the scores, n, k)` leaves
// at k − 1 is the threshold. Exact selection needs a copy, since it moves what it looks at.
template <class Select>
void ExactTopK(benchmark::State& state, const Select& select) {
  const auto scores = NormalFloats(static_cast<size_t>(state.range(0)));
  const size_t k = scores.size() * 8 / 100;
  AlignedVector<float> copy(scores.size());
  std::vector<uint32_t> indices(scores.size() + kCompactionSlack);
  AlignedVector<float> excess(scores.size() + kCompactionSlack);
  for (auto _ : state) {
    std::copy(scores.begin(), scores.end(), copy.begin());
    select(copy.data(), copy.size(), k);
    benchmark::DoNotOptimize(kernels::CompactAbove(scores.data(), scores.size(),
                                                   static_cast<double>(copy[k - 1]), indices.data(),
                                                   excess.data()));
    benchmark::ClobberMemory();
  }
}

void StatisticalTopK(benchmark::State& state) {
  const auto scores = NormalFloats(static_cast<size_t>(state.range(0)));
  const double quantile = NormalQuantile(0.92);
  std::vector<uint32_t> indices(scores.size() + kCompactionSlack);
  AlignedVector<float> excess(scores.size() + kCompactionSlack);
  for (auto _ : state) {
    const double theta = kernels::StatisticalThreshold(scores.data(), scores.size(), quantile);
    benchmark::DoNotOptimize(
        kernels::CompactAbove(scores.data(), scores.size(), theta, indices.data(), excess.data()));
    benchmark::ClobberMemory();
  }
}
BENCHMARK(StatisticalTopK)->Arg(3072)->Arg(13824);

void NthElement(benchmark::State& state) {
  ExactTopK(state, [](float* scores, size_t n, size_t k) {
    std::nth_element(scores, scores + k - 1, scores + n, std::greater<float>());
  });
}
BENCHMARK(NthElement)->Arg(3072)->Arg(13824);

void VQSelect(benchmark::State& state) {
  ExactTopK(state, [](float* scores, size_t n, size_t k) {
    hwy::VQSelect(scores, n, k - 1, hwy::SortDescending());
  });
}
BENCHMARK(VQSelect)->Arg(3072)->Arg(13824);

void VQSort(benchmark::State& state) {
  ExactTopK(state, [](float* scores, size_t n, size_t /*k*/) {
    hwy::VQSort(scores, n, hwy::SortDescending());
  });
}
BENCHMARK(VQSort)->Arg(3072)->Arg(13824);

}  // namespace
}  // namespace firesteel::kernels
