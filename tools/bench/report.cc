#include "tools/bench/report.h"

#include <algorithm>
#include <functional>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace firesteel::bench {
namespace {

std::vector<double> Speeds(const Series& series) {
  std::vector<double> speeds;
  for (const Sample& run : series.runs) speeds.push_back(run.tokens_per_second);
  return speeds;
}

// The median over the runs of what `value` takes from each.
double MedianOf(const Series& series, const std::function<double(const Sample&)>& value) {
  std::vector<double> values;
  for (const Sample& run : series.runs) values.push_back(value(run));
  return Median(std::move(values));
}

double BytesPerToken(const Series& series) {
  return MedianOf(series, [](const Sample& run) { return run.bytes_per_token; });
}

double FlopsPerToken(const Series& series) {
  return MedianOf(series, [](const Sample& run) { return run.flops_per_token; });
}

double CpuSecondsPerToken(const Series& series) {
  return MedianOf(series, [](const Sample& run) { return run.cpu_seconds_per_token; });
}

double ScatteredPerToken(const Series& series) {
  return MedianOf(series, [](const Sample& run) { return run.scattered_per_token; });
}

// The median of what `value` makes of each run and the memory's speed beside it.
double MedianBesideMemory(
    const Report& report, const Series& series,
    const std::function<double(const Sample& run, const MemorySpeed& memory)>& value) {
  std::vector<double> values;
  for (size_t i = 0; i < series.runs.size(); ++i) {
    values.push_back(value(series.runs[i], report.memory[i]));
  }
  return Median(std::move(values));
}

double BandwidthFraction(const Report& report, const Series& series) {
  return MedianBesideMemory(report, series, [](const Sample& run, const MemorySpeed& memory) {
    return run.tokens_per_second * run.bytes_per_token / (memory.sequential * 1e9);
  });
}

// The time that reading a token's bytes takes at the speed of memory, over the time it took.
double FloorFraction(const Report& report, const Series& series) {
  return MedianBesideMemory(report, series, [](const Sample& run, const MemorySpeed& memory) {
    const double sequential = run.bytes_per_token - run.scattered_per_token;
    const double floor =
        sequential / (memory.sequential * 1e9) + run.scattered_per_token / (memory.gather * 1e9);
    return floor * run.tokens_per_second;
  });
}

constexpr const char* kPhaseNames[kNumPhases] = {"projections", "attention",  "predictor",
                                                 "threshold",   "sparse_ffn", "dense_ffn",
                                                 "rest",        "head"};

double PhaseMilliseconds(const Series& series, size_t phase) {
  return 1e3 * MedianOf(series, [&](const Sample& run) { return run.phase_seconds[phase]; });
}

constexpr char kSampling[] = "sampling";  // no part of the model's step

double SamplingMilliseconds(const Series& series) {
  return 1e3 * MedianOf(series, [](const Sample& run) { return run.sampling_seconds; });
}

bool SameSetting(const Setting& a, const Setting& b) {
  return a.threads == b.threads && a.prompt == b.prompt && a.batch == b.batch &&
         a.context == b.context;
}

// Calls fn(spark, dense, ratio) for each setting that has both.
void ForEachRatio(const Report& report,
                  const std::function<void(const Series&, const Series&, double)>& fn) {
  for (const Series& spark : report.series) {
    for (const Series& dense : report.series) {
      if (!spark.spark || dense.spark || !SameSetting(spark.setting, dense.setting)) continue;
      std::vector<double> ratios;
      for (size_t i = 0; i < spark.runs.size(); ++i) {
        ratios.push_back(spark.runs[i].tokens_per_second / dense.runs[i].tokens_per_second);
      }
      fn(spark, dense, Median(std::move(ratios)));
    }
  }
}

const char* Phase(const Setting& setting) { return setting.prefill() ? "prefill" : "decode"; }

}  // namespace

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  return n % 2 == 1 ? values[n / 2] : 0.5 * (values[n / 2 - 1] + values[n / 2]);
}

MemorySpeed MedianMemory(const Report& report) {
  std::vector<double> sequential, gather;
  for (const MemorySpeed& memory : report.memory) {
    sequential.push_back(memory.sequential);
    gather.push_back(memory.gather);
  }
  return {Median(std::move(sequential)), Median(std::move(gather))};
}

std::string ToJson(const Report& report) {
  const MemorySpeed memory = MedianMemory(report);
  nlohmann::json json;
  json["machine"] = {{"cpu", report.cpu},
                     {"simd_target", report.simd_target},
                     {"threads", report.threads},
                     {"read_bandwidth_gbps", memory.sequential},
                     {"gather_bandwidth_gbps", memory.gather},
                     {"f32_gflops", report.compute_speed.f32},
                     {"bf16_matrix_gflops", report.compute_speed.bf16}};
  json["compute"] = report.compute;
  json["kv"] = report.kv;
  json["results"] = nlohmann::json::array();
  for (const Series& series : report.series) {
    const std::vector<double> speeds = Speeds(series);
    nlohmann::json phases;
    for (size_t i = 0; i < kNumPhases; ++i) phases[kPhaseNames[i]] = PhaseMilliseconds(series, i);
    phases[kSampling] = SamplingMilliseconds(series);
    nlohmann::json runs = nlohmann::json::array();
    for (const Sample& run : series.runs) {
      runs.push_back({{"tokens_per_second", run.tokens_per_second},
                      {"cpu_seconds_per_token", run.cpu_seconds_per_token}});
    }
    json["results"].push_back({{"model", series.spark ? "spark" : "dense"},
                               {"weights", series.weights},
                               {"phase", Phase(series.setting)},
                               {"threads", series.setting.threads},
                               {"batch", series.setting.batch},
                               {"context", series.setting.context},
                               {"prompt", series.setting.prompt},
                               {"tokens_per_second",
                                {{"median", Median(speeds)},
                                 {"min", *std::min_element(speeds.begin(), speeds.end())},
                                 {"max", *std::max_element(speeds.begin(), speeds.end())}}},
                               {"cpu_seconds_per_token", CpuSecondsPerToken(series)},
                               {"flops_per_token", FlopsPerToken(series)},
                               {"bytes_per_token", BytesPerToken(series)},
                               {"scattered_bytes_per_token", ScatteredPerToken(series)},
                               {"bandwidth_fraction", BandwidthFraction(report, series)},
                               {"floor_fraction", FloorFraction(report, series)},
                               {"phase_milliseconds_per_token", phases},
                               {"runs", runs}});
  }
  json["ratios"] = nlohmann::json::array();
  ForEachRatio(report, [&](const Series& spark, const Series& dense, double ratio) {
    json["ratios"].push_back({{"phase", Phase(spark.setting)},
                              {"threads", spark.setting.threads},
                              {"batch", spark.setting.batch},
                              {"context", spark.setting.context},
                              {"prompt", spark.setting.prompt},
                              {"spark_weights", spark.weights},
                              {"dense_weights", dense.weights},
                              {"spark_over_dense", ratio}});
  });
  return json.dump(2) + "\n";
}

std::string ToTable(const Report& report) {
  const MemorySpeed memory = MedianMemory(report);
  std::string out = absl::StrFormat(
      "%s, SIMD target %s, compute %s, KV cache %s, reads %.1f GB/s in sequence and %.1f GB/s row "
      "by "
      "row with %d thread(s)\n\n"
      "| threads | phase | prompt | batch | context | model | weights | tokens/s (min to max) | "
      "MB/token | of the bandwidth | of the floor "
      "|\n|---|---|---|---|---|---|---|---|---|---|---|\n",
      report.cpu, report.simd_target, report.compute, report.kv, memory.sequential, memory.gather,
      report.threads);
  for (const Series& series : report.series) {
    const Setting& s = series.setting;
    const std::vector<double> speeds = Speeds(series);
    absl::StrAppendFormat(
        &out,
        "| %d | %s | %d | %d | %d | %s | %s | %.1f (%.1f to %.1f) | %.2f | %.0f%% | %.0f%% |\n",
        s.threads, Phase(s), s.prompt, s.batch, s.context, series.spark ? "spark" : "dense",
        series.weights, Median(speeds), *std::min_element(speeds.begin(), speeds.end()),
        *std::max_element(speeds.begin(), speeds.end()), BytesPerToken(series) * 1e-6,
        100 * BandwidthFraction(report, series), 100 * FloorFraction(report, series));
  }
  absl::StrAppend(
      &out, "\nMilliseconds a token:\n\n| threads | phase | prompt | batch | context | model |");
  for (const char* name : kPhaseNames) absl::StrAppend(&out, " ", name, " |");
  absl::StrAppend(&out, " ", kSampling, " |\n|");
  for (size_t i = 0; i < 6 + kNumPhases + 1; ++i) absl::StrAppend(&out, "---|");
  absl::StrAppend(&out, "\n");
  for (const Series& series : report.series) {
    const Setting& s = series.setting;
    absl::StrAppendFormat(&out, "| %d | %s | %d | %d | %d | %s |", s.threads, Phase(s), s.prompt,
                          s.batch, s.context, series.spark ? "spark" : "dense");
    for (size_t i = 0; i < kNumPhases; ++i) {
      absl::StrAppendFormat(&out, " %.3f |", PhaseMilliseconds(series, i));
    }
    absl::StrAppendFormat(&out, " %.3f |\n", SamplingMilliseconds(series));
  }
  std::string ratios;
  ForEachRatio(report, [&](const Series& spark, const Series&, double ratio) {
    const Setting& s = spark.setting;
    absl::StrAppendFormat(&ratios, "| %d | %s | %d | %d | %d | %.2f |\n", s.threads, Phase(s),
                          s.prompt, s.batch, s.context, ratio);
  });
  if (!ratios.empty()) {
    absl::StrAppend(&out,
                    "\n| threads | phase | prompt | batch | context | spark / dense |\n"
                    "|---|---|---|---|---|---|\n",
                    ratios);
  }
  return out;
}

}  // namespace firesteel::bench
