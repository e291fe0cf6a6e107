#include "tools/simulate/trace.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <functional>
#include <limits>
#include <random>
#include <sstream>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
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
  const char* name;
  double min;
  double max;
  std::function<double(const Arrival&)> get;
  std::function<void(Arrival&, double)> set;
};

template <typename T>
Column ColumnOf(const char* name, double min, double max, T Arrival::* member) {
  return {name, min, max, [member](const Arrival& a) { return static_cast<double>(a.*member); },
          [member](Arrival& a, double value) { a.*member = static_cast<T>(value); }};
}

constexpr size_t kRequiredColumns = 3;

// The required ones first.
const std::vector<Column>& Columns() {
  static const auto* const columns = new std::vector<Column>{
      ColumnOf("seconds", 0, kMaxSeconds, &Arrival::seconds),
      ColumnOf("prompt_tokens", 1, kMaxCount, &Arrival::prompt_tokens),
      ColumnOf("answer_tokens", 1, kMaxCount, &Arrival::answer_tokens),
      ColumnOf("max_tokens", 0, kMaxCount, &Arrival::max_tokens),
      ColumnOf("client", 0, kMaxCount, &Arrival::client),
      ColumnOf("priority", -1e9, 1e9, &Arrival::priority),
      ColumnOf("prefix_group", 0, kMaxCount, &Arrival::prefix_group),
      ColumnOf("prefix_tokens", 0, kMaxCount, &Arrival::prefix_tokens),
      ColumnOf("timeout_seconds", 0, kMaxSeconds, &Arrival::timeout_seconds)};
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
      for (size_t i = 0; i < kRequiredColumns; ++i) {
        const char* const required = Columns()[i].name;
        if (std::find(cells.begin(), cells.end(), required) == cells.end()) {
          return Bad(number, absl::StrCat("the header has no column ", required));
        }
      }
      for (const std::string& name : cells) {
        const auto it = std::find_if(Columns().begin(), Columns().end(),
                                     [&](const Column& column) { return column.name == name; });
        if (it == Columns().end()) return Bad(number, absl::StrCat("unknown column '", name, "'"));
        columns.push_back(&*it);
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

std::string ToCsv(const std::vector<Arrival>& trace) {
  std::vector<const Column*> columns;
  for (const Column& column : Columns()) {
    const bool used = std::any_of(trace.begin(), trace.end(),
                                  [&](const Arrival& arrival) { return column.get(arrival) != 0; });
    if (used || columns.size() < kRequiredColumns) columns.push_back(&column);
  }
  const auto join = [&](const auto& cell) {
    return absl::StrCat(absl::StrJoin(columns, ",", cell), "\n");
  };
  std::string text = join([](std::string* out, const Column* column) { *out += column->name; });
  for (const Arrival& arrival : trace) {
    text += join([&](std::string* out, const Column* column) {
      absl::StrAppendFormat(out, "%.12g", column->get(arrival));
    });
  }
  return text;
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
