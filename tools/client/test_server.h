// A server of scripted services in the test's own process, and the client's command line against
// it.

#ifndef FIRESTEEL_TOOLS_CLIENT_TEST_SERVER_H_
#define FIRESTEEL_TOOLS_CLIENT_TEST_SERVER_H_

#include <algorithm>
#include <functional>
#include <initializer_list>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "grpcpp/health_check_service_interface.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"
#include "tools/client/console.h"

namespace firesteel::client {

/// Serves on a free port of the loopback, gRPC's health service included, until it goes.
class TestServer {
 public:
  /// `services` outlive it.
  TestServer(std::initializer_list<grpc::Service*> services,
             const std::shared_ptr<grpc::ServerCredentials>& credentials =
                 grpc::InsecureServerCredentials()) {
    grpc::EnableDefaultHealthCheckService(true);
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", credentials, &port);
    for (grpc::Service* const service : services) builder.RegisterService(service);
    server_ = builder.BuildAndStart();
    address_ = absl::StrCat("127.0.0.1:", port);
  }
  ~TestServer() { server_->Shutdown(); }
  TestServer(const TestServer&) = delete;
  TestServer& operator=(const TestServer&) = delete;

  grpc::Server* operator->() const { return server_.get(); }
  const std::string& address() const { return address_; }

 private:
  std::unique_ptr<grpc::Server> server_;
  std::string address_;
};

/// The terminal of a command line.
struct TestConsole {
  std::istringstream in;
  std::ostringstream out, err;

  /// Runs the program's arguments, without its name and with --address behind the command's name.
  /// `add_commands` adds what there is to run.
  int Run(const TestServer& server, std::vector<std::string> arguments,
          const std::function<void(CLI::App&, Console&, int& exit_status)>& add_commands) {
    arguments.insert(arguments.begin() + 1, {"--address", server.address()});
    std::reverse(arguments.begin(), arguments.end());  // as CLI11 wants a vector
    Console console{in, out, err};
    int exit_status = -1;
    CLI::App app;
    app.require_subcommand(1);
    add_commands(app, console, exit_status);
    try {
      app.parse(arguments);
    } catch (const CLI::ParseError& error) {
      err << error.what();
      return kUsage;
    }
    return exit_status;
  }
};

}  // namespace firesteel::client

#endif  // FIRESTEEL_TOOLS_CLIENT_TEST_SERVER_H_
