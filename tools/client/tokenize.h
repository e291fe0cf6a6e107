// `firesteel tokenize` and `firesteel score`: a text in a model's own terms.

#ifndef FIRESTEEL_TOOLS_CLIENT_TOKENIZE_H_
#define FIRESTEEL_TOOLS_CLIENT_TOKENIZE_H_

#include <string>

#include "CLI/CLI.hpp"
#include "tools/client/connection.h"
#include "tools/client/console.h"
#include "tools/client/interrupt.h"

namespace firesteel::client {

/// What the command line says.
struct TextOptions {
  ConnectionOptions connection;
  std::string text;  // "-": read from standard input, to its end
  std::string model;
  bool token_ids = false;  // the text is token ids
  bool no_bos = false;     // tokenize only
  bool json = false;
};

/// Add the commands; their callbacks store the exit status. All references outlive the parse.
void AddTokenizeCommand(CLI::App& app, Console& console, Interrupt* interrupt, int& exit_status);
void AddScoreCommand(CLI::App& app, Console& console, Interrupt* interrupt, int& exit_status);

/// Shows the tokens of a text, one a line, or the text of token ids. Returns the exit status.
int RunTokenize(const TextOptions& options, Console& console, Interrupt* interrupt);

/// Shows each token's log-probability, then their sum and the perplexity. Returns the exit status.
int RunScore(const TextOptions& options, Console& console, Interrupt* interrupt);

}  // namespace firesteel::client

#endif  // FIRESTEEL_TOOLS_CLIENT_TOKENIZE_H_
