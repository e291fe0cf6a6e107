#include "tools/bench/machine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <fstream>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"

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

double ReadBandwidthGbps(WorkerPool& pool) {
  constexpr size_t kWords = (size_t{512} << 20) / sizeof(uint64_t);
  std::vector<uint64_t> memory(kWords, 1);
  std::atomic<uint64_t> sink{0};  // keeps the sums, hence the reads
  double best = 0;
  for (int pass = 0; pass < 5; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    pool.Run([&](Worker& worker) {
      const IndexRange share = worker.Share(kWords, 64);
      uint64_t sums[16] = {};  // independent chains, which compilers turn into vectors
      for (size_t i = share.begin; i < share.end; i += 16) {
        for (size_t j = 0; j < 16; ++j) sums[j] += memory[i + j];
      }
      for (uint64_t s : sums) sink.fetch_add(s, std::memory_order_relaxed);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(kWords * sizeof(uint64_t)) / seconds.count() * 1e-9);
  }
  return best;
}

}  // namespace firesteel::bench
