#include "tools/client/generate.h"

#include <iterator>
#include <memory>

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
#include "tools/client/rpc_error.h"

namespace firesteel::client {
namespace {

absl::StatusOr<std::vector<uint32_t>> ParseTokenIds(const std::string& text) {
  std::vector<uint32_t> ids;
  for (absl::string_view part :
       absl::StrSplit(text, absl::ByAnyChar(", \t\n"), absl::SkipEmpty())) {
    uint32_t id = 0;
    if (!absl::SimpleAtoi(part, &id)) {
      return absl::InvalidArgumentError(
          absl::StrCat("--token-ids: '", part, "' is no token id (a whole number from 0 on)"));
    }
    ids.push_back(id);
  }
  return ids;
}

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
    for (const v1::Sequence& sequence : response.sequences()) ShowSequence(sequence);
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
    console_.err << FormatSummary(usage, timings, sparsity, last, first_text_) << std::endl;
  }

  const GenerateOptions& options_;
  Console& console_;
  const absl::Time start_;
  absl::Duration first_text_ = absl::InfiniteDuration();
  std::vector<uint32_t> token_ids_;
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
  if (options.seed) sampling.set_seed(*options.seed);
  v1::StoppingCriteria& stopping = *request.mutable_stopping();
  for (const std::string& stop : options.stop) stopping.add_stop(stop);
  stopping.set_ignore_eos(options.ignore_eos);
  return request;
}

int RunGenerate(const GenerateOptions& options, Console& console, Interrupt* interrupt) {
  std::string prompt = options.prompt;
  if (prompt == "-") {
    prompt.assign(std::istreambuf_iterator<char>(console.in), std::istreambuf_iterator<char>());
  }
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
  if (options.stream) {
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

void AddGenerateCommand(CLI::App& app, Console& console, Interrupt* interrupt, int& exit_status) {
  auto options = std::make_shared<GenerateOptions>();  // lives in the callback
  CLI::App& command = *app.add_subcommand("generate", "Generate text, shown as it comes");
  AddConnectionOptions(command, options->connection);
  command
      .add_option("PROMPT", options->prompt, "Text to continue; '-' reads it from standard input")
      ->required();
  command.add_option("--model", options->model, "Name of the model (default: the server's first)");
  command.add_option("--max-tokens", options->max_tokens, "Most tokens to generate");
  command.add_option("--temperature", options->temperature, "0: always the most probable token");
  command.add_option("--top-k", options->top_k, "Keep the K most probable tokens; 0: all");
  command.add_option("--top-p", options->top_p, "Keep the likeliest tokens up to this probability");
  command.add_option("--min-p", options->min_p, "Keep tokens of this fraction of the best one's");
  command.add_option("--seed", options->seed, "Makes the draw repeatable");
  command.add_option("--stop", options->stop, "End before this text (repeatable)")
      ->allow_extra_args(false);
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
