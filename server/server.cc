#include "server/server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/impl/server_builder_option.h>
#include <grpcpp/impl/server_builder_plugin.h>
#include <grpcpp/resource_quota.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server_builder.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "grpc/health/v1/health.pb.h"
#include "server/logging.h"
#include "server/options.h"
#include "server/parse_errors.h"
#include "server/process_metrics.h"

namespace firesteel::server {
namespace {

constexpr char kReflectionService[] = "grpc.reflection.v1alpha.ServerReflection";

// A dead client is noticed within about a minute and a half, also behind a load balancer; clients
// may ping as often as every ten seconds, with and without calls. Nothing here ends a stream for
// being long or quiet.
constexpr int kKeepaliveTimeMs = 60'000;
constexpr int kKeepaliveTimeoutMs = 20'000;
constexpr int kMinClientPingMs = 10'000;

// Reflection is served by gRPC's own synchronous threads, one for each open stream.
constexpr int kMaxGrpcThreads = 64;
// Buffers of all connections together; beyond it gRPC slows down reading.
constexpr size_t kMaxGrpcBufferBytes = size_t{1} << 30;

// After the last token, readers have so long to take what was sent to them.
constexpr absl::Duration kLastBytesGrace = absl::Seconds(2);

/// gRPC's reflection library registers itself with every server of the process once it is linked.
class ReflectionOption final : public grpc::ServerBuilderOption {
 public:
  explicit ReflectionOption(bool enabled) : enabled_(enabled) {}

  void UpdateArguments(grpc::ChannelArguments*) override {}

  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override {
    grpc::reflection::ProtoServerReflectionPlugin reflection;
    std::erase_if(*plugins, [&reflection](const auto& plugin) {
      return plugin->name() == reflection.name();
    });
    if (!enabled_) return;
    plugins->push_back(std::make_unique<grpc::reflection::ProtoServerReflectionPlugin>());
  }

 private:
  const bool enabled_;
};

std::vector<const google::protobuf::ServiceDescriptor*> OwnServices() {
  return {v1::GenerateRequest::descriptor()->file()->service(0),
          v1::GetModelRequest::descriptor()->file()->service(0),
          inference::ModelInferRequest::descriptor()->file()->service(0)};
}

void AddMethods(const google::protobuf::ServiceDescriptor& service, GrpcMetrics* metrics) {
  for (int i = 0; i < service.method_count(); ++i) {
    metrics->AddMethod(service.full_name(), service.method(i)->name());
  }
}

// "HOST:PORT" with the port that was really taken.
std::string WithPort(const std::string& address, int port) {
  return absl::StrCat(address.substr(0, address.rfind(':') + 1), port);
}

v1::GetServerInfoResponse MakeServerInfo(const ServerConfig& config) {
  v1::GetServerInfoResponse info;
  info.set_version(Version());
  info.set_simd_target(config.simd_target);
  for (const std::string& target : config.available_simd_targets) {
    info.add_available_simd_targets(target);
  }
  info.set_threads(config.threads);
  info.mutable_start_time()->set_seconds(absl::ToUnixSeconds(absl::Now()));
  return info;
}

void Configure(const ServerConfig& config, grpc::ServerBuilder* builder) {
  builder->SetMaxReceiveMessageSize(static_cast<int>(config.max_message_bytes));
  // Otherwise two servers on one port would share its clients, and neither would say so.
  builder->AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveTimeMs);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                              kMinClientPingMs);
  grpc::ResourceQuota quota("firesteel");
  quota.SetMaxThreads(kMaxGrpcThreads);
  quota.Resize(kMaxGrpcBufferBytes);
  builder->SetResourceQuota(quota);
  builder->SetOption(std::make_unique<ReflectionOption>(config.reflection));
}

}  // namespace

Server::Server(const ServerConfig& config, std::unique_ptr<ServerMetrics> metrics,
               std::unique_ptr<ModelRegistry> models)
    : metrics_(std::move(metrics)),
      grpc_metrics_(metrics_->registry().get()),
      models_(std::move(models)),
      health_(std::make_unique<HealthMonitor>(models_.get(), config.stall)),
      generation_service_(Services()),
      model_service_(models_.get(), MakeServerInfo(config)),
      kserve_service_(Services(), health_.get()) {
  for (const auto* service : OwnServices()) AddMethods(*service, &grpc_metrics_);
  // Naming it also links its descriptor, which reflection hands out.
  AddMethods(*grpc::health::v1::HealthCheckRequest::descriptor()->file()->service(0),
             &grpc_metrics_);
  if (config.reflection) grpc_metrics_.AddMethod(kReflectionService, "ServerReflectionInfo");
}

CallServices Server::Services() {
  return {.models = models_.get(), .delivery = &delivery_, .live = &live_calls_};
}

absl::Status Server::Listen(const ServerConfig& config) {
  auto endpoint = MetricsEndpoint::Start(
      config.metrics_address, {metrics_->registry(), std::make_shared<ProcessMetrics>()});
  if (!endpoint.ok()) return endpoint.status();
  metrics_endpoint_ = *std::move(endpoint);
  metrics_address_ = WithPort(config.metrics_address, metrics_endpoint_->port());

  grpc::EnableDefaultHealthCheckService(true);
  grpc::ServerBuilder builder;
  Configure(config, &builder);
  int port = 0;
  builder.AddListeningPort(config.address, grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&generation_service_);
  builder.RegisterService(&model_service_);
  builder.RegisterService(&kserve_service_);
  builder.RegisterCallbackGenericService(&unknown_method_service_);
  std::vector<std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface>> interceptors;
  interceptors.push_back(MakeParseErrorInterceptor(OwnServices()));
  interceptors.push_back(grpc_metrics_.MakeInterceptorFactory());
  builder.experimental().SetInterceptorCreators(std::move(interceptors));
  {
    const GrpcLogCapture capture;
    grpc_ = builder.BuildAndStart();
  }
  if (grpc_ == nullptr || port == 0) {
    return absl::UnavailableError(
        absl::StrCat("--address: cannot listen on ", config.address, " (in use, or not ours)"));
  }
  address_ = WithPort(config.address, port);
  health_->Start(grpc_->GetHealthCheckService());
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Server>> Server::Start(const ServerConfig& config,
                                                      std::unique_ptr<ServerMetrics> metrics,
                                                      std::unique_ptr<ModelRegistry> models) {
  std::unique_ptr<Server> server(new Server(config, std::move(metrics), std::move(models)));
  const absl::Status status = server->Listen(config);
  if (!status.ok()) return status;
  return server;
}

Server::~Server() { Stop(absl::InfinitePast()); }

bool Server::Stop(absl::Time deadline) {
  if (std::exchange(stopped_, true)) return true;
  health_->Withdraw();
  for (const auto& model : models_->models()) model->engine->BeginDrain();
  bool clean = true;
  for (const auto& model : models_->models()) {
    clean = model->engine->FinishDrain(deadline) && clean;
  }
  if (grpc_ == nullptr) return clean;
  // Every answer is on its way; what a reader does not take in time is lost.
  live_calls_.WaitForNone(std::max(deadline, absl::Now() + kLastBytesGrace));
  // What is left now are Watch and reflection streams, which never end by themselves.
  grpc_->Shutdown(std::chrono::system_clock::now());
  health_.reset();
  return clean;
}

}  // namespace firesteel::server
