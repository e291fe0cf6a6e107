#include "tools/client/info.h"

#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "firesteel/v1/model_service.grpc.pb.h"
#include "grpcpp/client_context.h"
#include "tools/client/format.h"
#include "tools/client/rpc_error.h"

namespace firesteel::client {
namespace {

// Calls one method; prints the error where it fails.
template <typename Request, typename Response>
bool Call(v1::ModelService::Stub& stub,
          grpc::Status (v1::ModelService::Stub::*method)(grpc::ClientContext*, const Request&,
                                                         Response*),
          const Request& request, const InfoOptions& options, Interrupt* interrupt,
          Console& console, Response& response) {
  grpc::ClientContext context;
  PrepareCall(options.connection, context);
  const Interrupt::Scope scope(interrupt, &context);
  const grpc::Status status = (stub.*method)(&context, request, &response);
  if (!status.ok()) console.err << FormatError(status, context);
  return status.ok();
}

absl::StatusOr<std::string> InfoJson(const v1::GetServerInfoResponse& server,
                                     const std::vector<v1::ModelInfo>& models) {
  absl::StatusOr<std::string> server_json = ToJson(server);
  if (!server_json.ok()) return server_json;
  std::vector<std::string> model_jsons;
  for (const v1::ModelInfo& model : models) {
    absl::StatusOr<std::string> json = ToJson(model);
    if (!json.ok()) return json;
    model_jsons.push_back(*std::move(json));
  }
  return absl::StrCat("{\"server\":", *server_json, ",\"models\":[",
                      absl::StrJoin(model_jsons, ","), "]}");
}

}  // namespace

int RunInfo(const InfoOptions& options, Console& console, Interrupt* interrupt) {
  const auto stub = v1::ModelService::NewStub(Connect(options.connection));
  v1::GetServerInfoResponse server;
  if (!Call(*stub, &v1::ModelService::Stub::GetServerInfo, v1::GetServerInfoRequest(), options,
            interrupt, console, server)) {
    return kFailed;
  }

  std::vector<v1::ModelInfo> models;
  if (options.model.empty()) {
    v1::ListModelsResponse all;
    if (!Call(*stub, &v1::ModelService::Stub::ListModels, v1::ListModelsRequest(), options,
              interrupt, console, all)) {
      return kFailed;
    }
    models.assign(all.models().begin(), all.models().end());
  } else {
    v1::GetModelRequest request;
    request.set_model(options.model);
    v1::GetModelResponse one;
    if (!Call(*stub, &v1::ModelService::Stub::GetModel, request, options, interrupt, console,
              one)) {
      return kFailed;
    }
    models.push_back(one.model());
  }

  if (options.json) {
    const absl::StatusOr<std::string> json = InfoJson(server, models);
    if (!json.ok()) {
      console.err << "error: " << json.status().message() << "\n";
      return kFailed;
    }
    console.out << *json << std::endl;
    return kSucceeded;
  }
  console.out << FormatServerInfo(server);
  for (const v1::ModelInfo& model : models) console.out << "\n" << FormatModel(model);
  console.out << std::flush;
  return kSucceeded;
}

void AddInfoCommand(CLI::App& app, Console& console, Interrupt* interrupt, int& exit_status) {
  auto options = std::make_shared<InfoOptions>();  // lives in the callback
  options->connection.deadline = absl::Seconds(10);
  CLI::App& command = *app.add_subcommand("info", "Show the server and its models");
  AddConnectionOptions(command, options->connection);
  command.add_option("--model", options->model, "Only this model (default: all)");
  command.add_flag("--json", options->json, "One JSON object");
  command.callback([options, &console, interrupt, &exit_status] {
    exit_status = RunInfo(*options, console, interrupt);
  });
}

}  // namespace firesteel::client
