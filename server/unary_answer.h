// Unary calls that are answered at once, on gRPC's own thread.

#ifndef FIRESTEEL_SERVER_UNARY_ANSWER_H_
#define FIRESTEEL_SERVER_UNARY_ANSWER_H_

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <functional>

#include "absl/status/status.h"

namespace firesteel::server {

/// Runs `handle`, which checks the request, fills the response and says how that went, and ends the
/// call with what it says. The request id is echoed. What `handle` throws is an error of this call
/// only.
grpc::ServerUnaryReactor* AnswerUnary(grpc::CallbackServerContext* context,
                                      const std::function<absl::Status()>& handle);

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_UNARY_ANSWER_H_
