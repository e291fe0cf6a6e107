#include "tools/client/connection.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/security/credentials.h"
#include "grpcpp/support/channel_arguments.h"

namespace firesteel::client {
namespace {

// Answers grow with max_tokens and logprobs; gRPC's own limit of 4 MiB would cut long ones off.
constexpr int kMaxReceiveBytes = 64 << 20;

}  // namespace

void AddConnectionOptions(CLI::App& command, ConnectionOptions& options) {
  command.add_option("--address", options.address, "HOST:PORT of the server")
      ->capture_default_str();
  command
      .add_option_function<std::string>(
          "--deadline",
          [&options](const std::string& text) {
            absl::Duration deadline;
            if (!absl::ParseDuration(text, &deadline) || deadline <= absl::ZeroDuration()) {
              throw CLI::ValidationError(
                  "--deadline", absl::StrCat("'", text, "' is no positive duration; e.g. 30s, 2m"));
            }
            options.deadline = deadline;
          },
          "Give up after this long, e.g. 500ms, 30s, 2m")
      ->type_name("DURATION");
  command.add_option("--request-id", options.request_id,
                     "Id of the request in the server's log (default: made up by the server)");
}

std::shared_ptr<grpc::Channel> Connect(const ConnectionOptions& options) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMaxReceiveBytes);
  arguments.SetUserAgentPrefix("firesteel-client");
  return grpc::CreateCustomChannel(options.address, grpc::InsecureChannelCredentials(), arguments);
}

void PrepareCall(const ConnectionOptions& options, grpc::ClientContext& context) {
  if (options.deadline != absl::InfiniteDuration()) {
    context.set_deadline(absl::ToChronoTime(absl::Now() + options.deadline));
  }
  if (!options.request_id.empty()) context.AddMetadata("x-request-id", options.request_id);
}

}  // namespace firesteel::client
