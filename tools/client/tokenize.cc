#include "tools/client/tokenize.h"

#include <cmath>
#include <memory>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "firesteel/v1/generation_service.grpc.pb.h"
#include "grpcpp/client_context.h"
#include "tools/client/format.h"
#include "tools/client/prompt.h"
#include "tools/client/rpc_error.h"

namespace firesteel::client {
namespace {

using Stub = v1::GenerationService::Stub;

int Fail(Console& console, const absl::Status& status, ExitStatus exit_status) {
  console.err << "error: " << status.message() << "\n";
  return exit_status;
}

// Calls one method; prints the error where it fails.
template <typename Request, typename Response>
bool Call(grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*),
          const Request& request, const TextOptions& options, Interrupt* interrupt,
          Console& console, Response& response) {
  const auto stub = v1::GenerationService::NewStub(Connect(options.connection));
  grpc::ClientContext context;
  PrepareCall(options.connection, context);
  const Interrupt::Scope scope(interrupt, &context);
  const grpc::Status status = (stub.get()->*method)(&context, request, &response);
  if (!status.ok()) console.err << FormatError(status, context);
  return status.ok();
}

int ShowJson(const google::protobuf::Message& message, Console& console) {
  const auto json = ToJson(message);
  if (!json.ok()) return Fail(console, json.status(), kFailed);
  console.out << *json << std::endl;
  return kSucceeded;
}

// A token's text on one line, its spaces visible.
std::string Quoted(const std::string& text) {
  return absl::StrCat("\"", absl::Utf8SafeCEscape(text), "\"");
}

int Detokenize(const TextOptions& options, const std::string& text, Console& console,
               Interrupt* interrupt) {
  const auto ids = ParseTokenIds(text);
  if (!ids.ok()) return Fail(console, ids.status(), kUsage);
  v1::DetokenizeRequest request;
  request.set_model(options.model);
  request.mutable_token_ids()->Assign(ids->begin(), ids->end());
  v1::DetokenizeResponse response;
  if (!Call(&Stub::Detokenize, request, options, interrupt, console, response)) return kFailed;
  if (options.json) return ShowJson(response, console);
  console.out << (console.out_is_terminal ? VisibleText(response.text()) : response.text())
              << std::endl;
  return kSucceeded;
}

}  // namespace

int RunTokenize(const TextOptions& options, Console& console, Interrupt* interrupt) {
  const std::string text = ReadPrompt(options.text, console);
  if (options.token_ids) return Detokenize(options, text, console, interrupt);
  v1::TokenizeRequest request;
  request.set_model(options.model);
  request.set_text(text);
  request.set_add_bos(!options.no_bos);
  v1::TokenizeResponse response;
  if (!Call(&Stub::Tokenize, request, options, interrupt, console, response)) return kFailed;
  if (options.json) return ShowJson(response, console);
  for (const v1::Token& token : response.tokens()) {
    console.out << absl::StrFormat("%8d  %s\n", token.token_id(), Quoted(token.text()));
  }
  console.out << std::flush;
  console.err << "[" << response.tokens_size() << " tokens]" << std::endl;
  return kSucceeded;
}

int RunScore(const TextOptions& options, Console& console, Interrupt* interrupt) {
  const std::string text = ReadPrompt(options.text, console);
  v1::ScoreRequest request;
  request.set_model(options.model);
  if (options.token_ids) {
    const auto ids = ParseTokenIds(text);
    if (!ids.ok()) return Fail(console, ids.status(), kUsage);
    request.mutable_token_ids()->mutable_ids()->Assign(ids->begin(), ids->end());
  } else {
    request.set_prompt(text);
  }
  v1::ScoreResponse response;
  if (!Call(&Stub::Score, request, options, interrupt, console, response)) return kFailed;
  if (options.json) return ShowJson(response, console);
  double sum = 0;
  int scored = 0;
  for (const v1::ScoredToken& token : response.tokens()) {
    if (token.has_logprob()) {
      sum += token.logprob();
      ++scored;
    }
    console.out << absl::StrFormat(
        "%8d  %10s  %s\n", token.token_id(),
        token.has_logprob() ? absl::StrFormat("%.4f", token.logprob()) : "-", Quoted(token.text()));
  }
  console.out << std::flush;
  console.err << absl::StrFormat("[%d tokens, log-likelihood %.4f", scored, sum);
  if (scored > 0) console.err << absl::StrFormat(", perplexity %.4f", std::exp(-sum / scored));
  console.err << "]" << std::endl;
  return kSucceeded;
}

namespace {

CLI::App& AddTextCommand(CLI::App& app, const char* name, const char* help, TextOptions& options) {
  options.connection.deadline = absl::Seconds(60);
  CLI::App& command = *app.add_subcommand(name, help);
  AddConnectionOptions(command, options.connection);
  command.add_option("TEXT", options.text, "The text; '-' reads it from standard input")
      ->required();
  command.add_option("--model", options.model, "Name of the model (default: the server's first)");
  command.add_flag("--token-ids", options.token_ids, "TEXT is token ids (2,17,...)");
  command.add_flag("--json", options.json, "One JSON object");
  return command;
}

}  // namespace

void AddTokenizeCommand(CLI::App& app, Console& console, Interrupt* interrupt, int& exit_status) {
  auto options = std::make_shared<TextOptions>();  // lives in the callback
  CLI::App& command = AddTextCommand(
      app, "tokenize", "Show the tokens of a text, or the text of tokens (--token-ids)", *options);
  command.add_flag("--no-bos", options->no_bos, "Without the token that begins a prompt");
  command.callback([options, &console, interrupt, &exit_status] {
    exit_status = RunTokenize(*options, console, interrupt);
  });
}

void AddScoreCommand(CLI::App& app, Console& console, Interrupt* interrupt, int& exit_status) {
  auto options = std::make_shared<TextOptions>();  // lives in the callback
  CLI::App& command = AddTextCommand(
      app, "score", "Show how likely a model finds a text, token by token", *options);
  command.callback([options, &console, interrupt, &exit_status] {
    exit_status = RunScore(*options, console, interrupt);
  });
}

}  // namespace firesteel::client
