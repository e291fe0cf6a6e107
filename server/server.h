// The whole server but for its process: gRPC, metrics endpoint, health, and the order in which they
// start and stop.

#ifndef FIRESTEEL_SERVER_SERVER_H_
#define FIRESTEEL_SERVER_SERVER_H_

#include <grpcpp/server.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "server/access_control.h"
#include "server/admin_service.h"
#include "server/delivery_thread.h"
#include "server/generation_service.h"
#include "server/grpc_metrics.h"
#include "server/health.h"
#include "server/kserve_service.h"
#include "server/live_calls.h"
#include "server/load_report.h"
#include "server/metrics.h"
#include "server/metrics_endpoint.h"
#include "server/model_manager.h"
#include "server/model_registry.h"
#include "server/model_service.h"
#include "server/periodic_thread.h"
#include "server/tls.h"
#include "server/unknown_method.h"

namespace firesteel::server {

/// When a connection counts as dead, and how often clients may ask whether it is. Nothing here ends
/// a stream for being long or quiet.
struct KeepaliveLimits {
  /// A client of which nothing was heard for so long is asked …
  absl::Duration time = absl::Minutes(1);
  /// … and given up when it does not answer for so long.
  absl::Duration timeout = absl::Seconds(20);
  /// Clients may ask as often as this, with and without calls.
  absl::Duration min_client_ping = absl::Seconds(10);
};

struct ServerConfig {
  std::string address = "127.0.0.1:0";          // HOST:PORT; port 0 picks a free one
  std::string metrics_address = "127.0.0.1:0";  // the same
  std::string admin_address;                    // the same; empty: no AdminService
  std::string health_address;  // the same; empty: health is served at `address` only
  LoadFunction load_model;  // of AdminService and ReloadAll; outlives the server with what it uses
  absl::Duration drain = absl::Seconds(30);  // of models that are replaced
  uint64_t max_message_bytes = 4u << 20;
  absl::Duration stall = absl::Seconds(30);  // of an engine
  StallLimits reader_stall;                  // of a client
  bool reflection = true;
  /// Connections are closed when they are this old, once their calls have ended: so that clients
  /// find servers that were added.
  absl::Duration max_connection_age = absl::InfiniteDuration();
  KeepaliveLimits keepalive;
  /// gRPC's own view of connections and calls (channelz), on admin_address: it tells of every
  /// client's address, and asks nobody for a token.
  bool channelz = false;
  /// Waits between health's NOT_SERVING and the first refusal.
  std::function<void(absl::Duration)> wait = absl::SleepFor;
  TlsFiles tls;
  std::string auth_token_file;  // empty: no tokens
  /// How often certificates and tokens are looked at.
  absl::Duration credentials_reload = absl::Seconds(10);
  // What GetServerInfo tells.
  std::string simd_target;
  std::vector<std::string> available_simd_targets;
  uint32_t threads = 1;
};

/// A running server. Thread-safe, but for Stop, which one thread calls.
class Server {
 public:
  /// Listens and serves. `models` has at least one. Unavailable, naming the option, where an
  /// address can't be had; InvalidArgument, the same, where a file can't be used.
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
  /// Empty where there is no AdminService.
  const std::string& admin_address() const { return admin_address_; }
  /// Where health is served in clear text besides; empty where it is not.
  const std::string& health_address() const { return health_address_; }

  /// Health turns NOT_SERVING, and for `grace` nothing else happens, so that load balancers stop
  /// sending. Then new generations are refused with UNAVAILABLE, running ones go on until they
  /// finish or `drain` has passed; then those are cancelled, and everything stops. True if nothing
  /// had to be cancelled.
  bool Stop(absl::Duration grace, absl::Duration drain);

  /// Takes what has changed in the token file, and begins to load all models again.
  void Reload();

  HealthMonitor& health() { return *health_; }

 private:
  Server(const ServerConfig& config, std::unique_ptr<ServerMetrics> metrics,
         std::unique_ptr<ModelRegistry> models, std::unique_ptr<AccessControl> access);
  using Interceptors =
      std::vector<std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface>>;
  Interceptors MakeInterceptors();
  CallServices Services(const ServerConfig& config);
  absl::Status Listen(const ServerConfig& config);
  absl::Status ListenForAdmins(const ServerConfig& config,
                               const std::shared_ptr<grpc::ServerCredentials>& credentials);
  absl::Status ListenForProbes(const ServerConfig& config);

  const std::function<void(absl::Duration)> wait_;

  // In the order of their making; what is below uses what is above.
  const std::unique_ptr<ServerMetrics> metrics_;
  GrpcMetrics grpc_metrics_;
  const std::unique_ptr<ModelRegistry> models_;
  const std::unique_ptr<AccessControl> access_;
  LiveCalls live_calls_;
  DeliveryThread delivery_;
  std::unique_ptr<HealthMonitor> health_;
  LoadMonitor load_;
  GenerationService generation_service_;
  ModelService model_service_;
  KserveService kserve_service_;
  std::unique_ptr<ModelManager> manager_;
  std::unique_ptr<AdminService> admin_service_;
  UnknownMethodService unknown_method_service_;
  UnknownMethodService unknown_admin_method_service_;
  UnknownMethodService unknown_probe_method_service_;
  std::unique_ptr<MetricsEndpoint> metrics_endpoint_;
  std::unique_ptr<grpc::Server> grpc_;
  std::unique_ptr<grpc::Server> admin_grpc_;  // null where there is no AdminService
  std::unique_ptr<grpc::Server> probe_grpc_;  // null where there is no health_address
  std::unique_ptr<PeriodicThread> stall_watch_;
  std::string address_;
  std::string metrics_address_;
  std::string admin_address_;
  std::string health_address_;
  bool stopped_ = false;
};

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_SERVER_H_
