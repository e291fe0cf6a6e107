// A failed RPC in words: code, message and the google.rpc details that came with it.

#ifndef FIRESTEEL_TOOLS_CLIENT_RPC_ERROR_H_
#define FIRESTEEL_TOOLS_CLIENT_RPC_ERROR_H_

#include <string>

#include "grpcpp/client_context.h"
#include "grpcpp/support/status.h"

namespace firesteel::client {

/// "INVALID_ARGUMENT" and so on; "code 17" for a number that gRPC does not define.
std::string StatusCodeName(grpc::StatusCode code);

/// One line with code and message, then one indented line a detail: wrong fields, when to retry,
/// quotas, reason. A detail of an unknown type is named by its type; details that can't be parsed
/// are left out. Ends with a newline.
std::string FormatError(const grpc::Status& status);

/// The same, with the request's id where the server sent one (REQUIRES: the call has ended).
std::string FormatError(const grpc::Status& status, const grpc::ClientContext& context);

}  // namespace firesteel::client

#endif  // FIRESTEEL_TOOLS_CLIENT_RPC_ERROR_H_
