#include "tools/bench/machine.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <fstream>
#include <random>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "kernels/amx.h"
#include "kernels/compute_peak.h"
#include "kernels/memory_read.h"
#include "runtime/checkpoint/weights.h"

namespace firesteel::bench {

std::string CpuName() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(':');
    if (absl::StartsWith(line, "model name") && colon != std::string::npos) {
      return std::string(absl::StripAsciiWhitespace(line.substr(colon + 1)));
    }
  }
  return "unknown";
}

namespace {

// Calls work(worker) on the whole team several times; the most of `amount` (bytes, operations) that
// any pass did in a second, in 10⁹.
template <class Work>
double BestRate(WorkerPool& pool, double amount, const Work& work) {
  constexpr int kPasses = 7;
  double best = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    pool.Run(work);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, amount / seconds.count() * 1e-9);
  }
  return best;
}

}  // namespace

ComputeSpeed MeasureCompute(WorkerPool& pool) {
  constexpr size_t kSteps = 1 << 20;
  const auto threads = static_cast<double>(pool.num_threads());
  float values[3] = {0.5f, 1.0f, 0.0f};
  ComputeSpeed speed;
  speed.f32 = BestRate(pool, threads * kernels::MultiplyAdds(kSteps, values), [&](Worker&) {
    float mine[3] = {0.5f, 1.0f, 0.0f};
    kernels::MultiplyAdds(kSteps, mine);
  });
  if (!kernels::AmxAvailable()) return speed;

  constexpr size_t kTokens = 64, kDepth = 2304, kRows = 256, kRepeats = 8;
  struct Product {
    Matrix x{1, kernels::TileColumns::Words(kTokens, kDepth / 2), kernels::DType::kF32};
    Matrix w{kRows, kDepth, kernels::DType::kBF16};
    Matrix y{kTokens, kRows, kernels::DType::kF32};
  };
  std::vector<Product> products(pool.num_threads());
  const double operations =
      2.0 * kRepeats * threads * static_cast<double>(kTokens * kDepth * kRows);
  speed.bf16 = BestRate(pool, operations, [&](Worker& worker) {
    Product& p = products[worker.index()];
    const kernels::TileColumns tiles{static_cast<int32_t*>(p.x.MutableRow(0)),
                                     kDepth / 2 / kernels::kTileWords};
    const kernels::MatView y{static_cast<float*>(p.y.MutableRow(0)), kTokens, kRows,
                             p.y.view().stride};
    for (size_t i = 0; i < kRepeats; ++i) {
      kernels::AmxMatMul(tiles, 0, kTokens, p.w.view(), 0, kRows, y);
    }
  });
  return speed;
}

MemorySpeed MeasureMemory(WorkerPool& pool) {
  constexpr size_t kRowBytes = 2560;
  constexpr size_t kRows = (size_t{2} << 30) / kRowBytes;  // past L3 caches, as a model is
  constexpr uint32_t kLists = 12;                          // a twelfth is 8%
  Matrix memory(kRows, kRowBytes, kernels::DType::kI8);
  const void* const data = memory.view().data;
  std::atomic<uint32_t> sink{0};  // keeps the sums, hence the reads

  MemorySpeed speed;
  speed.sequential = BestRate(pool, kRows * kRowBytes, [&](Worker& worker) {
    const IndexRange share = worker.Share(kRows);
    sink ^= kernels::ReadAll(memory.view().RowBytes(share.begin),
                             (share.end - share.begin) * kRowBytes);
  });

  // Every pass reads rows that no pass before it has read: the same ones again would be in L3.
  std::mt19937 engine(1);
  std::uniform_int_distribution<uint32_t> any_list(0, kLists - 1);
  std::array<std::vector<uint32_t>, kLists> lists;
  for (uint32_t row = 0; row < kRows; ++row) lists[any_list(engine)].push_back(row);
  constexpr size_t kListRows = kRows / kLists * 9 / 10;  // each has more
  std::atomic<size_t> runs{0};
  speed.gather = BestRate(pool, static_cast<double>(kListRows * kRowBytes), [&](Worker& worker) {
    const size_t pass = runs++ / worker.team_size();
    const std::vector<uint32_t>& rows = lists[pass % kLists];
    const IndexRange share = worker.Share(kListRows);
    sink ^= kernels::ReadRows(data, kRowBytes, &rows[share.begin], share.end - share.begin);
  });
  return speed;
}

}  // namespace firesteel::bench
