// What a call brings along besides its message: request id, trace, deadline.

#ifndef FIRESTEEL_SERVER_CALL_METADATA_H_
#define FIRESTEEL_SERVER_CALL_METADATA_H_

#include <grpcpp/server_context.h>

#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace firesteel::server {

inline constexpr char kRequestIdKey[] = "x-request-id";

struct CallMetadata {
  std::string request_id;   // the client's, or made up
  std::string traceparent;  // as it came; empty where there is none or it is not one
  std::string peer;
  absl::Time deadline = absl::InfiniteFuture();
};

CallMetadata ReadCallMetadata(const grpc::ServerContextBase& context);

/// The trailing metadata of every call: the request id and, where `status` is one that clients
/// retry, when they may (see RetryPushbackMs).
void AddTrailers(const CallMetadata& metadata, const absl::Status& status,
                 grpc::ServerContextBase* context);

/// Whether a cancellation that comes now is the deadline's: gRPC cancels a call at its deadline,
/// too, on a clock of whole milliseconds, so that one shortly before it counts.
bool CancelledByDeadline(absl::Time deadline);

/// 1 to 128 printable ASCII characters, none of them a space.
bool IsRequestId(absl::string_view text);

/// A W3C trace context: lower-case hex digits and dashes, at most 128.
bool IsTraceparent(absl::string_view text);

/// 32 random hex digits.
std::string NewRequestId();

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_CALL_METADATA_H_
