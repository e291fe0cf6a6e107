// `firesteel generate`: asks for one generation and shows it as it comes.

#ifndef FIRESTEEL_TOOLS_CLIENT_GENERATE_H_
#define FIRESTEEL_TOOLS_CLIENT_GENERATE_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/status/statusor.h"
#include "firesteel/v1/generation_service.pb.h"
#include "tools/client/connection.h"
#include "tools/client/console.h"
#include "tools/client/interrupt.h"

namespace firesteel::client {

/// What the command line says; what is unset is left to the server.
struct GenerateOptions {
  ConnectionOptions connection;
  std::string prompt;  // "-": read from standard input, to its end
  std::string model;
  std::optional<uint32_t> max_tokens;
  std::optional<float> temperature;
  std::optional<uint32_t> top_k;
  std::optional<float> top_p;
  std::optional<float> min_p;
  std::optional<float> repetition_penalty;
  std::optional<float> presence_penalty;
  std::optional<float> frequency_penalty;
  std::vector<std::string> logit_bias;  // TOKEN_ID=BIAS
  std::optional<uint64_t> seed;
  std::vector<std::string> stop;
  std::optional<uint32_t> n;
  std::optional<uint32_t> logprobs;
  std::optional<uint32_t> min_tokens;
  std::optional<int32_t> priority;
  bool echo = false;
  bool token_ids = false;  // the prompt is token ids, and token ids are shown beside the text
  bool ignore_eos = false;
  bool stream = true;
  bool json = false;
};

/// Adds the command; its callback stores the exit status. All references outlive the parse.
void AddGenerateCommand(CLI::App& app, Console& console, Interrupt* interrupt, int& exit_status);

/// Adds those of its options that also `chat` has: model, lengths and how tokens are drawn.
void AddSamplingOptions(CLI::App& command, GenerateOptions& options);

/// The request that the options ask for; `prompt` is the text itself by now. Error: token ids or
/// biases that are none.
absl::StatusOr<v1::GenerateRequest> BuildRequest(const GenerateOptions& options,
                                                 const std::string& prompt);

/// Sends the request and shows the answer: text on `out` as it comes and one line about it on
/// `err`, or JSON (one object a message) on `out`. Returns the exit status.
int RunGenerate(const GenerateOptions& options, Console& console, Interrupt* interrupt);

}  // namespace firesteel::client

#endif  // FIRESTEEL_TOOLS_CLIENT_GENERATE_H_
