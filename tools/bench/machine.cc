#include "tools/bench/machine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <fstream>
#include <random>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
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

// Calls work(worker) on the whole team several times; the most bytes a second of any pass, in 10⁹.
template <class Work>
double BestGbps(WorkerPool& pool, double bytes, const Work& work) {
  constexpr int kPasses = 7;
  double best = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    pool.Run(work);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, bytes / seconds.count() * 1e-9);
  }
  return best;
}

}  // namespace

MemorySpeed MeasureMemory(WorkerPool& pool) {
  constexpr size_t kRowBytes = 2560;
  constexpr size_t kRows = (size_t{1} << 30) / kRowBytes;
  Matrix memory(kRows, kRowBytes, kernels::DType::kI8);
  const void* const data = memory.view().data;
  std::atomic<uint32_t> sink{0};  // keeps the sums, hence the reads

  MemorySpeed speed;
  speed.sequential = BestGbps(pool, kRows * kRowBytes, [&](Worker& worker) {
    const IndexRange share = worker.Share(kRows);
    sink ^= kernels::ReadAll(memory.view().RowBytes(share.begin),
                             (share.end - share.begin) * kRowBytes);
  });

  std::mt19937 engine(1);
  std::bernoulli_distribution active(0.08);
  std::vector<uint32_t> rows;
  for (uint32_t row = 0; row < kRows; ++row) {
    if (active(engine)) rows.push_back(row);
  }
  speed.gather = BestGbps(pool, static_cast<double>(rows.size() * kRowBytes), [&](Worker& worker) {
    const IndexRange share = worker.Share(rows.size());
    sink ^= kernels::ReadRows(data, kRowBytes, &rows[share.begin], share.end - share.begin);
  });
  return speed;
}

}  // namespace firesteel::bench
