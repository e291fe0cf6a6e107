// What the server is doing, for those who spread calls over several: told by GetLoad, and at the
// end of every call that generates as an ORCA report in the trailing metadata.
//
// gRPC has a recorder for such reports (grpcpp/ext/call_metric_recorder.h), but Debian's library
// comes without the part that sends them.

#ifndef FIRESTEEL_SERVER_LOAD_REPORT_H_
#define FIRESTEEL_SERVER_LOAD_REPORT_H_

#include <grpcpp/support/server_interceptor.h>

#include <cstdint>
#include <deque>
#include <memory>

#include "absl/base/thread_annotations.h"
#include "absl/time/time.h"
#include "firesteel/v1/model_service.pb.h"
#include "runtime/scheduler/clock.h"
#include "runtime/threading/mutex.h"
#include "server/health.h"
#include "server/model_registry.h"
#include "xds/data/orca/v3/orca_load_report.pb.h"

namespace firesteel::server {

/// The trailing metadata with a serialized OrcaLoadReport.
inline constexpr char kLoadReportKey[] = "endpoint-load-metrics-bin";

/// The same as a report to balancers. `named_metrics` has firesteel.requests_running and _waiting,
/// `utilization` has firesteel.kv_cache, of the model where it is largest.
xds::data::orca::v3::OrcaLoadReport ToOrcaReport(const v1::GetLoadResponse& load);

/// Thread-safe.
class LoadMonitor {
 public:
  /// Everything given to it outlives it. CPU time is seen as a part of that of `threads` CPUs.
  LoadMonitor(const ModelRegistry* models, const HealthMonitor* health, uint32_t threads,
              const Clock* clock = Clock::Real());
  LoadMonitor(const LoadMonitor&) = delete;
  LoadMonitor& operator=(const LoadMonitor&) = delete;

  /// Rates are looked at once a second, and are zero in the first one.
  v1::GetLoadResponse Load() { return LoadSeenBy(0); }

  /// The same at the end of so many requests, which count as if they still ran: a server that has
  /// one request at a time is not idle whenever it reports.
  v1::GetLoadResponse LoadSeenBy(uint32_t ended) ABSL_LOCKS_EXCLUDED(mutex_);

  /// A call that generates has ended so.
  void CountCall(const grpc::Status& status) ABSL_LOCKS_EXCLUDED(mutex_);

  /// Counts the calls that generate, and adds the report to their ends; not where the caller may
  /// not make the call. Comes after interceptors that change the status. This object outlives the
  /// server.
  std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface> MakeInterceptorFactory();

 private:
  struct Sample {
    absl::Time time;
    double cpu_seconds = 0;
    uint64_t calls = 0;
    uint64_t errors = 0;
  };
  struct Rates {  // each second
    double cpu = 0;
    double calls = 0;
    double errors = 0;
  };

  Rates LookAtRates() ABSL_LOCKS_EXCLUDED(mutex_);

  const ModelRegistry* const models_;
  const HealthMonitor* const health_;
  const uint32_t threads_;
  const Clock* const clock_;

  Mutex mutex_;
  uint64_t calls_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t errors_ ABSL_GUARDED_BY(mutex_) = 0;
  std::deque<Sample> samples_ ABSL_GUARDED_BY(mutex_);  // never empty, oldest first
  Rates rates_ ABSL_GUARDED_BY(mutex_);                 // from the first sample to the last
};

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_LOAD_REPORT_H_
