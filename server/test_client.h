// What the tests of the running server share: details of errors, and an HTTP client for /metrics.

#ifndef FIRESTEEL_SERVER_TEST_CLIENT_H_
#define FIRESTEEL_SERVER_TEST_CLIENT_H_

#include <grpcpp/support/status.h>

#include <optional>
#include <string>

#include "google/rpc/status.pb.h"

namespace firesteel::server {

/// The detail of that type, if the status has one.
template <typename Message>
std::optional<Message> FindDetail(const grpc::Status& status) {
  google::rpc::Status details;
  if (!details.ParseFromString(status.error_details())) return std::nullopt;
  Message message;
  for (const auto& any : details.details()) {
    if (any.UnpackTo(&message)) return message;
  }
  return std::nullopt;
}

/// The whole answer to an HTTP/1.0 GET; empty where nobody answers. `address` is IPv4:PORT.
std::string HttpGet(const std::string& address, const std::string& path);

/// The value of a time series (with its labels, as /metrics writes them) in a scrape; nothing where
/// it is not there.
std::optional<double> MetricValue(const std::string& scrape, const std::string& series);

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_TEST_CLIENT_H_
