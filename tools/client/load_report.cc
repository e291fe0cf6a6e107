#include "tools/client/load_report.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/time/time.h"
#include "tools/client/format.h"
#include "tools/client/rpc_error.h"

namespace firesteel::client {
namespace {

using Json = nlohmann::ordered_json;

bool Meets(const LoadRecord& record, const LoadObjectives& objectives) {
  if (objectives.e2e && record.end - record.due > *objectives.e2e) return false;
  if (objectives.ttft &&
      (record.generated_tokens == 0 || record.first - record.due > *objectives.ttft)) {
    return false;
  }
  if (objectives.itl && !record.inter_token.empty()) {
    const double sum = std::accumulate(record.inter_token.begin(), record.inter_token.end(), 0.0);
    if (sum / static_cast<double>(record.inter_token.size()) > *objectives.itl) return false;
  }
  return true;
}

void CountSecond(const LoadRecord& record, std::vector<LoadSecond>* timeline) {
  const auto second = [timeline](double time) -> LoadSecond& {
    const auto index = static_cast<size_t>(std::max(0.0, time));
    if (timeline->size() <= index) timeline->resize(index + 1);
    return (*timeline)[index];
  };
  ++second(record.due).due;
  LoadSecond& end = second(record.end);
  ++(record.code == grpc::StatusCode::OK ? end.succeeded : end.failed);
  end.tokens += record.generated_tokens;
}

/// Means of the server's own figures, weighted by the tokens that they are means of.
class SparsityMeans {
 public:
  void Add(const LoadRecord& record) {
    const double weight = record.prompt_tokens + record.generated_tokens;
    weight_ += weight;
    ffn_ += weight * record.ffn_active_fraction;
    positions_ += weight * record.attended_positions;
    attended_ += weight * record.attended_fraction;
    flops_ += weight * record.flops_skipped_fraction;
  }

  void Store(LoadSummary* summary) const {
    if (weight_ == 0) return;
    summary->ffn_active_fraction = ffn_ / weight_;
    summary->attended_positions = positions_ / weight_;
    summary->attended_fraction = attended_ / weight_;
    summary->flops_skipped_fraction = flops_ / weight_;
  }

 private:
  double weight_ = 0, ffn_ = 0, positions_ = 0, attended_ = 0, flops_ = 0;
};

/// Latencies of failures by code.
using FailureTimes = std::map<std::string, std::vector<double>>;

void CountFailure(const LoadRecord& record, LoadSummary* summary, FailureTimes* times) {
  const std::string code = record.not_sent ? "NOT_SENT" : StatusCodeName(record.code);
  LoadError& error = summary->errors[code];
  if (++error.count == 1) error.example = record.message;
  if (!record.not_sent) (*times)[code].push_back(record.end - record.due);
}

std::string Time(double seconds) { return ShortDuration(absl::Seconds(seconds)); }

void AddRow(const char* name, const LoadDistribution& d, std::string* table) {
  if (d.count == 0) return;
  absl::StrAppendFormat(table, "%-22s%10s%10s%10s%10s%10s%10s\n", name, Time(d.mean), Time(d.p50),
                        Time(d.p90), Time(d.p95), Time(d.p99), Time(d.max));
}

std::string ObjectivesText(const LoadObjectives& objectives) {
  std::vector<std::string> parts;
  if (objectives.ttft) parts.push_back("ttft <= " + Time(*objectives.ttft));
  if (objectives.itl) parts.push_back("itl <= " + Time(*objectives.itl));
  if (objectives.e2e) parts.push_back("e2e <= " + Time(*objectives.e2e));
  return absl::StrJoin(parts, ", ");
}

Json ToJson(const LoadDistribution& d) {
  return {{"count", d.count}, {"mean", d.mean}, {"min", d.min},
          {"p50", d.p50},     {"p90", d.p90},   {"p95", d.p95},
          {"p99", d.p99},     {"max", d.max},   {"quantiles", d.quantiles}};
}

Json ToJson(const LoadObjectives& objectives) {
  Json json = Json::object();
  if (objectives.ttft) json["ttft_seconds"] = *objectives.ttft;
  if (objectives.itl) json["itl_seconds"] = *objectives.itl;
  if (objectives.e2e) json["e2e_seconds"] = *objectives.e2e;
  return json;
}

Json ToJson(const std::vector<LoadSecond>& timeline) {
  Json json = Json::array();
  for (const LoadSecond& second : timeline) {
    json.push_back({{"due", second.due},
                    {"succeeded", second.succeeded},
                    {"failed", second.failed},
                    {"tokens", second.tokens}});
  }
  return json;
}

}  // namespace

LoadDistribution Distribute(std::vector<double>& values) {
  LoadDistribution d;
  if (values.empty()) return d;
  std::sort(values.begin(), values.end());
  const auto quantile = [&values](double q) {
    const double rank = std::ceil(q * static_cast<double>(values.size()));
    return values[static_cast<size_t>(std::max(1.0, rank)) - 1];
  };
  d.count = values.size();
  d.mean = std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(d.count);
  d.min = values.front();
  d.p50 = quantile(0.5);
  d.p90 = quantile(0.9);
  d.p95 = quantile(0.95);
  d.p99 = quantile(0.99);
  d.max = values.back();
  for (int percent = 0; percent <= 100; ++percent) d.quantiles.push_back(quantile(percent / 100.0));
  return d;
}

LoadSummary Summarize(const std::vector<LoadRecord>& records, const LoadObjectives& objectives) {
  LoadSummary summary;
  std::vector<double> ttft, itl, e2e, queue;
  FailureTimes failures;
  SparsityMeans sparsity;
  double begin = 0, end = 0;
  for (const LoadRecord& record : records) {
    CountSecond(record, &summary.timeline);
    if (!record.measured) {
      ++summary.warm_up;
      continue;
    }
    begin = summary.requests == 0 ? record.due : std::min(begin, record.due);
    end = std::max(end, record.end);
    ++summary.requests;
    if (record.code != grpc::StatusCode::OK) {
      CountFailure(record, &summary, &failures);
      continue;
    }
    ++summary.succeeded;
    ++summary.finish_reasons[FinishReasonName(record.finish_reason)];
    if (Meets(record, objectives)) ++summary.within_objectives;
    summary.prompt_tokens += record.prompt_tokens;
    summary.generated_tokens += record.generated_tokens;
    e2e.push_back(record.end - record.due);
    queue.push_back(record.queue_seconds);
    if (record.generated_tokens > 0) ttft.push_back(record.first - record.due);
    itl.insert(itl.end(), record.inter_token.begin(), record.inter_token.end());
    sparsity.Add(record);
  }
  summary.seconds = end - begin;
  summary.ttft = Distribute(ttft);
  summary.itl = Distribute(itl);
  summary.e2e = Distribute(e2e);
  summary.queue = Distribute(queue);
  for (auto& [code, times] : failures) summary.errors[code].latency = Distribute(times);
  sparsity.Store(&summary);
  return summary;
}

std::string LoadTable(const LoadSetup& setup, const LoadSummary& summary) {
  std::string table = absl::StrFormat(
      "%s, %s, up to %d tokens each\n"
      "%d requests in %s after %d of warm-up, %d succeeded, %d failed\n"
      "%.2f requests/s, %.1f generated tokens/s, %.1f prompt tokens/s\n",
      setup.target, setup.arrivals, setup.max_tokens, summary.requests, Time(summary.seconds),
      summary.warm_up, summary.succeeded, summary.requests - summary.succeeded,
      summary.PerSecond(static_cast<double>(summary.succeeded)),
      summary.PerSecond(static_cast<double>(summary.generated_tokens)),
      summary.PerSecond(static_cast<double>(summary.prompt_tokens)));
  if (setup.objectives.any()) {
    absl::StrAppendFormat(&table, "goodput %.2f requests/s (%.1f%% of all within %s)\n",
                          summary.PerSecond(static_cast<double>(summary.within_objectives)),
                          100.0 * static_cast<double>(summary.within_objectives) /
                              static_cast<double>(std::max<uint64_t>(1, summary.requests)),
                          ObjectivesText(setup.objectives));
  }
  absl::StrAppendFormat(&table, "\n%-22s%10s%10s%10s%10s%10s%10s\n", "", "mean", "p50", "p90",
                        "p95", "p99", "max");
  AddRow("time to first token", summary.ttft, &table);
  AddRow("inter-token latency", summary.itl, &table);
  AddRow("end to end", summary.e2e, &table);
  AddRow("queue, by the server", summary.queue, &table);
  for (const auto& [code, error] : summary.errors) AddRow(code.c_str(), error.latency, &table);
  if (summary.succeeded > 0) {
    absl::StrAppendFormat(
        &table, "\nFFN %.1f%% active, attended %.1f positions (%.1f%%), FLOPs skipped %.1f%%\n",
        100 * summary.ffn_active_fraction, summary.attended_positions,
        100 * summary.attended_fraction, 100 * summary.flops_skipped_fraction);
    std::vector<std::string> reasons;
    for (const auto& [reason, count] : summary.finish_reasons) {
      reasons.push_back(absl::StrCat(reason, " ", count));
    }
    absl::StrAppend(&table, "finished by ", absl::StrJoin(reasons, ", "), "\n");
  }
  for (const auto& [code, error] : summary.errors) {
    absl::StrAppend(&table, "failed with ", code, ": ", error.count, ", e.g. ",
                    VisibleText(error.example), "\n");
  }
  return table;
}

std::string LoadJson(const LoadSetup& setup, const LoadSummary& summary) {
  Json errors = Json::object();
  for (const auto& [code, error] : summary.errors) {
    errors[code] = {{"count", error.count},
                    {"example", error.example},
                    {"latency_seconds", ToJson(error.latency)}};
  }
  const double failed = static_cast<double>(summary.requests - summary.succeeded);
  const Json json = {
      {"setup",
       {{"target", setup.target},
        {"model", setup.model},
        {"arrivals", setup.arrivals},
        {"warm_up_seconds", setup.warm_up_seconds},
        {"max_tokens", setup.max_tokens},
        {"objectives", ToJson(setup.objectives)}}},
      {"seconds", summary.seconds},
      {"requests",
       {{"warm_up", summary.warm_up},
        {"measured", summary.requests},
        {"succeeded", summary.succeeded},
        {"failed", failed},
        {"per_second", summary.PerSecond(static_cast<double>(summary.succeeded))}}},
      {"goodput",
       {{"within_objectives", summary.within_objectives},
        {"per_second", summary.PerSecond(static_cast<double>(summary.within_objectives))}}},
      {"tokens",
       {{"prompt", summary.prompt_tokens},
        {"generated", summary.generated_tokens},
        {"generated_per_second",
         summary.PerSecond(static_cast<double>(summary.generated_tokens))}}},
      {"time_to_first_token_seconds", ToJson(summary.ttft)},
      {"inter_token_latency_seconds", ToJson(summary.itl)},
      {"e2e_request_latency_seconds", ToJson(summary.e2e)},
      {"request_queue_time_seconds", ToJson(summary.queue)},
      {"finish_reasons", summary.finish_reasons},
      {"errors", errors},
      {"sparsity",
       {{"ffn_active_fraction", summary.ffn_active_fraction},
        {"attention_attended_positions", summary.attended_positions},
        {"attention_attended_fraction", summary.attended_fraction},
        {"flops_skipped_fraction", summary.flops_skipped_fraction}}},
      {"timeline", ToJson(summary.timeline)}};
  // A server's message may hold bytes that are no UTF-8.
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace firesteel::client
