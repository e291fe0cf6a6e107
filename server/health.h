// What grpc.health.v1 answers, and the watchdog behind it.

#ifndef FIRESTEEL_SERVER_HEALTH_H_
#define FIRESTEEL_SERVER_HEALTH_H_

#include <grpcpp/health_check_service_interface.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/time/time.h"
#include "runtime/threading/mutex.h"
#include "server/model_registry.h"
#include "server/periodic_thread.h"

namespace firesteel::server {

/// Keeps gRPC's own health service up to date: "" and the services that generate are SERVING while
/// every model makes progress, a model's name while that one does and is there, ModelService
/// always; all are NOT_SERVING after Withdraw. Thread-safe.
class HealthMonitor {
 public:
  /// `models` outlives it. A model is stuck when work waits and no step ended for `stall`.
  HealthMonitor(const ModelRegistry* models, absl::Duration stall);
  HealthMonitor(const HealthMonitor&) = delete;
  HealthMonitor& operator=(const HealthMonitor&) = delete;

  /// Sets every status of `services`, which outlive it, then looks again by a thread of its own,
  /// several times in each `stall`. Called once.
  void Start(std::vector<grpc::HealthCheckServiceInterface*> services) ABSL_LOCKS_EXCLUDED(mutex_);

  /// As last seen; false for a name that there is not, and for all before Start.
  bool IsServing(const std::string& name) const ABSL_LOCKS_EXCLUDED(mutex_);

  /// Looks now.
  void Check() ABSL_LOCKS_EXCLUDED(mutex_);

  /// Everything is NOT_SERVING from now on, for good.
  void Withdraw() ABSL_LOCKS_EXCLUDED(mutex_);
  bool withdrawn() const ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  void Set(const std::string& name, bool serving) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const ModelRegistry* const models_;
  const absl::Duration stall_;

  mutable Mutex mutex_;
  std::vector<grpc::HealthCheckServiceInterface*> services_ ABSL_GUARDED_BY(mutex_);
  std::map<std::string, bool> statuses_ ABSL_GUARDED_BY(mutex_);  // as last set
  bool withdrawn_ ABSL_GUARDED_BY(mutex_) = false;
  std::optional<PeriodicThread> thread_;  // from Start; last: it uses the others
};

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_HEALTH_H_
