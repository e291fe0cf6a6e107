// The end of a unary call that is answered at once.

#ifndef FIRESTEEL_SERVER_UNARY_ANSWER_H_
#define FIRESTEEL_SERVER_UNARY_ANSWER_H_

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include "absl/status/status.h"
#include "server/call_metadata.h"
#include "server/status.h"

namespace firesteel::server {

/// Ends the call with `status`, echoing the request id. The response was filled before.
inline grpc::ServerUnaryReactor* Answer(grpc::CallbackServerContext* context,
                                        const absl::Status& status) {
  const CallMetadata metadata = ReadCallMetadata(*context);
  if (status.ok()) context->AddInitialMetadata(kRequestIdKey, metadata.request_id);
  context->AddTrailingMetadata(kRequestIdKey, metadata.request_id);
  grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
  reactor->Finish(ToGrpcStatus(status));
  return reactor;
}

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_UNARY_ANSWER_H_
