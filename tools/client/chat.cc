#include "tools/client/chat.h"

#include <istream>
#include <map>
#include <memory>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "firesteel/v1/generation_service.grpc.pb.h"
#include "grpcpp/client_context.h"
#include "tools/client/format.h"
#include "tools/client/rpc_error.h"

namespace firesteel::client {
namespace {

/// What stands around what is said.
struct Marks {
  const char* user_begin;
  const char* user_end;
  const char* model_begin;
  const char* model_end;
};

const Marks& MarksOf(ChatTemplate chat_template) {
  static constexpr Marks kPlain = {"User: ", "\n", "Assistant:", "\n"};
  static constexpr Marks kGemma = {"<start_of_turn>user\n", "<end_of_turn>\n",
                                   "<start_of_turn>model\n", "<end_of_turn>\n"};
  return chat_template == ChatTemplate::kGemma ? kGemma : kPlain;
}

// Streams one answer to the console; its text where it came to an end.
bool Answer(v1::GenerationService::Stub& stub, const ConnectionOptions& connection,
            const v1::GenerateRequest& request, Console& console, Interrupt* interrupt,
            std::string& text) {
  grpc::ClientContext context;
  PrepareCall(connection, context);
  const Interrupt::Scope scope(interrupt, &context);
  const auto reader = stub.GenerateStream(&context, request);
  v1::GenerateStreamResponse message;
  while (reader->Read(&message)) {
    const std::string& part = message.sequence().text();
    text += part;
    console.out << (console.out_is_terminal ? VisibleText(part) : part) << std::flush;
  }
  const grpc::Status status = reader->Finish();
  console.out << std::endl;
  if (!status.ok()) console.err << FormatError(status, context) << std::flush;
  return status.ok();
}

}  // namespace

std::string ChatPrompt(ChatTemplate chat_template, const std::string& system,
                       const std::vector<ChatTurn>& turns) {
  const Marks& marks = MarksOf(chat_template);
  std::string prompt;
  for (size_t i = 0; i < turns.size(); ++i) {
    absl::StrAppend(&prompt, marks.user_begin);
    // Neither template has a place of its own for it.
    if (i == 0 && !system.empty()) absl::StrAppend(&prompt, system, "\n");
    absl::StrAppend(&prompt, turns[i].user, marks.user_end, marks.model_begin);
    if (i + 1 < turns.size()) absl::StrAppend(&prompt, turns[i].model, marks.model_end);
  }
  return prompt;
}

std::string ChatStop(ChatTemplate chat_template) {
  return chat_template == ChatTemplate::kGemma ? "<end_of_turn>" : "\nUser:";
}

int RunChat(const ChatOptions& options, Console& console, Interrupt* interrupt) {
  const auto stub = v1::GenerationService::NewStub(Connect(options.generate.connection));
  std::vector<ChatTurn> turns;
  int exit_status = kSucceeded;
  while (true) {
    if (console.out_is_terminal) console.out << "> " << std::flush;
    std::string line;
    if (!std::getline(console.in, line)) return exit_status;
    if (absl::StripAsciiWhitespace(line).empty()) continue;
    turns.push_back({.user = line, .model = ""});
    auto request =
        BuildRequest(options.generate, ChatPrompt(options.chat_template, options.system, turns));
    request->mutable_stopping()->add_stop(ChatStop(options.chat_template));
    exit_status = kSucceeded;
    if (!Answer(*stub, options.generate.connection, *request, console, interrupt,
                turns.back().model)) {
      turns.pop_back();
      if (interrupt != nullptr && interrupt->raised()) return kInterrupted;
      exit_status = kFailed;
    }
  }
}

void AddChatCommand(CLI::App& app, Console& console, Interrupt* interrupt, int& exit_status) {
  auto options = std::make_shared<ChatOptions>();  // lives in the callback
  CLI::App& command =
      *app.add_subcommand("chat", "Answer each line of standard input, remembering what was said");
  AddConnectionOptions(command, options->generate.connection);
  AddSamplingOptions(command, options->generate);
  command.add_option("--system", options->system, "Said to the model before the first line");
  static const std::map<std::string, ChatTemplate> kTemplates = {{"plain", ChatTemplate::kPlain},
                                                                 {"gemma", ChatTemplate::kGemma}};
  command
      .add_option("--template", options->chat_template,
                  "How turns are marked: plain (User: … Assistant: …) or gemma (<start_of_turn>)")
      ->transform(CLI::CheckedTransformer(kTemplates));
  command.callback([options, &console, interrupt, &exit_status] {
    exit_status = RunChat(*options, console, interrupt);
  });
}

}  // namespace firesteel::client
