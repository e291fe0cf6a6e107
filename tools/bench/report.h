// What firesteel-bench prints.

#ifndef FIRESTEEL_TOOLS_BENCH_REPORT_H_
#define FIRESTEEL_TOOLS_BENCH_REPORT_H_

#include <cstddef>
#include <string>
#include <vector>

#include "tools/bench/machine.h"
#include "tools/bench/subject.h"

namespace firesteel::bench {

/// What is measured: a prefill of `prompt` tokens, or (prompt 0) decoding at `batch` and `context`.
struct Setting {
  size_t threads = 1;
  size_t prompt = 0;
  size_t batch = 1;
  size_t context = 0;

  bool prefill() const { return prompt > 0; }
};

/// All runs of one model at one setting; runs of the same index were neighbours in time.
struct Series {
  Setting setting;
  bool spark = false;
  std::string weights;  // "bf16", "f32"
  std::vector<Sample> runs;
};

struct Report {
  std::string cpu;
  std::string simd_target;
  std::string compute;
  std::string kv;      // "bf16", "f32"
  size_t threads = 1;  // the most of any setting
  // With that many threads, measured beside each run: other users of the machine take their share
  // of both. As many as a series has runs.
  std::vector<MemorySpeed> memory;
  ComputeSpeed compute_speed;
  std::vector<Series> series;
};

/// The JSON that docs and checks rely on: machine, results and, where a setting has both a Spark
/// and a dense model, ratios (medians of the ratios of neighbouring runs).
std::string ToJson(const Report& report);

/// The same for a person.
std::string ToTable(const Report& report);

/// The medians of report.memory.
MemorySpeed MedianMemory(const Report& report);

/// The middle one, or the mean of the two in the middle. At least one value.
double Median(std::vector<double> values);

}  // namespace firesteel::bench

#endif  // FIRESTEEL_TOOLS_BENCH_REPORT_H_
