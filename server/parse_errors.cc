#include "server/parse_errors.h"

#include <grpcpp/support/status.h>

#include <set>
#include <string>
#include <string_view>
#include <utility>

#include "server/status.h"

namespace firesteel::server {
namespace {

class Interceptor final : public grpc::experimental::Interceptor {
 public:
  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    using Hook = grpc::experimental::InterceptionHookPoints;
    if (methods->QueryInterceptionHookPoint(Hook::PRE_SEND_STATUS)) {
      const grpc::Status status = methods->GetSendStatus();
      // Ours always has a message.
      if (status.error_code() == grpc::StatusCode::UNIMPLEMENTED &&
          status.error_message().empty()) {
        methods->ModifySendStatus(ToGrpcStatus(MalformedRequest()));
      }
    }
    methods->Proceed();
  }
};

class Factory final : public grpc::experimental::ServerInterceptorFactoryInterface {
 public:
  explicit Factory(std::set<std::string, std::less<>> methods) : methods_(std::move(methods)) {}

  grpc::experimental::Interceptor* CreateServerInterceptor(
      grpc::experimental::ServerRpcInfo* info) override {
    const std::string_view method = info->method() == nullptr ? "" : info->method();
    return methods_.contains(method) ? new Interceptor() : nullptr;
  }

 private:
  const std::set<std::string, std::less<>> methods_;
};

}  // namespace

std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface> MakeParseErrorInterceptor(
    const std::vector<const google::protobuf::ServiceDescriptor*>& services) {
  std::set<std::string, std::less<>> methods;
  for (const auto* service : services) {
    for (int i = 0; i < service->method_count(); ++i) {
      methods.insert("/" + service->full_name() + "/" + service->method(i)->name());
    }
  }
  return std::make_unique<Factory>(std::move(methods));
}

}  // namespace firesteel::server
