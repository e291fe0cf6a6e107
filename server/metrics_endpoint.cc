#include "server/metrics_endpoint.h"

#include <CivetServer.h>
#include <prometheus/metric_family.h>
#include <prometheus/text_serializer.h>

#include <exception>
#include <utility>

#include "absl/strings/str_cat.h"

namespace firesteel::server {
namespace {

using Sources = std::vector<std::shared_ptr<const prometheus::Collectable>>;

class Handler final : public CivetHandler {
 public:
  explicit Handler(Sources sources) : sources_(std::move(sources)) {}

  bool handleGet(CivetServer*, mg_connection* connection) override {
    std::string body;
    try {
      body = ExpositionText(sources_);
    } catch (const std::exception&) {
      mg_send_http_error(connection, 500, "metrics could not be collected");
      return true;
    }
    mg_printf(connection,
              "HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
              "Content-Length: %zu\r\nConnection: close\r\n\r\n",
              body.size());
    mg_write(connection, body.data(), body.size());
    return true;
  }

 private:
  const Sources sources_;
};

class CivetEndpoint final : public MetricsEndpoint {
 public:
  CivetEndpoint(const std::vector<std::string>& options, Sources sources)
      : handler_(std::move(sources)), server_(options) {
    server_.addHandler("/metrics", handler_);
  }

  int port() const override { return const_cast<CivetServer&>(server_).getListeningPorts().at(0); }

 private:
  Handler handler_;
  CivetServer server_;  // after the handler, so that it stops first
};

}  // namespace

std::string ExpositionText(const Sources& sources) {
  std::vector<prometheus::MetricFamily> families;
  for (const auto& source : sources) {
    for (auto& family : source->Collect()) families.push_back(std::move(family));
  }
  return prometheus::TextSerializer().Serialize(families);
}

absl::StatusOr<std::unique_ptr<MetricsEndpoint>> MetricsEndpoint::Start(const std::string& address,
                                                                        Sources sources) {
  // Few threads and a short patience: a scrape is small, and a client that dawdles may not hold the
  // next one up.
  const std::vector<std::string> options = {"listening_ports",    address, "num_threads", "4",
                                            "request_timeout_ms", "5000"};
  try {
    return std::make_unique<CivetEndpoint>(options, std::move(sources));
  } catch (const std::exception&) {
    return absl::UnavailableError(
        absl::StrCat("--metrics-address: cannot listen on ", address, " (in use, or not ours)"));
  }
}

}  // namespace firesteel::server
