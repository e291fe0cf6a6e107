// grpc_server_*: every call of a known method, counted under the names that existing dashboards
// use.

#ifndef FIRESTEEL_SERVER_GRPC_METRICS_H_
#define FIRESTEEL_SERVER_GRPC_METRICS_H_

#include <grpcpp/support/server_interceptor.h>
#include <prometheus/counter.h>
#include <prometheus/family.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <array>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/time/time.h"
#include "server/metric_table.h"

namespace firesteel::server {

/// grpc_server_started_total, grpc_server_handled_total and grpc_server_handling_seconds. Codes are
/// written as in the Go library whose names these are: "OK", "InvalidArgument". Methods that were
/// not added are not counted: no client can make a new time series. Thread-safe once all methods
/// are added.
class GrpcMetrics {
 public:
  /// Both outlive it.
  GrpcMetrics(prometheus::Registry* registry, const MetricBuckets* buckets);
  ~GrpcMetrics();
  GrpcMetrics(const GrpcMetrics&) = delete;
  GrpcMetrics& operator=(const GrpcMetrics&) = delete;

  void AddMethod(const std::string& service, const std::string& method);

  /// Counts the calls of a server built with it. This object outlives the server.
  std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface> MakeInterceptorFactory();

  class Method;

 private:
  friend class Method;
  const MetricBuckets* const buckets_;
  prometheus::Family<prometheus::Counter>& started_;
  prometheus::Family<prometheus::Counter>& handled_;
  prometheus::Family<prometheus::Histogram>& handling_;
  std::map<std::string, std::unique_ptr<Method>, std::less<>> methods_;  // by "/service/method"
};

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_GRPC_METRICS_H_
