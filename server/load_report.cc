#include "server/load_report.h"

#include <sys/resource.h>

#include <algorithm>
#include <string>
#include <string_view>

#include "firesteel/v1/generation_service.grpc.pb.h"
#include "inference/grpc_service.grpc.pb.h"

namespace firesteel::server {
namespace {

constexpr absl::Duration kLookAgain = absl::Seconds(1);
constexpr absl::Duration kWindow = absl::Seconds(10);

double CpuSeconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return absl::ToDoubleSeconds(absl::DurationFromTimeval(usage.ru_utime) +
                               absl::DurationFromTimeval(usage.ru_stime));
}

// What the alert of failing calls counts, too: nothing that the caller did wrong or no longer
// wants.
bool IsServersFault(grpc::StatusCode code) {
  return code == grpc::StatusCode::RESOURCE_EXHAUSTED || code == grpc::StatusCode::UNAVAILABLE ||
         code == grpc::StatusCode::INTERNAL || code == grpc::StatusCode::UNKNOWN ||
         code == grpc::StatusCode::DATA_LOSS;
}

bool Generates(std::string_view method) {
  static const std::string* const own =
      new std::string("/" + std::string(v1::GenerationService::service_full_name()) + "/");
  static const std::string* const kserve = new std::string(
      "/" + std::string(inference::GRPCInferenceService::service_full_name()) + "/");
  for (const char* name : {"Generate", "GenerateStream", "Score"}) {
    if (method == *own + name) return true;
  }
  return method == *kserve + "ModelInfer" || method == *kserve + "ModelStreamInfer";
}

class Interceptor final : public grpc::experimental::Interceptor {
 public:
  explicit Interceptor(LoadMonitor* monitor) : monitor_(monitor) {}

  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    using Hook = grpc::experimental::InterceptionHookPoints;
    if (methods->QueryInterceptionHookPoint(Hook::PRE_SEND_STATUS)) {
      const grpc::Status status = methods->GetSendStatus();
      // How busy a server is concerns those only who may use it.
      if (status.error_code() != grpc::StatusCode::UNAUTHENTICATED &&
          status.error_code() != grpc::StatusCode::PERMISSION_DENIED) {
        monitor_->CountCall(status);
        methods->GetSendTrailingMetadata()->emplace(
            kLoadReportKey, ToOrcaReport(monitor_->LoadSeenBy(1)).SerializeAsString());
      }
    }
    methods->Proceed();
  }

 private:
  LoadMonitor* const monitor_;
};

class Factory final : public grpc::experimental::ServerInterceptorFactoryInterface {
 public:
  explicit Factory(LoadMonitor* monitor) : monitor_(monitor) {}

  grpc::experimental::Interceptor* CreateServerInterceptor(
      grpc::experimental::ServerRpcInfo* info) override {
    const bool wanted = info->method() != nullptr && Generates(info->method());
    return wanted ? new Interceptor(monitor_) : nullptr;
  }

 private:
  LoadMonitor* const monitor_;
};

}  // namespace

xds::data::orca::v3::OrcaLoadReport ToOrcaReport(const v1::GetLoadResponse& load) {
  xds::data::orca::v3::OrcaLoadReport report;
  report.set_cpu_utilization(load.cpu_utilization());
  report.set_application_utilization(load.utilization());
  report.set_rps_fractional(load.requests_per_second());
  report.set_eps(load.errors_per_second());
  double running = 0;
  double waiting = 0;
  double kv_cache = 0;
  for (const v1::ModelLoad& model : load.models()) {
    running += model.requests_running();
    waiting += model.requests_waiting();
    kv_cache = std::max(kv_cache, model.kv_cache_usage_ratio());
  }
  (*report.mutable_named_metrics())["firesteel.requests_running"] = running;
  (*report.mutable_named_metrics())["firesteel.requests_waiting"] = waiting;
  (*report.mutable_utilization())["firesteel.kv_cache"] = kv_cache;
  return report;
}

LoadMonitor::LoadMonitor(const ModelRegistry* models, const HealthMonitor* health, uint32_t threads,
                         const Clock* clock)
    : models_(models),
      health_(health),
      threads_(std::max(threads, 1u)),
      clock_(clock),
      samples_{{.time = clock->Now(), .cpu_seconds = CpuSeconds()}} {}

void LoadMonitor::CountCall(const grpc::Status& status) {
  MutexLock lock(&mutex_);
  ++calls_;
  if (IsServersFault(status.error_code())) ++errors_;
}

LoadMonitor::Rates LoadMonitor::LookAtRates() {
  MutexLock lock(&mutex_);
  const absl::Time now = clock_->Now();
  if (now - samples_.back().time < kLookAgain) return rates_;
  samples_.push_back(
      {.time = now, .cpu_seconds = CpuSeconds(), .calls = calls_, .errors = errors_});
  while (samples_.size() > 2 && now - samples_[1].time >= kWindow) samples_.pop_front();
  const Sample& first = samples_.front();
  const Sample& last = samples_.back();
  const double seconds = absl::ToDoubleSeconds(last.time - first.time);
  rates_ = {.cpu = (last.cpu_seconds - first.cpu_seconds) / seconds,
            .calls = static_cast<double>(last.calls - first.calls) / seconds,
            .errors = static_cast<double>(last.errors - first.errors) / seconds};
  return rates_;
}

v1::GetLoadResponse LoadMonitor::LoadSeenBy(uint32_t ended) {
  v1::GetLoadResponse load;
  load.set_draining(health_->withdrawn());
  const Rates rates = LookAtRates();
  load.set_cpu_utilization(rates.cpu / threads_);
  load.set_requests_per_second(rates.calls);
  load.set_errors_per_second(rates.errors);
  double requests = ended;
  double places = 0;
  double fullest = 0;
  for (const auto& served : models_->models()) {
    const EngineGauges gauges = served->engine->gauges();
    const EngineOptions& options = served->engine->options();
    v1::ModelLoad* const model = load.add_models();
    model->set_model(served->name);
    model->set_requests_running(gauges.requests_running);
    model->set_requests_waiting(gauges.requests_waiting);
    model->set_kv_cache_usage_ratio(gauges.kv_usage_ratio);
    model->set_max_batch_size(options.max_batch_size);
    model->set_max_queue_requests(options.max_queue_requests);
    model->set_kv_cache_capacity_tokens(served->engine->kv_capacity_tokens());
    requests += gauges.requests_running;
    requests += gauges.requests_waiting;
    places += options.max_batch_size;
    fullest = std::max(fullest, gauges.kv_usage_ratio);
  }
  load.set_utilization(std::max(places > 0 ? requests / places : 0, fullest));
  return load;
}

std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface>
LoadMonitor::MakeInterceptorFactory() {
  return std::make_unique<Factory>(this);
}

}  // namespace firesteel::server
