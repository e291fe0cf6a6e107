#include "tools/simulate/recording.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/time/time.h"

namespace firesteel::simulate {
namespace {

using Json = nlohmann::ordered_json;

constexpr double kMaxCount = 1 << 30;
constexpr double kMaxSeconds = 1e6;
constexpr double kMaxMilliseconds = 8.64e7;
constexpr double kMaxPace = 1e6;

/// Takes members of an object, and keeps the first error. Lives no longer than the object.
class Reader {
 public:
  Reader(const Json& object, std::string name, absl::Status* status)
      : object_(object), name_(std::move(name)), status_(status) {}

  double Number(const char* key, double min, double max) {
    const Json& value = Member(key);
    if (value.is_number() && value >= min && value <= max) return value.get<double>();
    Fail(key, absl::StrCat("is not a number from ", min, " to ", max));
    return min;
  }
  template <typename Int>
  void Count(const char* key, double min, double max, Int* count) {
    *count = static_cast<Int>(Number(key, min, max));
  }
  bool Flag(const char* key) {
    const Json& value = Member(key);
    if (!value.is_boolean()) Fail(key, "is neither true nor false");
    return value == true;
  }
  Reader Object(const char* key) { return {Member(key), absl::StrCat(name_, key, "."), status_}; }
  std::vector<double> Numbers(const char* key, double min, double max) {
    std::vector<double> numbers;
    for (const Json& value : Array(key)) {
      const bool good = value.is_number() && value >= min && value <= max;
      if (!good) Fail(key, absl::StrCat("has what is not a number from ", min, " to ", max));
      numbers.push_back(good ? value.get<double>() : min);
    }
    return numbers;
  }
  std::string Lines(const char* key) {
    std::string lines;
    for (const Json& value : Array(key)) {
      if (!value.is_string()) Fail(key, "has what is not a string");
      absl::StrAppend(&lines, value.is_string() ? value.get<std::string>() : "", "\n");
    }
    return lines;
  }

 private:
  const Json& Member(const char* key) {
    static const auto* const none = new Json();
    const auto it = object_.find(key);
    return it == object_.end() ? *none : *it;
  }
  const Json& Array(const char* key) {
    static const auto* const empty = new Json(Json::array());
    const Json& value = Member(key);
    if (value.is_array()) return value;
    Fail(key, "is not a list");
    return *empty;
  }
  void Fail(const char* key, absl::string_view why) {
    if (!status_->ok()) return;
    *status_ = absl::InvalidArgumentError(absl::StrCat("recording: ", name_, key, " ", why));
  }

  const Json& object_;
  const std::string name_;
  absl::Status* const status_;
};

Json ToJson(const EngineOptions& options) {
  return {{"max_batch_size", options.max_batch_size},
          {"max_batch_tokens", options.max_batch_tokens},
          {"max_queue_requests", options.max_queue_requests},
          {"max_queue_tokens", options.max_queue_tokens},
          {"max_queue_ms", absl::ToDoubleMilliseconds(options.max_queue_wait)},
          {"target_itl_ms", absl::ToDoubleMilliseconds(options.target_itl)},
          {"ageing_seconds", absl::ToDoubleSeconds(options.ageing)},
          {"prefix_cache", options.prefix_cache},
          {"optimistic_admission", options.optimistic_admission}};
}

EngineOptions OptionsFrom(Reader json) {
  EngineOptions options;
  json.Count("max_batch_size", 1, kMaxCount, &options.max_batch_size);
  json.Count("max_batch_tokens", options.max_batch_size, kMaxCount, &options.max_batch_tokens);
  json.Count("max_queue_requests", 1, kMaxCount, &options.max_queue_requests);
  json.Count("max_queue_tokens", 1, kMaxCount, &options.max_queue_tokens);
  options.max_queue_wait = absl::Milliseconds(json.Number("max_queue_ms", 0, kMaxMilliseconds));
  options.target_itl = absl::Milliseconds(json.Number("target_itl_ms", 0, kMaxMilliseconds));
  options.ageing = absl::Seconds(json.Number("ageing_seconds", 1e-3, kMaxSeconds));
  options.prefix_cache = json.Flag("prefix_cache");
  options.optimistic_admission = json.Flag("optimistic_admission");
  return options;
}

StepCost CostFrom(Reader json) {
  return {.step = json.Number("step", 0, kMaxSeconds),
          .prefill_token = json.Number("prefill_token", 0, kMaxSeconds),
          .decode_row = json.Number("decode_row", 0, kMaxSeconds),
          .context = json.Number("context", 0, kMaxSeconds),
          .prefill = json.Number("prefill", 0, kMaxSeconds)};
}

Percentiles PercentilesFrom(Reader json) {
  return {.p50 = json.Number("p50", 0, kMaxSeconds),
          .p90 = json.Number("p90", 0, kMaxSeconds),
          .p99 = json.Number("p99", 0, kMaxSeconds),
          .max = json.Number("max", 0, kMaxSeconds)};
}

Outcome OutcomeFrom(Reader json) {
  constexpr double kMaxTokens = 1e15;
  Outcome outcome;
  outcome.seconds = json.Number("seconds", 1e-9, kMaxSeconds);
  outcome.mean_batch = json.Number("mean_batch", 0, kMaxCount);
  outcome.most_kv = json.Number("most_kv", 0, 1);
  json.Count("steps", 1, kMaxTokens, &outcome.steps);
  json.Count("requests", 1, kMaxCount, &outcome.requests);
  json.Count("completed", 0, kMaxCount, &outcome.completed);
  json.Count("deadline_exceeded", 0, kMaxCount, &outcome.deadline_exceeded);
  json.Count("served_well", 0, kMaxCount, &outcome.served_well);
  json.Count("prompt_tokens", 0, kMaxTokens, &outcome.prompt_tokens);
  json.Count("cached_tokens", 0, kMaxTokens, &outcome.cached_tokens);
  json.Count("generated_tokens", 0, kMaxTokens, &outcome.generated_tokens);
  json.Count("preemptions", 0, kMaxCount, &outcome.preemptions);
  json.Count("most_waiting", 0, kMaxCount, &outcome.most_waiting);
  Reader refused = json.Object("refused");
  for (size_t i = 0; i < kNumRejectionReasons; ++i) {
    refused.Count(RejectionReasonName(static_cast<RejectionReason>(i)), 0, kMaxCount,
                  &outcome.refused[i]);
  }
  outcome.ttft = PercentilesFrom(json.Object("time_to_first_token_seconds"));
  outcome.itl = PercentilesFrom(json.Object("inter_token_latency_seconds"));
  outcome.cost = CostFrom(json.Object("cost"));
  return outcome;
}

double Rounded(double value) { return std::round(value * 1e3) / 1e3; }

}  // namespace

double Machine::Seconds(const StepWork& work, double start) const {
  double left = cost.Seconds(work);
  double now = start;
  for (auto i = static_cast<size_t>(start / kWindowSeconds); i < pace.size(); ++i) {
    const double end = static_cast<double>(i + 1) * kWindowSeconds;
    if (now + left * pace[i] <= end) return now + left * pace[i] - start;
    left -= (end - now) / pace[i];
    now = end;
  }
  return now + left - start;
}

// A step that spans several windows belongs to each of them in proportion.
Machine MachineOf(const StepCost& cost, const std::vector<StepRecord>& steps) {
  Machine machine = {.cost = cost, .pace = {}};
  std::vector<double> expected;
  for (const StepRecord& step : steps) {
    const double begin = std::max(0.0, step.end - step.duration);
    if (step.end <= begin) continue;
    const double ratio = cost.Seconds(step.work) / (step.end - begin);
    const auto last = static_cast<size_t>(step.end / Machine::kWindowSeconds);
    machine.pace.resize(std::max(machine.pace.size(), last + 1));
    expected.resize(machine.pace.size());
    for (auto i = static_cast<size_t>(begin / Machine::kWindowSeconds); i <= last; ++i) {
      const double left = static_cast<double>(i) * Machine::kWindowSeconds;
      const double here =
          std::max(0.0, std::min(step.end, left + Machine::kWindowSeconds) - std::max(begin, left));
      machine.pace[i] += here;
      expected[i] += here * ratio;
    }
  }
  for (size_t i = 0; i < expected.size(); ++i) {
    machine.pace[i] = expected[i] > 0 ? Rounded(machine.pace[i] / expected[i]) : 1;
    if (machine.pace[i] <= 0) machine.pace[i] = 1;
  }
  return machine;
}

// A line for each part, and for each request.
std::string ToJson(const Recording& recording) {
  std::vector<std::string> lines = absl::StrSplit(ToCsv(recording.trace), '\n', absl::SkipEmpty());
  for (std::string& line : lines) line = Json(line).dump();
  return absl::StrCat("{\"options\": ", ToJson(recording.options).dump(),
                      ",\n\"kv_cache_tokens\": ", recording.kv_cache_tokens,
                      ",\n\"context_tokens\": ", recording.context_tokens,
                      ",\n\"measured\": ", Json::parse(ToJson(recording.measured)).dump(),
                      ",\n\"pace\": ", Json(recording.machine.pace).dump(), ",\n\"trace\": [\n",
                      absl::StrJoin(lines, ",\n"), "]}\n");
}

absl::StatusOr<Recording> ParseRecording(const std::string& text) {
  const Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return absl::InvalidArgumentError("recording: is not a JSON object");
  absl::Status status;
  Reader reader(json, "", &status);
  Recording recording;
  recording.options = OptionsFrom(reader.Object("options"));
  reader.Count("kv_cache_tokens", 1, kMaxCount, &recording.kv_cache_tokens);
  reader.Count("context_tokens", 2, 1 << 20, &recording.context_tokens);
  recording.measured = OutcomeFrom(reader.Object("measured"));
  recording.machine = {.cost = recording.measured.cost,
                       .pace = reader.Numbers("pace", 1e-6, kMaxPace)};
  const std::string trace = reader.Lines("trace");
  if (!status.ok()) return status;
  auto arrivals = ParseTrace(trace);
  if (!arrivals.ok()) return arrivals.status();
  recording.trace = *std::move(arrivals);
  return recording;
}

absl::StatusOr<Recording> ReadRecording(const std::string& path) {
  std::ifstream file(path);
  if (!file) return absl::NotFoundError(absl::StrCat("recording ", path, ": cannot be read"));
  std::ostringstream text;
  text << file.rdbuf();
  return ParseRecording(text.str());
}

}  // namespace firesteel::simulate
