// Unary calls that are answered at once, on gRPC's own thread.

#ifndef FIRESTEEL_SERVER_UNARY_ANSWER_H_
#define FIRESTEEL_SERVER_UNARY_ANSWER_H_

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <cstdint>
#include <functional>

#include "absl/status/status.h"
#include "server/access_control.h"

namespace firesteel::server {

/// Whom a method answers.
enum class Audience : uint8_t { kAnybody, kClients, kAdmins };

/// Asks who calls, and whether they may.
absl::Status CheckCaller(const grpc::ServerContextBase& context, AccessControl* access,
                         Audience audience);

/// Checks the caller. Then runs `handle`, which checks the request, fills the response and says how
/// that went, and ends the call with what it says. The request id is echoed. What `handle` throws
/// is an error of this call only.
grpc::ServerUnaryReactor* AnswerUnary(grpc::CallbackServerContext* context, AccessControl* access,
                                      Audience audience,
                                      const std::function<absl::Status()>& handle);

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_UNARY_ANSWER_H_
