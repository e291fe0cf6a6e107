// `firesteel load`: puts a server under load and reports latency, throughput, goodput, errors and
// sparsity.

#ifndef FIRESTEEL_TOOLS_CLIENT_LOAD_H_
#define FIRESTEEL_TOOLS_CLIENT_LOAD_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/status/statusor.h"
#include "tools/client/connection.h"
#include "tools/client/console.h"
#include "tools/client/interrupt.h"
#include "tools/client/load_generator.h"
#include "tools/client/load_report.h"

namespace firesteel::client {

/// Lengths, drawn evenly from a range; a single one where both ends are the same.
struct LengthRange {
  uint32_t min = 0;
  uint32_t max = 0;
};

/// What the command line says.
struct LoadOptions {
  ConnectionOptions connection;
  LoadPlan plan;
  LoadObjectives objectives;
  std::string model;
  std::vector<std::string> prompts;  // taken in turn; none: a few openings of stories
  std::string prompts_file;          // one a line
  LengthRange prompt_tokens;         // instead of prompts: so many random token ids; 0: prompts
  LengthRange max_tokens = {64, 64};
  bool ignore_eos = false;
  std::optional<float> temperature;
  std::optional<uint32_t> logprobs;
  uint64_t seed = 0;  // of the requests, counting up, and of the gaps
  bool json = false;
  std::string html;  // file for the page; empty: none
};

/// Adds the command; its callback stores the exit status. All references outlive the parse.
void AddLoadCommand(CLI::App& app, Console& console, Interrupt* interrupt, int& exit_status);

/// "64", or "16-256". Error: names what is wrong.
absl::StatusOr<LengthRange> ParseLengths(const std::string& text);

/// "ttft=500ms,itl=50ms,e2e=10s", any of them. Error: names what is wrong.
absl::StatusOr<LoadObjectives> ParseObjectives(const std::string& text);

/// Runs the load and shows the report on `out`, progress on `err` where `out` is a terminal.
/// Returns the exit status: kSucceeded where at least one measured request succeeded.
int RunLoad(const LoadOptions& options, Console& console, Interrupt* interrupt);

}  // namespace firesteel::client

#endif  // FIRESTEEL_TOOLS_CLIENT_LOAD_H_
