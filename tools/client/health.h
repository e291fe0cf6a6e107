// `firesteel health`: whether a server takes requests, as an exit status (a container's check).

#ifndef FIRESTEEL_TOOLS_CLIENT_HEALTH_H_
#define FIRESTEEL_TOOLS_CLIENT_HEALTH_H_

#include <cstdint>
#include <string>

#include "CLI/CLI.hpp"
#include "tools/client/connection.h"
#include "tools/client/console.h"
#include "tools/client/interrupt.h"

namespace firesteel::client {

struct HealthOptions {
  ConnectionOptions connection;
  std::string service;  // a service or a model; empty: the whole server
  uint32_t repeat = 1;  // more than once: over one connection, and how long the answers took
  absl::Duration interval = absl::Seconds(1);
  bool json = false;
};

/// Adds the command; its callback stores the exit status. All references outlive the parse.
void AddHealthCommand(CLI::App& app, Console& console, Interrupt* interrupt, int& exit_status);

/// Prints the status on `out`, of several times the last one, and the distribution of the answers'
/// latencies. kSucceeded only where it was SERVING every time.
int RunHealth(const HealthOptions& options, Console& console, Interrupt* interrupt);

}  // namespace firesteel::client

#endif  // FIRESTEEL_TOOLS_CLIENT_HEALTH_H_
