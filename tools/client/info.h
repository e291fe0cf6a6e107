// `firesteel info`: what the server is and which models it has.

#ifndef FIRESTEEL_TOOLS_CLIENT_INFO_H_
#define FIRESTEEL_TOOLS_CLIENT_INFO_H_

#include <string>

#include "CLI/CLI.hpp"
#include "tools/client/connection.h"
#include "tools/client/console.h"
#include "tools/client/interrupt.h"

namespace firesteel::client {

struct InfoOptions {
  ConnectionOptions connection;
  std::string model;  // empty: all
  bool json = false;
};

/// Adds the command; its callback stores the exit status. All references outlive the parse.
void AddInfoCommand(CLI::App& app, Console& console, Interrupt* interrupt, int& exit_status);

/// Shows the server and one or all models on `out`, as text or as one JSON object {"server": …,
/// "models": […]}. Returns the exit status.
int RunInfo(const InfoOptions& options, Console& console, Interrupt* interrupt);

}  // namespace firesteel::client

#endif  // FIRESTEEL_TOOLS_CLIENT_INFO_H_
