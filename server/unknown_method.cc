#include "server/unknown_method.h"

#include "absl/strings/str_cat.h"
#include "server/call_metadata.h"
#include "server/status.h"

namespace firesteel::server {
namespace {

class Reactor final : public grpc::ServerGenericBidiReactor {
 public:
  explicit Reactor(grpc::GenericCallbackServerContext* context) {
    const absl::Status status = Refusal(
        kMethodNotFound, absl::StrCat("there is no method ", Quoted(context->method()),
                                      "; see the .proto files, or ask the server's reflection"));
    AddTrailers(ReadCallMetadata(*context), status, context);
    Finish(ToGrpcStatus(status));
  }

  void OnDone() override { delete this; }
};

}  // namespace

grpc::ServerGenericBidiReactor* UnknownMethodService::CreateReactor(
    grpc::GenericCallbackServerContext* context) {
  return new Reactor(context);
}

}  // namespace firesteel::server
