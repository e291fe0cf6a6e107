#include "server/server.h"

#include <grpcpp/ext/channelz_service_plugin.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/impl/server_builder_option.h>
#include <grpcpp/impl/server_builder_plugin.h>
#include <grpcpp/resource_quota.h>
#include <grpcpp/server_builder.h>

#include <algorithm>
#include <chrono>
#include <limits>
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

// Reflection is served by gRPC's own synchronous threads, one for each open stream.
constexpr int kMaxGrpcThreads = 64;
// Buffers of all connections together; beyond it gRPC slows down reading.
constexpr size_t kMaxGrpcBufferBytes = size_t{1} << 30;

// After the last token, readers have so long to take what was sent to them.
constexpr absl::Duration kLastBytesGrace = absl::Seconds(2);

/// gRPC's services that register themselves with every server of the process: reflection once it is
/// linked, channelz once it was asked for.
class PluginOption final : public grpc::ServerBuilderOption {
 public:
  PluginOption(bool reflection, bool channelz) : reflection_(reflection), channelz_(channelz) {}

  void UpdateArguments(grpc::ChannelArguments*) override {}

  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override {
    const std::string reflection = grpc::reflection::ProtoServerReflectionPlugin().name();
    std::erase_if(*plugins, [&](const auto& plugin) {
      return plugin->name() == reflection || (plugin->name() == kChannelzPlugin && !channelz_);
    });
    if (!reflection_) return;
    plugins->push_back(std::make_unique<grpc::reflection::ProtoServerReflectionPlugin>());
  }

 private:
  static constexpr char kChannelzPlugin[] = "channelz_service";

  const bool reflection_;
  const bool channelz_;
};

std::vector<const google::protobuf::ServiceDescriptor*> OwnServices() {
  return {v1::GenerateRequest::descriptor()->file()->service(0),
          v1::GetModelRequest::descriptor()->file()->service(0),
          inference::ModelInferRequest::descriptor()->file()->service(0),
          v1::LoadModelRequest::descriptor()->file()->service(0)};
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

int ToIntMilliseconds(absl::Duration duration) {
  return static_cast<int>(
      std::min<int64_t>(absl::ToInt64Milliseconds(duration), std::numeric_limits<int>::max()));
}

void Configure(const ServerConfig& config, bool channelz, grpc::ServerBuilder* builder) {
  builder->SetMaxReceiveMessageSize(static_cast<int>(config.max_message_bytes));
  // Otherwise two servers on one port would share its clients, and neither would say so.
  builder->AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, ToIntMilliseconds(config.keepalive.time));
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS,
                              ToIntMilliseconds(config.keepalive.timeout));
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                              ToIntMilliseconds(config.keepalive.min_client_ping));
  if (config.max_connection_age < absl::InfiniteDuration()) {
    builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_MS,
                                ToIntMilliseconds(config.max_connection_age));
    // However old the connection, its calls are not cut.
    builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_GRACE_MS,
                                std::numeric_limits<int>::max());
  }
  grpc::ResourceQuota quota("firesteel");
  quota.SetMaxThreads(kMaxGrpcThreads);
  quota.Resize(kMaxGrpcBufferBytes);
  builder->SetResourceQuota(quota);
  builder->SetOption(std::make_unique<PluginOption>(config.reflection, channelz));
}

// Starts what `builder` has at the address that `option` names, and says in `real` where that is.
absl::StatusOr<std::unique_ptr<grpc::Server>> StartAt(
    const char* option, const std::string& address,
    const std::shared_ptr<grpc::ServerCredentials>& credentials, grpc::ServerBuilder* builder,
    std::string* real) {
  int port = 0;
  builder->AddListeningPort(address, credentials, &port);
  std::unique_ptr<grpc::Server> server;
  {
    const GrpcLogCapture capture;
    server = builder->BuildAndStart();
  }
  if (server == nullptr || port == 0) {
    return absl::UnavailableError(
        absl::StrCat(option, ": cannot listen on ", address, " (in use, or not ours)"));
  }
  *real = WithPort(address, port);
  return server;
}

}  // namespace

Server::Server(const ServerConfig& config, std::unique_ptr<ServerMetrics> metrics,
               std::unique_ptr<ModelRegistry> models, std::unique_ptr<AccessControl> access)
    : wait_(config.wait),
      metrics_(std::move(metrics)),
      grpc_metrics_(metrics_->registry().get(), &metrics_->buckets()),
      models_(std::move(models)),
      access_(std::move(access)),
      health_(std::make_unique<HealthMonitor>(models_.get(), config.stall)),
      load_(models_.get(), health_.get(), config.threads),
      generation_service_(Services(config)),
      model_service_(models_.get(), access_.get(), &load_, MakeServerInfo(config)),
      kserve_service_(Services(config), health_.get()) {
  for (const auto* service : OwnServices()) AddMethods(*service, &grpc_metrics_);
  // Naming it also links its descriptor, which reflection hands out.
  AddMethods(*grpc::health::v1::HealthCheckRequest::descriptor()->file()->service(0),
             &grpc_metrics_);
  if (config.reflection) grpc_metrics_.AddMethod(kReflectionService, "ServerReflectionInfo");
}

CallServices Server::Services(const ServerConfig& config) {
  return {.models = models_.get(),
          .access = access_.get(),
          .delivery = &delivery_,
          .live = &live_calls_,
          .stall = config.reader_stall};
}

Server::Interceptors Server::MakeInterceptors() {
  Interceptors interceptors;
  interceptors.push_back(MakeParseErrorInterceptor(OwnServices()));
  interceptors.push_back(grpc_metrics_.MakeInterceptorFactory());
  interceptors.push_back(load_.MakeInterceptorFactory());
  return interceptors;
}

absl::Status Server::Listen(const ServerConfig& config) {
  const auto credentials = MakeServerCredentials(config.tls, config.credentials_reload);
  if (!credentials.ok()) return credentials.status();
  auto endpoint = MetricsEndpoint::Start(
      config.metrics_address, {metrics_->registry(), std::make_shared<ProcessMetrics>()});
  if (!endpoint.ok()) return endpoint.status();
  metrics_endpoint_ = *std::move(endpoint);
  metrics_address_ = WithPort(config.metrics_address, metrics_endpoint_->port());

  grpc::EnableDefaultHealthCheckService(true);
  grpc::ServerBuilder builder;
  Configure(config, /*channelz=*/false, &builder);
  builder.RegisterService(&generation_service_);
  builder.RegisterService(&model_service_);
  builder.RegisterService(&kserve_service_);
  builder.RegisterCallbackGenericService(&unknown_method_service_);
  builder.experimental().SetInterceptorCreators(MakeInterceptors());
  auto server = StartAt("--address", config.address, *credentials, &builder, &address_);
  if (!server.ok()) return server.status();
  grpc_ = *std::move(server);
  manager_ = std::make_unique<ModelManager>(
      models_.get(), config.load_model, [this] { health_->Check(); }, config.drain);
  if (!config.admin_address.empty()) {
    const absl::Status status = ListenForAdmins(config, *credentials);
    if (!status.ok()) return status;
  }
  std::vector<grpc::HealthCheckServiceInterface*> health = {grpc_->GetHealthCheckService()};
  if (!config.health_address.empty()) {
    const absl::Status status = ListenForProbes(config);
    if (!status.ok()) return status;
    health.push_back(probe_grpc_->GetHealthCheckService());
  }
  health_->Start(std::move(health));
  stall_watch_ = std::make_unique<PeriodicThread>(
      std::clamp(config.reader_stall.write / 4, absl::Milliseconds(25), absl::Seconds(1)),
      [this] { live_calls_.EndStalled(absl::Now()); });
  return absl::OkStatus();
}

absl::Status Server::ListenForAdmins(const ServerConfig& config,
                                     const std::shared_ptr<grpc::ServerCredentials>& credentials) {
  admin_service_ = std::make_unique<AdminService>(models_.get(), manager_.get(), access_.get());
  grpc::EnableDefaultHealthCheckService(false);
  if (config.channelz) grpc::channelz::experimental::InitChannelzService();
  grpc::ServerBuilder builder;
  Configure(config, config.channelz, &builder);
  builder.RegisterService(admin_service_.get());
  builder.RegisterCallbackGenericService(&unknown_admin_method_service_);
  builder.experimental().SetInterceptorCreators(MakeInterceptors());
  auto server =
      StartAt("--admin-address", config.admin_address, credentials, &builder, &admin_address_);
  if (!server.ok()) return server.status();
  admin_grpc_ = *std::move(server);
  return absl::OkStatus();
}

absl::Status Server::ListenForProbes(const ServerConfig& config) {
  grpc::EnableDefaultHealthCheckService(true);
  ServerConfig probes = config;
  probes.reflection = false;
  grpc::ServerBuilder builder;
  Configure(probes, /*channelz=*/false, &builder);
  builder.RegisterCallbackGenericService(&unknown_probe_method_service_);
  builder.experimental().SetInterceptorCreators(MakeInterceptors());
  auto server = StartAt("--health-address", config.health_address,
                        grpc::InsecureServerCredentials(), &builder, &health_address_);
  if (!server.ok()) return server.status();
  probe_grpc_ = *std::move(server);
  return absl::OkStatus();
}

void Server::Reload() {
  access_->Reload();
  const absl::Status status = manager_->ReloadAll();
  if (!status.ok()) {
    Log(LogLevel::kWarn, "models not reloaded", {{"error", std::string(status.message())}});
  }
}

absl::StatusOr<std::unique_ptr<Server>> Server::Start(const ServerConfig& config,
                                                      std::unique_ptr<ServerMetrics> metrics,
                                                      std::unique_ptr<ModelRegistry> models) {
  auto access = AccessControl::Create(config.auth_token_file, config.credentials_reload);
  if (!access.ok()) return access.status();
  std::unique_ptr<Server> server(
      new Server(config, std::move(metrics), std::move(models), *std::move(access)));
  const absl::Status status = server->Listen(config);
  if (!status.ok()) return status;
  return server;
}

Server::~Server() { Stop(absl::ZeroDuration(), absl::ZeroDuration()); }

bool Server::Stop(absl::Duration grace, absl::Duration drain) {
  if (std::exchange(stopped_, true)) return true;
  health_->Withdraw();
  wait_(grace);
  const absl::Time deadline = absl::Now() + drain;
  if (manager_ != nullptr) manager_->Close();
  for (const auto& model : models_->models()) model->engine->BeginDrain();
  live_calls_.EndIdle();
  bool clean = true;
  if (manager_ != nullptr) manager_->FinishRetired(deadline);
  for (const auto& model : models_->models()) {
    clean = model->engine->FinishDrain(deadline) && clean;
  }
  // Waits for a model that is being loaded.
  if (admin_grpc_ != nullptr) admin_grpc_->Shutdown(std::chrono::system_clock::now());
  manager_.reset();
  if (grpc_ == nullptr) return clean;
  // Every answer is on its way; what a reader does not take in time is lost.
  live_calls_.WaitForNone(std::max(deadline, absl::Now() + kLastBytesGrace));
  // What is left now are Watch and reflection streams, which never end by themselves.
  grpc_->Shutdown(std::chrono::system_clock::now());
  if (probe_grpc_ != nullptr) probe_grpc_->Shutdown(std::chrono::system_clock::now());
  stall_watch_.reset();
  health_.reset();
  return clean;
}

}  // namespace firesteel::server
