// What every command needs to reach a server: the options, the channel and the context of a call.

#ifndef FIRESTEEL_TOOLS_CLIENT_CONNECTION_H_
#define FIRESTEEL_TOOLS_CLIENT_CONNECTION_H_

#include <memory>
#include <string>

#include "CLI/CLI.hpp"
#include "absl/time/time.h"
#include "grpcpp/channel.h"
#include "grpcpp/client_context.h"

namespace firesteel::client {

/// How to reach the server, and how long to wait for it.
struct ConnectionOptions {
  std::string address = "127.0.0.1:50051";  // HOST:PORT
  absl::Duration deadline = absl::InfiniteDuration();
  std::string request_id;  // x-request-id; empty: the server makes one up
  bool tls = false;
  // Contents of PEM files. Without an authority the system's own are trusted.
  std::string tls_ca;
  std::string tls_cert;
  std::string tls_key;
  std::string token;  // sent as a bearer token; empty: none
};

/// Adds --address, --deadline, --request-id, TLS and --token-file to a command; `options` holds the
/// defaults and outlives the parse. Files are read by the parse, which fails where one can't be.
void AddConnectionOptions(CLI::App& command, ConnectionOptions& options);

/// A channel to the server. Does not wait: a server that is not there fails the call.
std::shared_ptr<grpc::Channel> Connect(const ConnectionOptions& options);

/// Sets the deadline and the metadata of one call, counted from now.
void PrepareCall(const ConnectionOptions& options, grpc::ClientContext& context);

}  // namespace firesteel::client

#endif  // FIRESTEEL_TOOLS_CLIENT_CONNECTION_H_
