#include "server/metrics_endpoint.h"

#include <CivetServer.h>
#include <netinet/in.h>
#include <prometheus/metric_family.h>
#include <prometheus/text_serializer.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <thread>
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

// Connects to a port of this machine, to no avail.
void Knock(int port) {
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  to.sin_port = htons(static_cast<uint16_t>(port));
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) return;
  // Nobody waits for the outcome; where another interface is listened on, stopping just takes its
  // time.
  static_cast<void>(connect(fd, reinterpret_cast<const sockaddr*>(&to), sizeof(to)) == 0);
  close(fd);
}

class CivetEndpoint final : public MetricsEndpoint {
 public:
  CivetEndpoint(const std::vector<std::string>& options, Sources sources)
      : handler_(std::move(sources)), server_(options) {
    server_.addHandler("/metrics", handler_);
  }

  // Civetweb looks at its flag to stop only every two seconds, or when somebody connects: so
  // somebody does.
  ~CivetEndpoint() override {
    const int own_port = port();
    std::atomic<bool> closed{false};
    std::thread closing([this, &closed] {
      server_.close();
      closed.store(true);
    });
    while (!closed.load()) {
      Knock(own_port);
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    closing.join();
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
