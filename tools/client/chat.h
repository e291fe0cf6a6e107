// `firesteel chat`: a conversation, one line at a time.

#ifndef FIRESTEEL_TOOLS_CLIENT_CHAT_H_
#define FIRESTEEL_TOOLS_CLIENT_CHAT_H_

#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "tools/client/connection.h"
#include "tools/client/console.h"
#include "tools/client/generate.h"
#include "tools/client/interrupt.h"

namespace firesteel::client {

/// How a conversation becomes a prompt.
enum class ChatTemplate { kPlain, kGemma };

/// What the command line says.
struct ChatOptions {
  GenerateOptions generate;  // the prompt is made anew for each turn
  ChatTemplate chat_template = ChatTemplate::kPlain;
  std::string system;  // said once, before the first turn; may be empty
};

/// One thing said by the user, and the answer; empty where it is still to come.
struct ChatTurn {
  std::string user;
  std::string model;
};

/// The prompt that asks for the last turn's answer.
std::string ChatPrompt(ChatTemplate chat_template, const std::string& system,
                       const std::vector<ChatTurn>& turns);

/// The text at which an answer ends.
std::string ChatStop(ChatTemplate chat_template);

/// Adds the command; its callback stores the exit status. All references outlive the parse.
void AddChatCommand(CLI::App& app, Console& console, Interrupt* interrupt, int& exit_status);

/// Answers each line of standard input until its end; what is said before is a part of the prompt.
/// A refused turn is shown and forgotten. Returns the exit status.
int RunChat(const ChatOptions& options, Console& console, Interrupt* interrupt);

}  // namespace firesteel::client

#endif  // FIRESTEEL_TOOLS_CLIENT_CHAT_H_
