#include "server/grpc_metrics.h"

#include <grpcpp/server_context.h>
#include <grpcpp/support/status.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <string_view>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "runtime/threading/mutex.h"
#include "server/call_metadata.h"

namespace firesteel::server {
namespace {

constexpr size_t kNumCodes = 17;  // of grpc::StatusCode

constexpr const char* kCodeNames[kNumCodes] = {
    "OK",       "Canceled",       "Unknown",          "InvalidArgument",   "DeadlineExceeded",
    "NotFound", "AlreadyExists",  "PermissionDenied", "ResourceExhausted", "FailedPrecondition",
    "Aborted",  "OutOfRange",     "Unimplemented",    "Internal",          "Unavailable",
    "DataLoss", "Unauthenticated"};

constexpr char kStarted[] = "grpc_server_started_total";
constexpr char kHandled[] = "grpc_server_handled_total";
constexpr char kHandling[] = "grpc_server_handling_seconds";

}  // namespace

/// The time series of one method. Those of a code are made when it first comes up.
class GrpcMetrics::Method {
 public:
  Method(GrpcMetrics* metrics, prometheus::Labels labels)
      : metrics_(metrics), labels_(std::move(labels)), started_(metrics->started_.Add(labels_)) {
    ForCode(0);
  }

  void Started() { started_.Increment(); }

  void Handled(int code, absl::Duration duration) {
    // A number that gRPC does not know must not make a label value.
    const bool known = code >= 0 && static_cast<size_t>(code) < kNumCodes;
    const Series series = ForCode(known ? static_cast<size_t>(code) : 2);
    series.handled->Increment();
    series.handling->Observe(absl::ToDoubleSeconds(duration));
  }

 private:
  struct Series {
    prometheus::Counter* handled = nullptr;
    prometheus::Histogram* handling = nullptr;
  };

  Series ForCode(size_t code) ABSL_LOCKS_EXCLUDED(mutex_) {
    MutexLock lock(&mutex_);
    Series& series = by_code_[code];
    if (series.handled == nullptr) {
      prometheus::Labels labels = labels_;
      labels["grpc_code"] = kCodeNames[code];
      series.handled = &metrics_->handled_.Add(labels);
      series.handling = &metrics_->handling_.Add(
          labels, BoundsOf(DescribeMetric(kHandling), *metrics_->buckets_));
    }
    return series;
  }

  GrpcMetrics* const metrics_;
  const prometheus::Labels labels_;
  prometheus::Counter& started_;
  Mutex mutex_;
  std::array<Series, kNumCodes> by_code_ ABSL_GUARDED_BY(mutex_);
};

namespace {

/// Lives as long as its call, whose end, reads and status may come at the same time.
class Interceptor final : public grpc::experimental::Interceptor {
 public:
  Interceptor(GrpcMetrics::Method* method, grpc::experimental::ServerRpcInfo* info)
      : method_(method),
        context_(dynamic_cast<const grpc::CallbackServerContext*>(info->server_context())),
        one_request_(info->type() == grpc::experimental::ServerRpcInfo::Type::UNARY ||
                     info->type() == grpc::experimental::ServerRpcInfo::Type::SERVER_STREAMING),
        start_(std::chrono::steady_clock::now()) {
    method_->Started();
  }

  // A call that ends without a status of ours lost its client. So did one that was to end well, and
  // was cut off: by gRPC, for example, which ends a stream of requests where one is too large.
  ~Interceptor() override {
    Record(status_ == grpc::StatusCode::OK && cut_off_ ? grpc::StatusCode::CANCELLED
                                                       : status_.load());
  }

  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    using Hook = grpc::experimental::InterceptionHookPoints;
    if (methods->QueryInterceptionHookPoint(Hook::POST_RECV_MESSAGE)) {
      if (methods->GetRecvMessage() != nullptr) request_came_ = true;
    }
    if (methods->QueryInterceptionHookPoint(Hook::PRE_SEND_STATUS)) {
      status_ = methods->GetSendStatus().error_code();
      if (one_request_ && request_came_) Record(status_);
    }
    if (methods->QueryInterceptionHookPoint(Hook::POST_RECV_CLOSE) && context_ != nullptr) {
      cut_off_ = context_->IsCancelled();
      if (one_request_ && !request_came_) RecordWithoutRequest();
    }
    methods->Proceed();
  }

 private:
  // gRPC gives one status to a request that is no message and to one whose client gave up before it
  // came. Only the end of the call tells them apart.
  void RecordWithoutRequest() {
    if (!cut_off_) {
      Record(status_);
    } else if (CancelledByDeadline(absl::FromChrono(context_->deadline()))) {
      Record(grpc::StatusCode::DEADLINE_EXCEEDED);
    } else {
      Record(grpc::StatusCode::CANCELLED);
    }
  }

  void Record(int code) {
    if (recorded_.exchange(true)) return;
    method_->Handled(code, absl::FromChrono(std::chrono::steady_clock::now() - start_));
  }

  GrpcMetrics::Method* const method_;
  // Null for methods that are not of the callback API (reflection's): they must not be asked here
  // whether they were cancelled.
  const grpc::CallbackServerContext* const context_;
  const bool one_request_;  // or the client may send several
  const std::chrono::steady_clock::time_point start_;
  std::atomic<bool> request_came_ = false;
  std::atomic<bool> cut_off_ = false;                      // before the status was sent
  std::atomic<int> status_ = grpc::StatusCode::CANCELLED;  // as sent
  std::atomic<bool> recorded_ = false;
};

class Factory final : public grpc::experimental::ServerInterceptorFactoryInterface {
 public:
  using Methods = std::map<std::string, std::unique_ptr<GrpcMetrics::Method>, std::less<>>;
  explicit Factory(const Methods* methods) : methods_(methods) {}

  grpc::experimental::Interceptor* CreateServerInterceptor(
      grpc::experimental::ServerRpcInfo* info) override {
    if (info->method() == nullptr) return nullptr;
    const auto method = methods_->find(std::string_view(info->method()));
    return method == methods_->end() ? nullptr : new Interceptor(method->second.get(), info);
  }

 private:
  const Methods* const methods_;
};

}  // namespace

GrpcMetrics::GrpcMetrics(prometheus::Registry* registry, const MetricBuckets* buckets)
    : buckets_(buckets),
      started_(prometheus::BuildCounter()
                   .Name(kStarted)
                   .Help(DescribeMetric(kStarted).help)
                   .Register(*registry)),
      handled_(prometheus::BuildCounter()
                   .Name(kHandled)
                   .Help(DescribeMetric(kHandled).help)
                   .Register(*registry)),
      handling_(prometheus::BuildHistogram()
                    .Name(kHandling)
                    .Help(DescribeMetric(kHandling).help)
                    .Register(*registry)) {}

GrpcMetrics::~GrpcMetrics() = default;

void GrpcMetrics::AddMethod(const std::string& service, const std::string& method) {
  methods_["/" + service + "/" + method] = std::make_unique<Method>(
      this, prometheus::Labels{{"grpc_service", service}, {"grpc_method", method}});
}

std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface>
GrpcMetrics::MakeInterceptorFactory() {
  return std::make_unique<Factory>(&methods_);
}

}  // namespace firesteel::server
