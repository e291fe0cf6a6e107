// What a load run measured, put together: pure functions from the records of its requests to
// figures, to a table, to JSON and to a page.

#ifndef FIRESTEEL_TOOLS_CLIENT_LOAD_REPORT_H_
#define FIRESTEEL_TOOLS_CLIENT_LOAD_REPORT_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "firesteel/v1/generation_service.pb.h"
#include "grpcpp/support/status_code_enum.h"

namespace firesteel::client {

/// One request. Times are seconds from the run's start.
struct LoadRecord {
  double due = 0;    // when it was to be sent; latencies count from here
  double end = 0;    // when its status came
  double first = 0;  // when its first token came; valid where generated_tokens > 0
  /// Waits for each token but the first. A message of several tokens counts its wait evenly.
  std::vector<float> inter_token;
  bool measured = true;   // due after the warm-up
  bool not_sent = false;  // too many were open
  grpc::StatusCode code = grpc::StatusCode::OK;
  std::string message;  // of a failure
  v1::FinishReason finish_reason = v1::FINISH_REASON_UNSPECIFIED;
  uint32_t prompt_tokens = 0;
  uint32_t generated_tokens = 0;
  // As the server reports them.
  double queue_seconds = 0;
  double ffn_active_fraction = 0;
  double attended_positions = 0;
  double attended_fraction = 0;
  double flops_skipped_fraction = 0;
};

/// Service level objectives, in seconds; unset: any will do.
struct LoadObjectives {
  std::optional<double> ttft;
  std::optional<double> itl;  // a request's mean
  std::optional<double> e2e;

  bool any() const { return ttft.has_value() || itl.has_value() || e2e.has_value(); }
};

/// A distribution's figures, in seconds. All zero where nothing was counted.
struct LoadDistribution {
  size_t count = 0;
  double mean = 0, min = 0, p50 = 0, p90 = 0, p95 = 0, p99 = 0, max = 0;
  std::vector<double> quantiles;  // [101]: 0%, 1% … 100%; empty where nothing was counted
};

/// What happened in one second of the run, warm-up included.
struct LoadSecond {
  uint64_t due = 0;
  uint64_t succeeded = 0;
  uint64_t failed = 0;
  uint64_t tokens = 0;  // of requests that ended in it
};

/// Why a code came up, once.
struct LoadError {
  uint64_t count = 0;
  std::string example;
  LoadDistribution latency;  // until it came; nothing for requests that were not sent
};

struct LoadSummary {
  double seconds = 0;    // from the first measured request's due time to the last one's end
  uint64_t warm_up = 0;  // requests left out
  uint64_t requests = 0;
  uint64_t succeeded = 0;
  uint64_t within_objectives = 0;  // of those that succeeded
  uint64_t prompt_tokens = 0;
  uint64_t generated_tokens = 0;
  LoadDistribution ttft, itl, e2e, queue;          // of those that succeeded
  std::map<std::string, LoadError> errors;         // by code; NOT_SENT for those that never left
  std::map<std::string, uint64_t> finish_reasons;  // of those that succeeded
  double ffn_active_fraction = 0;                  // means over computed tokens, as the server
  double attended_positions = 0;                   // reports them
  double attended_fraction = 0;
  double flops_skipped_fraction = 0;
  std::vector<LoadSecond> timeline;

  double PerSecond(double amount) const { return seconds > 0 ? amount / seconds : 0; }
};

/// How the run was made, for whoever reads the report.
struct LoadSetup {
  std::string target;  // address
  std::string model;
  std::string arrivals;  // "closed loop, 8 at once", "open loop, Poisson, 20/s"
  double warm_up_seconds = 0;
  uint32_t max_tokens = 0;  // of the longest answers that were asked for
  LoadObjectives objectives;
};

/// Nearest-rank quantiles. Sorts `values`.
LoadDistribution Distribute(std::vector<double>& values);

/// Puts the records together; their order does not matter.
LoadSummary Summarize(const std::vector<LoadRecord>& records, const LoadObjectives& objectives);

/// The summary as a table for a terminal.
std::string LoadTable(const LoadSetup& setup, const LoadSummary& summary);

/// The summary as one JSON object on one line, without a newline. Seconds and ratios.
std::string LoadJson(const LoadSetup& setup, const LoadSummary& summary);

/// The summary as a page with charts that needs nothing but itself.
std::string LoadHtml(const LoadSetup& setup, const LoadSummary& summary);

}  // namespace firesteel::client

#endif  // FIRESTEEL_TOOLS_CLIENT_LOAD_REPORT_H_
