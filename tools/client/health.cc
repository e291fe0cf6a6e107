#include "tools/client/health.h"

#include <memory>

#include "absl/time/time.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "grpcpp/client_context.h"
#include "tools/client/rpc_error.h"

namespace firesteel::client {

int RunHealth(const HealthOptions& options, Console& console, Interrupt* interrupt) {
  using grpc::health::v1::HealthCheckResponse;
  const auto stub = grpc::health::v1::Health::NewStub(Connect(options.connection));
  grpc::ClientContext context;
  PrepareCall(options.connection, context);
  const Interrupt::Scope scope(interrupt, &context);
  grpc::health::v1::HealthCheckRequest request;
  request.set_service(options.service);
  HealthCheckResponse response;
  const grpc::Status status = stub->Check(&context, request, &response);
  if (!status.ok()) {
    console.err << FormatError(status, context) << std::flush;
    return kFailed;
  }
  const std::string name = HealthCheckResponse::ServingStatus_Name(response.status());
  console.out << (name.empty() ? "UNKNOWN" : name) << std::endl;
  return response.status() == HealthCheckResponse::SERVING ? kSucceeded : kFailed;
}

void AddHealthCommand(CLI::App& app, Console& console, Interrupt* interrupt, int& exit_status) {
  auto options = std::make_shared<HealthOptions>();  // lives in the callback
  options->connection.deadline = absl::Seconds(5);
  CLI::App& command = *app.add_subcommand(
      "health", "Print the health of the server; exit status 0 only where it is SERVING");
  AddConnectionOptions(command, options->connection);
  command.add_option("--service", options->service,
                     "Name of a service or a model (default: the whole server)");
  command.callback([options, &console, interrupt, &exit_status] {
    exit_status = RunHealth(*options, console, interrupt);
  });
}

}  // namespace firesteel::client
