#include "server/health.h"

#include <algorithm>
#include <set>
#include <utility>

#include "firesteel/v1/generation_service.grpc.pb.h"
#include "firesteel/v1/model_service.grpc.pb.h"
#include "inference/grpc_service.grpc.pb.h"
#include "server/logging.h"

namespace firesteel::server {

HealthMonitor::HealthMonitor(const ModelRegistry* models, absl::Duration stall)
    : models_(models), stall_(stall) {}

void HealthMonitor::Start(std::vector<grpc::HealthCheckServiceInterface*> services) {
  {
    MutexLock lock(&mutex_);
    services_ = std::move(services);
  }
  Check();
  thread_.emplace(std::clamp(stall_ / 4, absl::Milliseconds(25), absl::Seconds(1)),
                  [this] { Check(); });
}

bool HealthMonitor::IsServing(const std::string& name) const {
  MutexLock lock(&mutex_);
  const auto entry = statuses_.find(name);
  return !withdrawn_ && entry != statuses_.end() && entry->second;
}

void HealthMonitor::Set(const std::string& name, bool serving) {
  const auto [entry, is_new] = statuses_.try_emplace(name, serving);
  if (!is_new && entry->second == serving) return;
  entry->second = serving;
  for (auto* service : services_) service->SetServingStatus(name, serving);
  if (is_new) return;
  Log(serving ? LogLevel::kInfo : LogLevel::kError, "health changed",
      {{"name", name}, {"status", serving ? "SERVING" : "NOT_SERVING"}});
}

void HealthMonitor::Check() {
  MutexLock lock(&mutex_);
  if (withdrawn_ || services_.empty()) return;
  bool all = true;
  std::set<std::string> present = {"", v1::GenerationService::service_full_name(),
                                   v1::ModelService::service_full_name(),
                                   inference::GRPCInferenceService::service_full_name()};
  for (const auto& model : models_->models()) {
    const bool moving = model->engine->MakingProgress(stall_);
    all = all && moving;
    Set(model->name, moving);
    present.insert(model->name);
  }
  for (const auto& [name, serving] : statuses_) {
    if (!present.contains(name)) Set(name, false);  // unloaded; gRPC can't forget a name
  }
  Set("", all);
  Set(v1::GenerationService::service_full_name(), all);
  Set(inference::GRPCInferenceService::service_full_name(), all);
  Set(v1::ModelService::service_full_name(), true);
}

void HealthMonitor::Withdraw() {
  MutexLock lock(&mutex_);
  withdrawn_ = true;
  for (auto* service : services_) service->Shutdown();
}

bool HealthMonitor::withdrawn() const {
  MutexLock lock(&mutex_);
  return withdrawn_;
}

}  // namespace firesteel::server
