// What a client is told who calls a method that the server does not have.

#ifndef FIRESTEEL_SERVER_UNKNOWN_METHOD_H_
#define FIRESTEEL_SERVER_UNKNOWN_METHOD_H_

#include <grpcpp/generic/async_generic_service.h>

namespace firesteel::server {

/// Takes every call that no other service takes, and ends it with UNIMPLEMENTED and the usual
/// details: gRPC's own answer has none. Thread-safe.
class UnknownMethodService final : public grpc::CallbackGenericService {
 public:
  grpc::ServerGenericBidiReactor* CreateReactor(
      grpc::GenericCallbackServerContext* context) override;
};

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_UNKNOWN_METHOD_H_
