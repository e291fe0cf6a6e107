#include "server/metric_table.h"

#include <cstdlib>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"

namespace firesteel::server {
namespace {

using enum BucketKind;
using enum prometheus::MetricType;

constexpr MetricDescription kTable[] = {
    // Requests
    {"firesteel_requests_running", Gauge, "model_name", kNone,
     "Requests in the batch, prefilling or decoding."},
    {"firesteel_requests_waiting", Gauge, "model_name", kNone,
     "Requests in the queue, not yet begun."},
    {"firesteel_requests_total", Counter, "finish_reason,model_name", kNone,
     "Requests that were admitted and have ended, by finish reason."},
    {"firesteel_admission_rejections_total", Counter, "model_name,reason", kNone,
     "Requests refused before any work, by reason."},
    {"firesteel_preemptions_total", Counter, "model_name", kNone,
     "Running requests that lost their place in the batch and were computed anew later."},
    {"firesteel_request_prompt_tokens", Histogram, "model_name", kCount,
     "Prompt tokens of a request."},
    {"firesteel_request_generation_tokens", Histogram, "model_name", kCount,
     "Generated tokens of a request."},
    // Latency
    {"firesteel_time_to_first_token_seconds", Histogram, "model_name", kLatency,
     "From a request's arrival to its first token."},
    {"firesteel_inter_token_latency_seconds", Histogram, "model_name", kLatency,
     "From one token of a sequence to its next."},
    {"firesteel_time_per_output_token_seconds", Histogram, "model_name", kLatency,
     "Mean time between a request's tokens, the first one left out."},
    {"firesteel_e2e_request_latency_seconds", Histogram, "model_name", kLatency,
     "From a request's arrival to its end."},
    {"firesteel_request_queue_time_seconds", Histogram, "model_name", kLatency,
     "From a request's arrival until it joined the batch."},
    {"firesteel_request_prefill_time_seconds", Histogram, "model_name", kLatency,
     "From joining the batch until the prompt was computed."},
    {"firesteel_request_decode_time_seconds", Histogram, "model_name", kLatency,
     "From a request's first token to its end."},
    // Steps and throughput
    {"firesteel_prompt_tokens_total", Counter, "model_name", kNone, "Prompt tokens computed."},
    {"firesteel_prompt_tokens_cached_total", Counter, "model_name", kNone,
     "Prompt tokens that were not computed, because the prefix cache had them."},
    {"firesteel_generation_tokens_total", Counter, "model_name", kNone, "Tokens generated."},
    {"firesteel_batch_size", Histogram, "model_name", kCount, "Sequences in a step."},
    {"firesteel_iteration_tokens", Histogram, "model_name", kCount,
     "Tokens computed in a step, prefill and decode."},
    {"firesteel_step_duration_seconds", Histogram, "model_name,phase", kLatency,
     "Duration of a step, by phase: prefill, decode, or mixed."},
    // Memory
    {"firesteel_kv_cache_usage_ratio", Gauge, "model_name", kNone,
     "Used part of the KV cache, from 0 to 1."},
    {"firesteel_kv_cache_capacity_tokens", Gauge, "model_name", kNone,
     "Positions that the KV cache holds, of all sequences together."},
    {"firesteel_prefix_cache_queries_total", Counter, "model_name", kNone,
     "Prompt tokens that were looked up in the prefix cache."},
    {"firesteel_prefix_cache_hits_total", Counter, "model_name", kNone,
     "Prompt tokens that the prefix cache had."},
    // Sparsity
    {"firesteel_ffn_active_fraction", Histogram, "layer,model_name", kFraction,
     "Active neurons of a layer for one token, of all its neurons."},
    {"firesteel_ffn_batch_union_fraction", Histogram, "layer,model_name", kFraction,
     "Neurons of a layer that at least one token of a step needed, of all its neurons."},
    {"firesteel_ffn_topk_ratio", Gauge, "layer,model_name", kNone,
     "Active neurons of a layer over its target k, mean of about the last 1024 tokens; drifts from "
     "1 where scores are not Gaussian."},
    {"firesteel_attention_attended_fraction", Histogram, "layer,model_name", kFraction,
     "Positions that the heads of a layer attended to for one token, of those they could see."},
    {"firesteel_attention_attended_positions", Histogram, "layer,model_name", kCount,
     "Positions that a head of a layer attended to for one token, mean of its heads."},
    {"firesteel_flops_total", Counter, "kind,model_name", kNone,
     "FLOPs of the model: performed, and skipped thanks to sparsity."},
    {"firesteel_weight_bytes_total", Counter, "kind,model_name", kNone,
     "Bytes of weights of all steps: read, and skipped thanks to sparsity."},
    // What runs
    {"firesteel_build_info", Gauge, "model_name,simd_target,version,weights", kNone,
     "Always 1; its labels say what runs: version, SIMD target, weights."},
    // gRPC
    {"grpc_server_started_total", Counter, "grpc_method,grpc_service", kNone,
     "Calls that were begun."},
    {"grpc_server_handled_total", Counter, "grpc_code,grpc_method,grpc_service", kNone,
     "Calls that have ended, by code."},
    {"grpc_server_handling_seconds", Histogram, "grpc_code,grpc_method,grpc_service", kLatency,
     "Duration of calls, by code."},
    // Process
    {"process_cpu_seconds_total", Counter, "", kNone, "CPU time of the process, user and system."},
    {"process_resident_memory_bytes", Gauge, "", kNone, "Memory of the process that is in RAM."},
    {"process_virtual_memory_bytes", Gauge, "", kNone, "Address space of the process."},
    {"process_threads", Gauge, "", kNone, "Threads of the process."},
    {"process_open_fds", Gauge, "", kNone, "Open file descriptors."},
    {"process_max_fds", Gauge, "", kNone, "File descriptors that the process may open."},
    {"process_start_time_seconds", Gauge, "", kNone,
     "When the process started, in seconds since the epoch."},
};

constexpr char kIntroduction[] = R"(# Metrics

This page is written from the table in `server/metric_table.cc` and is not edited by hand: after a change of the table,
`FIRESTEEL_WRITE_DOCS=1 make test TESTS=MetricTableTest` writes it anew.

`GET /metrics` at `--metrics-address` answers in Prometheus' text format. Time is in seconds, parts of a whole are ratios from 0 to 1.
Label values come from closed lists: the models that were loaded and their layers, the finish reasons, the reasons of refusals, gRPC's codes
and the methods of this server. Neither a request nor an unknown method can make a time series. The warm-up at start is not counted.

Buckets of histograms are of three kinds, each set by an option of the server as a list of rising upper bounds:

| kind | option | default |
|---|---|---|
)";

constexpr char kOutro[] = R"(
The `grpc_server_` families count what reaches this server's code. A message of more than `--max-message-bytes` does not: gRPC itself ends
such a call with RESOURCE_EXHAUSTED, before a call with one request is begun, so that neither its beginning nor its end is counted. (Where
`--channelz` is on, its `calls_started` has them.) An open ModelStreamInfer that gets such a message is counted as `Canceled`.

Counting a decode step costs some microseconds a layer (`server_metrics_bench`). There are no exemplars: the library that writes the text
format, prometheus-cpp, has none; a request's `x-request-id` and `traceparent` are in its log line instead.

How the families are read together is in `deploy/grafana` (dashboards) and `deploy/prometheus` (rules and alerts).
)";

const char* TypeName(prometheus::MetricType type) {
  return type == Counter ? "counter" : type == Gauge ? "gauge" : "histogram";
}

const char* KindName(BucketKind kind) {
  return kind == kLatency    ? "latency"
         : kind == kFraction ? "fraction"
         : kind == kCount    ? "count"
                             : "";
}

std::string LabelsText(const char* labels) {
  if (*labels == '\0') return "";
  return absl::StrCat("`", absl::StrJoin(absl::StrSplit(labels, ','), "`, `"), "`");
}

}  // namespace

std::span<const MetricDescription> MetricTable() { return kTable; }

const MetricDescription& DescribeMetric(absl::string_view name) {
  for (const MetricDescription& metric : kTable) {
    if (name == metric.name) return metric;
  }
  std::abort();  // a family that the table lacks: the first test to start a server finds it
}

const std::vector<double>& BoundsOf(const MetricDescription& metric, const MetricBuckets& buckets) {
  switch (metric.buckets) {
    case kLatency:
      return buckets.latency;
    case kFraction:
      return buckets.fraction;
    case kCount:
      return buckets.count;
    case kNone:
      break;
  }
  std::abort();  // no histogram
}

std::string MetricsDocument() {
  const MetricBuckets buckets;
  std::string text = kIntroduction;
  absl::StrAppend(&text, "| latency | `--latency-buckets` | ", absl::StrJoin(buckets.latency, ", "),
                  " |\n| fraction | `--fraction-buckets` | ", absl::StrJoin(buckets.fraction, ", "),
                  " |\n| count | `--count-buckets` | ", absl::StrJoin(buckets.count, ", "), " |\n");
  absl::StrAppend(&text,
                  "\n| family | type | labels | buckets | what it is |\n|---|---|---|---|---|\n");
  for (const MetricDescription& metric : kTable) {
    absl::StrAppend(&text, "| `", metric.name, "` | ", TypeName(metric.type), " | ",
                    LabelsText(metric.labels), " | ", KindName(metric.buckets), " | ", metric.help,
                    " |\n");
  }
  absl::StrAppend(&text, kOutro);
  return text;
}

}  // namespace firesteel::server
