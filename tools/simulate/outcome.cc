#include "tools/simulate/outcome.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace firesteel::simulate {
namespace {

bool Completed(FinishReason reason) {
  return reason == FinishReason::kLength || reason == FinishReason::kEos ||
         reason == FinishReason::kStop;
}

std::string Milliseconds(const Percentiles& p) {
  return absl::StrFormat("p50 %.2f  p90 %.2f  p99 %.2f  max %.2f ms", 1e3 * p.p50, 1e3 * p.p90,
                         1e3 * p.p99, 1e3 * p.max);
}

nlohmann::ordered_json Json(const Percentiles& p) {
  return {{"p50", p.p50}, {"p90", p.p90}, {"p99", p.p99}, {"max", p.max}};
}

}  // namespace

Percentiles PercentilesOf(std::vector<double> values) {
  if (values.empty()) return {};
  std::sort(values.begin(), values.end());
  const auto at = [&](double q) {
    return values[static_cast<size_t>(q * static_cast<double>(values.size() - 1))];
  };
  return {.p50 = at(0.5), .p90 = at(0.9), .p99 = at(0.99), .max = values.back()};
}

void Recorder::OnStep(const StepReport& report) {
  ++outcome_.steps;
  outcome_.preemptions += report.preemptions;
  outcome_.most_kv = std::max(outcome_.most_kv, report.kv_usage_ratio);
  batch_sum_ += report.sequences;
  // What the engine does between two steps is part of what a step takes.
  const absl::Time now = clock_->Now();
  const absl::Duration duration = idle_ ? report.duration : now - step_end_;
  const StepWork work = {.prefill_tokens = report.prefill_tokens,
                         .decode_rows = report.decode_tokens,
                         .context = report.context};
  cost_fit_.Add(work, duration);
  if (steps_ != nullptr) {
    steps_->push_back({absl::ToDoubleSeconds(now - start_), absl::ToDoubleSeconds(duration), work});
  }
  step_end_ = now;
  idle_ = false;
  for (const absl::Duration d : report.inter_token_latencies) {
    itl_.push_back(absl::ToDoubleSeconds(d));
  }
}

void Recorder::OnGauges(const EngineGauges& gauges) {
  outcome_.most_waiting = std::max(outcome_.most_waiting, gauges.requests_waiting);
  if (gauges.requests_running == 0 && gauges.requests_waiting == 0) idle_ = true;
}

void Recorder::OnFinish(GenerationResult result) {
  outcome_.generated_tokens += result.usage.generated_tokens;
  outcome_.prompt_tokens += result.usage.prompt_tokens;
  outcome_.cached_tokens += result.usage.cached_tokens;
  if (result.reason == FinishReason::kDeadlineExceeded) ++outcome_.deadline_exceeded;
  if (!Completed(result.reason)) return;
  ++outcome_.completed;
  const double ttft = absl::ToDoubleSeconds(result.timings.first_token);
  ttft_.push_back(ttft);
  const double decode = absl::ToDoubleSeconds(result.timings.decode);
  const double gaps = std::max(1.0, result.usage.generated_tokens - 1.0);
  if (ttft <= objectives_.ttft_seconds && decode / gaps <= objectives_.itl_seconds) {
    ++outcome_.served_well;
  }
}

Outcome Recorder::Finish(double seconds) const {
  Outcome outcome = outcome_;
  outcome.seconds = seconds;
  outcome.mean_batch =
      static_cast<double>(batch_sum_) / static_cast<double>(std::max<uint64_t>(1, outcome.steps));
  for (size_t i = 0; i < kNumRejectionReasons; ++i) outcome.refused[i] = refused_[i].load();
  outcome.ttft = PercentilesOf(ttft_);
  outcome.itl = PercentilesOf(itl_);
  outcome.cost = cost_fit_.cost();
  return outcome;
}

std::string ToOption(const StepCost& cost) {
  return absl::StrFormat("%.4g,%.4g,%.4g,%.4g,%.4g", cost.step, cost.prefill_token, cost.decode_row,
                         cost.context, cost.prefill);
}

std::string ToTable(const Outcome& o) {
  std::string refused;
  for (size_t i = 0; i < kNumRejectionReasons; ++i) {
    if (o.refused[i] == 0) continue;
    absl::StrAppend(&refused, ", ", RejectionReasonName(static_cast<RejectionReason>(i)), " ",
                    o.refused[i]);
  }
  std::string text = absl::StrFormat(
      "time        %.3f s, %d steps of %.1f sequences\n"
      "requests    %d: completed %d, deadline exceeded %d%s\n"
      "throughput  %.1f tokens/s generated, %.2f requests/s\n"
      "goodput     %.2f requests/s (%.1f%% of all)\n",
      o.seconds, o.steps, o.mean_batch, o.requests, o.completed, o.deadline_exceeded, refused,
      o.tokens_per_second(), static_cast<double>(o.completed) / o.seconds, o.goodput(),
      100.0 * static_cast<double>(o.served_well) /
          static_cast<double>(std::max<uint64_t>(1, o.requests)));
  absl::StrAppend(&text, "first token ", Milliseconds(o.ttft), "\n");
  absl::StrAppend(&text, "next token  ", Milliseconds(o.itl), "\n");
  absl::StrAppendFormat(&text,
                        "cache       %d of %d prompt tokens found, %.0f%% in use at most, %d "
                        "preemptions\nqueue       %d at most\n",
                        o.cached_tokens, o.prompt_tokens, 100 * o.most_kv, o.preemptions,
                        o.most_waiting);
  absl::StrAppend(&text, "steps fit   --cost ", ToOption(o.cost), "\n");
  return text;
}

std::string ToComparison(const Outcome& simulated, const Outcome& measured) {
  return absl::StrFormat(
      "simulated against measured: throughput %+.1f%%, first token p50 %+.1f%%, p99 %+.1f%%\n",
      100 * (simulated.tokens_per_second() / measured.tokens_per_second() - 1),
      100 * (simulated.ttft.p50 / measured.ttft.p50 - 1),
      100 * (simulated.ttft.p99 / measured.ttft.p99 - 1));
}

std::string ToJson(const Outcome& o) {
  nlohmann::ordered_json refused = nlohmann::ordered_json::object();
  for (size_t i = 0; i < kNumRejectionReasons; ++i) {
    refused[RejectionReasonName(static_cast<RejectionReason>(i))] = o.refused[i];
  }
  const nlohmann::ordered_json json = {{"seconds", o.seconds},
                                       {"steps", o.steps},
                                       {"mean_batch", o.mean_batch},
                                       {"requests", o.requests},
                                       {"completed", o.completed},
                                       {"deadline_exceeded", o.deadline_exceeded},
                                       {"refused", refused},
                                       {"served_well", o.served_well},
                                       {"goodput", o.goodput()},
                                       {"tokens_per_second", o.tokens_per_second()},
                                       {"prompt_tokens", o.prompt_tokens},
                                       {"cached_tokens", o.cached_tokens},
                                       {"generated_tokens", o.generated_tokens},
                                       {"preemptions", o.preemptions},
                                       {"most_waiting", o.most_waiting},
                                       {"most_kv", o.most_kv},
                                       {"time_to_first_token_seconds", Json(o.ttft)},
                                       {"inter_token_latency_seconds", Json(o.itl)},
                                       {"cost",
                                        {{"step", o.cost.step},
                                         {"prefill_token", o.cost.prefill_token},
                                         {"decode_row", o.cost.decode_row},
                                         {"context", o.cost.context},
                                         {"prefill", o.cost.prefill}}}};
  return json.dump(2) + "\n";
}

std::string ToCsv(const std::vector<StepRecord>& steps) {
  std::string text = "end_seconds,seconds,prefill_tokens,decode_rows,context\n";
  for (const StepRecord& step : steps) {
    absl::StrAppendFormat(&text, "%.6f,%.6f,%d,%d,%d\n", step.end, step.duration,
                          step.work.prefill_tokens, step.work.decode_rows, step.work.context);
  }
  return text;
}

}  // namespace firesteel::simulate
