#include "server/health.h"

#include <algorithm>

#include "absl/time/clock.h"
#include "firesteel/v1/generation_service.grpc.pb.h"
#include "firesteel/v1/model_service.grpc.pb.h"
#include "server/logging.h"

namespace firesteel::server {

HealthMonitor::HealthMonitor(grpc::HealthCheckServiceInterface* service,
                             const ModelRegistry* models, absl::Duration stall)
    : service_(service), models_(models), stall_(stall) {
  Check();
  thread_ = std::thread([this] { Main(); });
}

HealthMonitor::~HealthMonitor() {
  {
    MutexLock lock(&mutex_);
    stopping_ = true;
    stop_.NotifyAll();
  }
  thread_.join();
}

void HealthMonitor::Set(const std::string& name, bool serving) {
  const auto [entry, is_new] = statuses_.try_emplace(name, serving);
  if (!is_new && entry->second == serving) return;
  entry->second = serving;
  service_->SetServingStatus(name, serving);
  if (is_new) return;
  Log(serving ? LogLevel::kInfo : LogLevel::kError, "health changed",
      {{"name", name}, {"status", serving ? "SERVING" : "NOT_SERVING"}});
}

void HealthMonitor::Check() {
  MutexLock lock(&mutex_);
  if (withdrawn_) return;
  bool all = true;
  for (const auto& model : models_->models()) {
    const bool moving = model->engine->MakingProgress(stall_);
    all = all && moving;
    Set(model->name, moving);
  }
  Set("", all);
  Set(v1::GenerationService::service_full_name(), all);
  Set(v1::ModelService::service_full_name(), true);
}

void HealthMonitor::Withdraw() {
  MutexLock lock(&mutex_);
  withdrawn_ = true;
  service_->Shutdown();
}

void HealthMonitor::Main() {
  const absl::Duration period = std::clamp(stall_ / 4, absl::Milliseconds(25), absl::Seconds(1));
  while (true) {
    {
      MutexLock lock(&mutex_);
      const absl::Time next = absl::Now() + period;
      while (!stopping_ && stop_.WaitUntil(&mutex_, next)) {
      }
      if (stopping_) return;
    }
    Check();
  }
}

}  // namespace firesteel::server
