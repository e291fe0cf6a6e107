#include "tools/client/generate.h"

#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "firesteel/v1/generation_service.grpc.pb.h"
#include "grpcpp/client_context.h"
#include "tools/client/format.h"
#include "tools/client/prompt.h"
#include "tools/client/rpc_error.h"

namespace firesteel::client {
namespace {

// Shows the messages of one answer, and keeps what the closing line needs.
class Printer {
 public:
  Printer(const GenerateOptions& options, Console& console)
      : options_(options), console_(console), start_(absl::Now()) {}

  // A message of the stream. False: it can't be shown, and the reason was printed.
  bool Show(const v1::GenerateStreamResponse& message) {
    if (options_.json) return ShowJson(message);
    ShowSequence(message.sequence());
    if (message.has_usage()) {
      ShowSummary(message.usage(), message.timings(), message.sparsity(), message.sequence());
    }
    return true;
  }

  // The answer to a call without a stream.
  bool Show(const v1::GenerateResponse& response) {
    if (options_.json) return ShowJson(response);
    for (const v1::Sequence& sequence : response.sequences()) {
      EndText();
      if (response.sequences_size() > 1) {
        console_.out << "--- " << sequence.index() << std::endl;
      }
      ShowSequence(sequence);
    }
    ShowSummary(response.usage(), response.timings(), response.sparsity(),
                response.sequences_size() > 0 ? response.sequences(response.sequences_size() - 1)
                                              : v1::Sequence::default_instance());
    return true;
  }

  // Ends a line of text that is still open, so that what follows starts on its own.
  void EndText() {
    if (!line_open_) return;
    console_.out << std::endl;
    line_open_ = false;
  }

 private:
  bool ShowJson(const google::protobuf::Message& message) {
    const absl::StatusOr<std::string> json = ToJson(message);
    if (!json.ok()) {
      console_.err << "error: " << json.status().message() << "\n";
      return false;
    }
    console_.out << *json << std::endl;
    return true;
  }

  void ShowSequence(const v1::Sequence& sequence) {
    for (const v1::TokenLogprob& token : sequence.logprobs()) logprobs_.push_back(token);
    token_ids_.insert(token_ids_.end(), sequence.token_ids().begin(), sequence.token_ids().end());
    if (sequence.text().empty()) return;
    if (first_text_ == absl::InfiniteDuration()) first_text_ = absl::Now() - start_;
    // Flushed at once: the point of a stream is to be seen as it comes.
    console_.out << (console_.out_is_terminal ? VisibleText(sequence.text()) : sequence.text())
                 << std::flush;
    line_open_ = sequence.text().back() != '\n';
  }

  void ShowSummary(const v1::Usage& usage, const v1::Timings& timings, const v1::Sparsity& sparsity,
                   const v1::Sequence& last) {
    EndText();
    if (options_.token_ids) {
      console_.out << "token ids: " << absl::StrJoin(token_ids_, ",") << std::endl;
    }
    for (const v1::TokenLogprob& token : logprobs_) console_.out << FormatLogprob(token) << "\n";
    console_.out << std::flush;
    console_.err << FormatSummary(usage, timings, sparsity, last, first_text_) << std::endl;
  }

  const GenerateOptions& options_;
  Console& console_;
  const absl::Time start_;
  absl::Duration first_text_ = absl::InfiniteDuration();
  std::vector<uint32_t> token_ids_;
  std::vector<v1::TokenLogprob> logprobs_;  // shown behind the text
  bool line_open_ = false;
};

grpc::Status Stream(v1::GenerationService::Stub& stub, grpc::ClientContext& context,
                    const v1::GenerateRequest& request, Printer& printer, bool& shown) {
  const auto reader = stub.GenerateStream(&context, request);
  v1::GenerateStreamResponse message;
  while (reader->Read(&message)) {
    if (shown && !printer.Show(message)) {
      shown = false;
      context.TryCancel();  // and read on until the stream has ended
    }
  }
  return reader->Finish();
}

}  // namespace

absl::StatusOr<v1::GenerateRequest> BuildRequest(const GenerateOptions& options,
                                                 const std::string& prompt) {
  v1::GenerateRequest request;
  request.set_model(options.model);
  if (options.token_ids) {
    absl::StatusOr<std::vector<uint32_t>> ids = ParseTokenIds(prompt);
    if (!ids.ok()) return ids.status();
    request.mutable_token_ids()->mutable_ids()->Assign(ids->begin(), ids->end());
    request.mutable_output()->set_return_token_ids(true);
  } else {
    request.set_prompt(prompt);
  }
  if (options.max_tokens) request.set_max_tokens(*options.max_tokens);
  v1::SamplingParameters& sampling = *request.mutable_sampling();
  if (options.temperature) sampling.set_temperature(*options.temperature);
  if (options.top_k) sampling.set_top_k(*options.top_k);
  if (options.top_p) sampling.set_top_p(*options.top_p);
  if (options.min_p) sampling.set_min_p(*options.min_p);
  if (options.repetition_penalty) sampling.set_repetition_penalty(*options.repetition_penalty);
  if (options.presence_penalty) sampling.set_presence_penalty(*options.presence_penalty);
  if (options.frequency_penalty) sampling.set_frequency_penalty(*options.frequency_penalty);
  for (const std::string& entry : options.logit_bias) {
    uint32_t id = 0;
    float bias = 0;
    const std::pair<std::string, std::string> parts =
        absl::StrSplit(entry, absl::MaxSplits('=', 1));
    if (!absl::SimpleAtoi(parts.first, &id) || !absl::SimpleAtof(parts.second, &bias)) {
      return absl::InvalidArgumentError(
          absl::StrCat("--logit-bias: '", entry, "' is not TOKEN_ID=BIAS"));
    }
    (*sampling.mutable_logit_bias())[id] = bias;
  }
  if (options.seed) sampling.set_seed(*options.seed);
  v1::StoppingCriteria& stopping = *request.mutable_stopping();
  for (const std::string& stop : options.stop) stopping.add_stop(stop);
  stopping.set_ignore_eos(options.ignore_eos);
  if (options.min_tokens) stopping.set_min_tokens(*options.min_tokens);
  if (options.n) request.set_n(*options.n);
  if (options.priority) request.set_priority(*options.priority);
  if (options.logprobs) request.mutable_output()->set_logprobs(*options.logprobs);
  if (options.echo) request.mutable_output()->set_echo(true);
  return request;
}

int RunGenerate(const GenerateOptions& options, Console& console, Interrupt* interrupt) {
  const std::string prompt = ReadPrompt(options.prompt, console);
  const absl::StatusOr<v1::GenerateRequest> request = BuildRequest(options, prompt);
  if (!request.ok()) {
    console.err << "error: " << request.status().message() << "\n";
    return kUsage;
  }

  const auto stub = v1::GenerationService::NewStub(Connect(options.connection));
  grpc::ClientContext context;
  PrepareCall(options.connection, context);
  const Interrupt::Scope scope(interrupt, &context);
  Printer printer(options, console);
  bool shown = true;
  grpc::Status status;
  // As lines of text, several sequences can only be shown one after the other.
  const bool one_by_one = options.n.value_or(1) > 1 && !options.json;
  if (options.stream && !one_by_one) {
    status = Stream(*stub, context, *request, printer, shown);
  } else {
    v1::GenerateResponse response;
    status = stub->Generate(&context, *request, &response);
    if (status.ok()) shown = printer.Show(response);
  }
  printer.EndText();
  if (!shown) return kFailed;
  if (status.ok()) return kSucceeded;
  if (interrupt != nullptr && interrupt->raised()) {
    console.err << "interrupted: the request was cancelled" << std::endl;
    return kInterrupted;
  }
  console.err << FormatError(status, context) << std::flush;
  return kFailed;
}

void AddSamplingOptions(CLI::App& command, GenerateOptions& options) {
  command.add_option("--model", options.model, "Name of the model (default: the server's first)");
  command.add_option("--max-tokens", options.max_tokens, "Most tokens to generate");
  command.add_option("--temperature", options.temperature, "0: always the most probable token");
  command.add_option("--top-k", options.top_k, "Keep the K most probable tokens; 0: all");
  command.add_option("--top-p", options.top_p, "Keep the likeliest tokens up to this probability");
  command.add_option("--min-p", options.min_p, "Keep tokens of this fraction of the best one's");
  command.add_option("--repetition-penalty", options.repetition_penalty,
                     "Divides the logits of tokens seen before; 1: none");
  command.add_option("--presence-penalty", options.presence_penalty,
                     "Subtracted from the logits of tokens seen before");
  command.add_option("--frequency-penalty", options.frequency_penalty,
                     "The same, as often as they were seen");
  command.add_option("--logit-bias", options.logit_bias, "Added to a token's logit (repeatable)")
      ->type_name("TOKEN_ID=BIAS")
      ->allow_extra_args(false);
  command.add_option("--seed", options.seed, "Makes the draw repeatable");
  command.add_option("--stop", options.stop, "End before this text (repeatable)")
      ->allow_extra_args(false);
}

void AddGenerateCommand(CLI::App& app, Console& console, Interrupt* interrupt, int& exit_status) {
  auto options = std::make_shared<GenerateOptions>();  // lives in the callback
  CLI::App& command = *app.add_subcommand("generate", "Generate text, shown as it comes");
  AddConnectionOptions(command, options->connection);
  command
      .add_option("PROMPT", options->prompt, "Text to continue; '-' reads it from standard input")
      ->required();
  AddSamplingOptions(command, *options);
  command.add_option("--n", options->n, "Sequences to generate from the prompt");
  command.add_option("--logprobs", options->logprobs,
                     "Show log-probabilities, and those of so many alternatives");
  command.add_flag("--echo", options->echo, "Show the prompt before what is generated");
  command.add_option("--min-tokens", options->min_tokens, "Nothing ends it before so many tokens");
  command.add_option("--priority", options->priority, "The larger is served first where many wait");
  command.add_flag("--token-ids", options->token_ids,
                   "PROMPT is token ids (2,17,...); also show the generated ones");
  command.add_flag("--ignore-eos", options->ignore_eos, "Go on after an end-of-sequence token");
  command.add_flag_callback(
      "--no-stream", [&stream = options->stream] { stream = false; }, "Wait for the whole answer");
  command.add_flag("--json", options->json, "One JSON object for each message of the answer");
  command.callback([options, &console, interrupt, &exit_status] {
    exit_status = RunGenerate(*options, console, interrupt);
  });
}

}  // namespace firesteel::client
