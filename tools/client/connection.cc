#include "tools/client/connection.h"

#include <fstream>
#include <iterator>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/security/credentials.h"
#include "grpcpp/support/channel_arguments.h"

namespace firesteel::client {
namespace {

// Answers grow with max_tokens and logprobs; gRPC's own limit of 4 MiB would cut long ones off.
constexpr int kMaxReceiveBytes = 64 << 20;

// An option whose file's content goes to `content`; the content never shows on a command line.
CLI::Option* AddFileOption(CLI::App& command, const std::string& name, std::string& content,
                           const std::string& help) {
  return command
      .add_option_function<std::string>(
          name,
          [name, &content](const std::string& path) {
            std::ifstream file(path);
            content.assign(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
            if (!file.is_open() || file.bad() || content.empty()) {
              throw CLI::ValidationError(name, absl::StrCat("'", path, "' can't be read"));
            }
          },
          help)
      ->type_name("FILE");
}

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
  command.add_flag("--tls", options.tls, "Speak TLS, trusting the system's authorities");
  AddFileOption(command, "--tls-ca", options.tls_ca, "Speak TLS, trusting this authority (PEM)");
  CLI::Option* const cert =
      AddFileOption(command, "--tls-cert", options.tls_cert, "Our certificate, in PEM");
  CLI::Option* const key = AddFileOption(command, "--tls-key", options.tls_key, "Its private key");
  cert->needs(key);
  key->needs(cert);
  AddFileOption(command, "--token-file", options.token, "A file that holds our bearer token")
      ->envname("FIRESTEEL_TOKEN_FILE");
}

std::shared_ptr<grpc::Channel> Connect(const ConnectionOptions& options) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMaxReceiveBytes);
  arguments.SetUserAgentPrefix("firesteel-client");
  const bool tls = options.tls || !options.tls_ca.empty() || !options.tls_cert.empty();
  const auto credentials = tls ? grpc::SslCredentials({.pem_root_certs = options.tls_ca,
                                                       .pem_private_key = options.tls_key,
                                                       .pem_cert_chain = options.tls_cert})
                               : grpc::InsecureChannelCredentials();
  return grpc::CreateCustomChannel(options.address, credentials, arguments);
}

void PrepareCall(const ConnectionOptions& options, grpc::ClientContext& context) {
  if (options.deadline != absl::InfiniteDuration()) {
    context.set_deadline(absl::ToChronoTime(absl::Now() + options.deadline));
  }
  const absl::string_view token = absl::StripAsciiWhitespace(options.token);
  if (!token.empty()) context.AddMetadata("authorization", absl::StrCat("Bearer ", token));
  if (!options.request_id.empty()) context.AddMetadata("x-request-id", options.request_id);
}

}  // namespace firesteel::client
