// What is asked of an engine, and when: made up (Poisson arrivals) or read from a file.

#ifndef FIRESTEEL_TOOLS_SIMULATE_TRACE_H_
#define FIRESTEEL_TOOLS_SIMULATE_TRACE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "runtime/scheduler/request.h"

namespace firesteel::simulate {

/// One request of a trace.
struct Arrival {
  double seconds = 0;  // since the start; arrivals don't go back in time
  uint32_t prompt_tokens = 1;
  uint32_t answer_tokens = 1;  // after which the model ends it
  uint32_t max_tokens = 0;     // that the client allows; 0: answer_tokens
  uint32_t client = 0;         // which of them
  int32_t priority = 0;
  uint32_t prefix_group = 0;   // prompts of a group begin alike,
  uint32_t prefix_tokens = 0;  // for so many tokens
  double timeout_seconds = 0;  // 0: none
};

/// A trace of `requests` with exponential gaps and log-normal lengths about their means.
struct PoissonTrace {
  size_t requests = 1000;
  double rate = 1;  // requests a second
  double mean_prompt_tokens = 128;
  double mean_answer_tokens = 64;
  double spread = 0.5;  // standard deviation of the lengths' logarithm; 0: all alike
  uint32_t max_prompt_tokens = 512;
  uint32_t max_answer_tokens = 256;
  uint32_t clients = 1;
  uint32_t prefix_groups = 0;  // 0: no prompt begins like another
  uint32_t prefix_tokens = 0;
  double timeout_seconds = 0;
  uint64_t seed = 1;
};

std::vector<Arrival> MakeTrace(const PoissonTrace& trace);

/// Reads CSV: a header line that names columns among seconds, prompt_tokens, answer_tokens,
/// max_tokens, client, priority, prefix_group, prefix_tokens, timeout_seconds (the first three are
/// required), then a line a request, in order of time. InvalidArgument names the line and what is
/// wrong with it.
absl::StatusOr<std::vector<Arrival>> ReadTrace(const std::string& path);
absl::StatusOr<std::vector<Arrival>> ParseTrace(const std::string& text);

/// What ParseTrace reads, with the columns that some request makes use of.
std::string ToCsv(const std::vector<Arrival>& trace);

/// The `index`-th request of a trace in the engine's terms: its tokens are below `vocab_size`, its
/// seed is `index`. Where max_tokens says no more than answer_tokens, eos does not end it.
GenerationRequest ToRequest(const Arrival& arrival, size_t index, size_t vocab_size);

}  // namespace firesteel::simulate

#endif  // FIRESTEEL_TOOLS_SIMULATE_TRACE_H_
