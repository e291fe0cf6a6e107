#include "tools/simulate/trace.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <random>
#include <sstream>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace firesteel::simulate {
namespace {

constexpr double kMaxCount = 1 << 24;  // of tokens, clients and groups
constexpr double kMaxSeconds = 1e9;

uint64_t Mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

struct Column {
  double min;
  double max;
  std::function<void(Arrival&, double)> set;
};

const std::map<std::string, Column>& Columns() {
  static const auto* const columns = new std::map<std::string, Column>{
      {"seconds", {0, kMaxSeconds, [](Arrival& a, double v) { a.seconds = v; }}},
      {"prompt_tokens",
       {1, kMaxCount, [](Arrival& a, double v) { a.prompt_tokens = static_cast<uint32_t>(v); }}},
      {"answer_tokens",
       {1, kMaxCount, [](Arrival& a, double v) { a.answer_tokens = static_cast<uint32_t>(v); }}},
      {"max_tokens",
       {0, kMaxCount, [](Arrival& a, double v) { a.max_tokens = static_cast<uint32_t>(v); }}},
      {"client", {0, kMaxCount, [](Arrival& a, double v) { a.client = static_cast<uint32_t>(v); }}},
      {"priority", {-1e9, 1e9, [](Arrival& a, double v) { a.priority = static_cast<int32_t>(v); }}},
      {"prefix_group",
       {0, kMaxCount, [](Arrival& a, double v) { a.prefix_group = static_cast<uint32_t>(v); }}},
      {"prefix_tokens",
       {0, kMaxCount, [](Arrival& a, double v) { a.prefix_tokens = static_cast<uint32_t>(v); }}},
      {"timeout_seconds", {0, kMaxSeconds, [](Arrival& a, double v) { a.timeout_seconds = v; }}}};
  return *columns;
}

absl::Status Bad(size_t line, absl::string_view why) {
  return absl::InvalidArgumentError(absl::StrCat("trace, line ", line, ": ", why));
}

}  // namespace

std::vector<Arrival> MakeTrace(const PoissonTrace& trace) {
  std::mt19937_64 random(trace.seed);
  std::exponential_distribution<double> gap(trace.rate);
  std::normal_distribution<double> normal;
  // exp(spread · N − spread² / 2) has a mean of 1.
  const auto length = [&](double mean, uint32_t max) {
    const double factor = std::exp(trace.spread * normal(random) - trace.spread * trace.spread / 2);
    return static_cast<uint32_t>(
        std::clamp(std::round(mean * factor), 1.0, static_cast<double>(max)));
  };
  std::vector<Arrival> arrivals(trace.requests);
  double now = 0;
  for (Arrival& arrival : arrivals) {
    now += gap(random);
    arrival.seconds = now;
    arrival.prompt_tokens = length(trace.mean_prompt_tokens, trace.max_prompt_tokens);
    arrival.answer_tokens = length(trace.mean_answer_tokens, trace.max_answer_tokens);
    arrival.client = static_cast<uint32_t>(random() % std::max(1u, trace.clients));
    arrival.timeout_seconds = trace.timeout_seconds;
    if (trace.prefix_groups == 0) continue;
    arrival.prefix_group = static_cast<uint32_t>(random() % trace.prefix_groups);
    arrival.prefix_tokens = trace.prefix_tokens;
    arrival.prompt_tokens =
        std::min(trace.max_prompt_tokens, arrival.prompt_tokens + trace.prefix_tokens);
  }
  return arrivals;
}

absl::StatusOr<std::vector<Arrival>> ParseTrace(const std::string& text) {
  std::istringstream lines(text);
  std::string line;
  std::vector<const Column*> columns;
  std::vector<Arrival> arrivals;
  for (size_t number = 1; std::getline(lines, line); ++number) {
    absl::string_view content = absl::StripAsciiWhitespace(line);
    if (content.empty()) continue;
    const std::vector<std::string> cells = absl::StrSplit(content, ',');
    if (columns.empty()) {
      for (const char* const required : {"seconds", "prompt_tokens", "answer_tokens"}) {
        if (std::find(cells.begin(), cells.end(), required) == cells.end()) {
          return Bad(number, absl::StrCat("the header has no column ", required));
        }
      }
      for (const std::string& name : cells) {
        const auto it = Columns().find(name);
        if (it == Columns().end()) return Bad(number, absl::StrCat("unknown column '", name, "'"));
        columns.push_back(&it->second);
      }
      continue;
    }
    if (cells.size() != columns.size()) {
      return Bad(number,
                 absl::StrCat("has ", cells.size(), " columns, the header ", columns.size()));
    }
    Arrival arrival;
    for (size_t i = 0; i < cells.size(); ++i) {
      double value = 0;
      const Column& column = *columns[i];
      if (!absl::SimpleAtod(cells[i], &value) || !(value >= column.min && value <= column.max)) {
        return Bad(number, absl::StrCat("'", cells[i], "' is not a number from ", column.min,
                                        " to ", column.max));
      }
      column.set(arrival, value);
    }
    if (!arrivals.empty() && arrival.seconds < arrivals.back().seconds) {
      return Bad(number, "is earlier than the line before");
    }
    arrivals.push_back(arrival);
  }
  if (arrivals.empty()) return absl::InvalidArgumentError("trace: has no request");
  return arrivals;
}

absl::StatusOr<std::vector<Arrival>> ReadTrace(const std::string& path) {
  std::ifstream file(path);
  if (!file) return absl::NotFoundError(absl::StrCat("trace ", path, ": cannot be read"));
  std::ostringstream text;
  text << file.rdbuf();
  return ParseTrace(text.str());
}

GenerationRequest ToRequest(const Arrival& arrival, size_t index, size_t vocab_size) {
  GenerationRequest request;
  request.prompt.resize(arrival.prompt_tokens);
  const uint64_t own = Mix(index + 1);
  const uint64_t shared = Mix(~uint64_t{arrival.prefix_group});
  for (size_t i = 0; i < request.prompt.size(); ++i) {
    const uint64_t key = (i < arrival.prefix_tokens ? shared : own) ^ (i << 32);
    request.prompt[i] = static_cast<int32_t>(Mix(key) % vocab_size);
  }
  request.max_tokens = std::max(arrival.max_tokens, arrival.answer_tokens);
  request.stopping.ignore_eos = arrival.max_tokens <= arrival.answer_tokens;
  request.sampling.seed = index;
  request.priority = arrival.priority;
  request.client = absl::StrCat(arrival.client);
  return request;
}

}  // namespace firesteel::simulate
