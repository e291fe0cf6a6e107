// `firesteel`, the client: one file a command.

#include <unistd.h>

#include <iostream>

#include "CLI/CLI.hpp"
#include "tools/client/chat.h"
#include "tools/client/console.h"
#include "tools/client/generate.h"
#include "tools/client/health.h"
#include "tools/client/info.h"
#include "tools/client/interrupt.h"
#include "tools/client/load.h"
#include "tools/client/tokenize.h"

int main(int argc, char** argv) {
  using namespace firesteel::client;  // NOLINT(google-build-using-namespace): only here
  Interrupt interrupt;                // first: gRPC's threads inherit its signal mask
  Console console{std::cin, std::cout, std::cerr, isatty(STDOUT_FILENO) == 1};
  int exit_status = kSucceeded;

  CLI::App app("Client of a firesteel-server", "firesteel");
  app.require_subcommand(1);
  app.set_version_flag("--version", FIRESTEEL_VERSION);
  AddGenerateCommand(app, console, &interrupt, exit_status);
  AddChatCommand(app, console, &interrupt, exit_status);
  AddTokenizeCommand(app, console, &interrupt, exit_status);
  AddScoreCommand(app, console, &interrupt, exit_status);
  AddInfoCommand(app, console, &interrupt, exit_status);
  AddHealthCommand(app, console, &interrupt, exit_status);
  AddLoadCommand(app, console, &interrupt, exit_status);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    // Prints help on standard output (status 0), and what is wrong on standard error.
    return app.exit(error) == 0 ? kSucceeded : kUsage;
  }
  return exit_status;
}
