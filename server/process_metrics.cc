#include "server/process_metrics.h"

#include <prometheus/client_metric.h>
#include <prometheus/metric_family.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <system_error>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "server/metric_table.h"

namespace firesteel::server {
namespace {

using prometheus::MetricFamily;
using prometheus::MetricType;

MetricFamily Make(const char* name, double value) {
  const MetricDescription& metric = DescribeMetric(name);
  prometheus::ClientMetric sample;
  if (metric.type == MetricType::Counter) {
    sample.counter.value = value;
  } else {
    sample.gauge.value = value;
  }
  MetricFamily family;
  family.name = name;
  family.help = metric.help;
  family.type = metric.type;
  family.metric.push_back(std::move(sample));
  return family;
}

std::string ReadFile(const std::string& path) {
  std::ifstream file(path);
  return std::string(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

// The fields of /proc/self/stat from the third on (the state): the second, a name in parentheses,
// may hold anything. proc(5) counts from 1, so its field n is [n - 3] here.
std::vector<std::string> StatFields(const std::string& proc) {
  const std::string text = ReadFile(proc + "/self/stat");
  const size_t name_end = text.rfind(") ");
  if (name_end == std::string::npos) return {};
  return absl::StrSplit(text.substr(name_end + 2), ' ');
}

std::optional<double> Field(const std::vector<std::string>& fields, size_t n) {
  uint64_t value = 0;
  if (n - 3 >= fields.size() || !absl::SimpleAtoi(fields[n - 3], &value)) return std::nullopt;
  return static_cast<double>(value);
}

// Seconds since the epoch at which the machine started.
std::optional<double> BootTime(const std::string& proc) {
  const std::vector<std::string> lines = absl::StrSplit(ReadFile(proc + "/stat"), '\n');
  for (const std::string& line : lines) {
    uint64_t seconds = 0;
    if (line.rfind("btime ", 0) == 0 && absl::SimpleAtoi(line.substr(6), &seconds)) {
      return static_cast<double>(seconds);
    }
  }
  return std::nullopt;
}

std::optional<double> OpenFiles(const std::string& proc) {
  std::error_code error;
  std::filesystem::directory_iterator it(proc + "/self/fd", error);
  double count = 0;
  for (; !error && it != std::filesystem::directory_iterator(); it.increment(error)) ++count;
  if (error) return std::nullopt;
  return count;
}

}  // namespace

std::vector<MetricFamily> ProcessMetrics::Collect() const {
  std::vector<MetricFamily> families;
  const auto add = [&families](const char* name, std::optional<double> value) {
    if (value.has_value()) families.push_back(Make(name, *value));
  };
  const double ticks = static_cast<double>(sysconf(_SC_CLK_TCK));
  const double page = static_cast<double>(sysconf(_SC_PAGESIZE));
  const std::vector<std::string> stat = StatFields(proc_);

  const auto user = Field(stat, 14);
  const auto system = Field(stat, 15);
  if (user && system) {
    add("process_cpu_seconds_total", (*user + *system) / ticks);
  }
  if (const auto pages = Field(stat, 24)) {
    add("process_resident_memory_bytes", *pages * page);
  }
  add("process_virtual_memory_bytes", Field(stat, 23));
  add("process_threads", Field(stat, 20));
  add("process_open_fds", OpenFiles(proc_));
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
    add("process_max_fds", static_cast<double>(limit.rlim_cur));
  }
  const auto boot = BootTime(proc_);
  const auto start = Field(stat, 22);
  if (boot && start) {
    add("process_start_time_seconds", *boot + *start / ticks);
  }
  return families;
}

}  // namespace firesteel::server
