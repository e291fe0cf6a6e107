// The whole server but for its process: gRPC, metrics endpoint, health, and the order in which they
// start and stop.

#ifndef FIRESTEEL_SERVER_SERVER_H_
#define FIRESTEEL_SERVER_SERVER_H_

#include <grpcpp/server.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/delivery_thread.h"
#include "server/generation_service.h"
#include "server/grpc_metrics.h"
#include "server/health.h"
#include "server/kserve_service.h"
#include "server/live_calls.h"
#include "server/metrics.h"
#include "server/metrics_endpoint.h"
#include "server/model_registry.h"
#include "server/model_service.h"
#include "server/unknown_method.h"

namespace firesteel::server {

struct ServerConfig {
  std::string address = "127.0.0.1:0";          // HOST:PORT; port 0 picks a free one
  std::string metrics_address = "127.0.0.1:0";  // the same
  uint64_t max_message_bytes = 4u << 20;
  absl::Duration stall = absl::Seconds(30);
  bool reflection = true;
  // What GetServerInfo tells.
  std::string simd_target;
  std::vector<std::string> available_simd_targets;
  uint32_t threads = 1;
};

/// A running server. Thread-safe, but for Stop, which one thread calls.
class Server {
 public:
  /// Listens and serves. `models` has at least one. Unavailable, naming the option, where an
  /// address can't be had.
  static absl::StatusOr<std::unique_ptr<Server>> Start(const ServerConfig& config,
                                                       std::unique_ptr<ServerMetrics> metrics,
                                                       std::unique_ptr<ModelRegistry> models);
  /// Stops at once, if Stop was not called.
  ~Server();
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  /// HOST:PORT with the real port.
  const std::string& address() const { return address_; }
  const std::string& metrics_address() const { return metrics_address_; }

  /// Health turns NOT_SERVING, new generations are refused with UNAVAILABLE, running ones go on
  /// until they finish or `deadline` passes; then those are cancelled, and everything stops. True
  /// if nothing had to be cancelled.
  bool Stop(absl::Time deadline);

  HealthMonitor& health() { return *health_; }

 private:
  Server(const ServerConfig& config, std::unique_ptr<ServerMetrics> metrics,
         std::unique_ptr<ModelRegistry> models);
  CallServices Services();
  absl::Status Listen(const ServerConfig& config);

  // In the order of their making; what is below uses what is above.
  const std::unique_ptr<ServerMetrics> metrics_;
  GrpcMetrics grpc_metrics_;
  const std::unique_ptr<ModelRegistry> models_;
  LiveCalls live_calls_;
  DeliveryThread delivery_;
  std::unique_ptr<HealthMonitor> health_;
  GenerationService generation_service_;
  ModelService model_service_;
  KserveService kserve_service_;
  UnknownMethodService unknown_method_service_;
  std::unique_ptr<MetricsEndpoint> metrics_endpoint_;
  std::unique_ptr<grpc::Server> grpc_;
  std::string address_;
  std::string metrics_address_;
  bool stopped_ = false;
};

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_SERVER_H_
