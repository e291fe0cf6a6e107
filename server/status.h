// From absl::Status, which the runtime and the checks speak, to what goes over the wire: a
// grpc::Status whose details are the google.rpc messages that clients and proxies know.
//
// Details travel inside the absl::Status as payloads under their own type URL, so every layer can
// add one.

#ifndef FIRESTEEL_SERVER_STATUS_H_
#define FIRESTEEL_SERVER_STATUS_H_

#include <grpcpp/support/status.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "google/rpc/error_details.pb.h"

namespace firesteel::server {

/// Domain of every google.rpc.ErrorInfo that the server sends.
inline constexpr char kErrorDomain[] = "firesteel";

/// A reason of google.rpc.ErrorInfo and the code it goes with. Names are stable: programs rely on
/// them. docs/errors.md says of each when it comes and what to do, and a test holds the two
/// together.
struct ErrorReason {
  const char* name;
  absl::StatusCode code;
};

inline constexpr ErrorReason kInvalidRequest = {"INVALID_REQUEST",
                                                absl::StatusCode::kInvalidArgument};
inline constexpr ErrorReason kMalformedRequest = {"MALFORMED_REQUEST",
                                                  absl::StatusCode::kInvalidArgument};
inline constexpr ErrorReason kModelNotFound = {"MODEL_NOT_FOUND", absl::StatusCode::kNotFound};
inline constexpr ErrorReason kOverloaded = {"OVERLOADED", absl::StatusCode::kResourceExhausted};
inline constexpr ErrorReason kExceedsCapacity = {"EXCEEDS_CAPACITY",
                                                 absl::StatusCode::kResourceExhausted};
inline constexpr ErrorReason kTooManyRequests = {"TOO_MANY_REQUESTS",
                                                 absl::StatusCode::kResourceExhausted};
inline constexpr ErrorReason kTokensUsedUp = {"TOKENS_USED_UP",
                                              absl::StatusCode::kResourceExhausted};
inline constexpr ErrorReason kTokenMissing = {"TOKEN_MISSING", absl::StatusCode::kUnauthenticated};
inline constexpr ErrorReason kTokenUnknown = {"TOKEN_UNKNOWN", absl::StatusCode::kUnauthenticated};
inline constexpr ErrorReason kAdminOnly = {"ADMIN_ONLY", absl::StatusCode::kPermissionDenied};
inline constexpr ErrorReason kModelNotLoadable = {"MODEL_NOT_LOADABLE",
                                                  absl::StatusCode::kFailedPrecondition};
inline constexpr ErrorReason kLastModel = {"LAST_MODEL", absl::StatusCode::kFailedPrecondition};
inline constexpr ErrorReason kLoadInProgress = {"LOAD_IN_PROGRESS", absl::StatusCode::kAborted};
inline constexpr ErrorReason kDraining = {"SERVER_DRAINING", absl::StatusCode::kUnavailable};
inline constexpr ErrorReason kMethodNotFound = {"METHOD_NOT_FOUND",
                                                absl::StatusCode::kUnimplemented};
inline constexpr ErrorReason kCancelled = {"REQUEST_CANCELLED", absl::StatusCode::kCancelled};
inline constexpr ErrorReason kReaderStalled = {"READER_STALLED", absl::StatusCode::kCancelled};
inline constexpr ErrorReason kDeadlineExceeded = {"DEADLINE_EXCEEDED",
                                                  absl::StatusCode::kDeadlineExceeded};
inline constexpr ErrorReason kInternalError = {"INTERNAL_ERROR", absl::StatusCode::kInternal};

/// All of them.
inline constexpr ErrorReason kErrorReasons[] = {
    kInvalidRequest,   kMalformedRequest, kModelNotFound,    kOverloaded,   kExceedsCapacity,
    kTooManyRequests,  kTokensUsedUp,     kTokenMissing,     kTokenUnknown, kAdminOnly,
    kModelNotLoadable, kLastModel,        kLoadInProgress,   kDraining,     kMethodNotFound,
    kCancelled,        kReaderStalled,    kDeadlineExceeded, kInternalError};

/// Collects everything that is wrong in a request, so that its sender can mend it in one go. Only
/// the first few go over the wire, at most kMaxListed and kMaxListedBytes: all of them together
/// must fit into the trailing metadata of an answer (8 KiB), which holds them in base64 beside a
/// message whose characters may take three bytes each.
class FieldViolations {
 public:
  static constexpr size_t kMaxListed = 10;
  static constexpr size_t kMaxListedBytes = 2500;

  /// `field` is a path into the request, e.g. "stopping.stop[2]".
  void Add(absl::string_view field, absl::string_view description);

  bool empty() const { return count_ == 0; }
  size_t count() const { return count_; }

  /// OK where nothing is wrong, else InvalidArgument with a google.rpc.BadRequest.
  absl::Status ToStatus() const;

 private:
  google::rpc::BadRequest bad_request_;
  size_t count_ = 0;
};

/// InvalidArgument for a single field.
absl::Status InvalidField(absl::string_view field, absl::string_view description);

/// InvalidArgument for bytes that are no message of the method's type.
absl::Status MalformedRequest();

/// NotFound for a model that is not loaded.
absl::Status ModelNotFound(absl::string_view name);

/// A refusal of that reason: its code, its google.rpc.ErrorInfo, and a message for people.
absl::Status Refusal(const ErrorReason& reason, absl::string_view message);

/// A refusal because of the quota of a client.
absl::Status QuotaRefusal(const ErrorReason& reason, absl::string_view client,
                          absl::string_view message);

/// The reason that goes over the wire with `status`, which is not OK.
std::string ReasonOf(const absl::Status& status);

/// `status` with the hint that the same call may go through after `delay`.
absl::Status WithRetryDelay(absl::Status status, absl::Duration delay);

/// What a client's retry policy is told in the trailer grpc-retry-pushback-ms: the hint in
/// milliseconds where `status` has one, −1 (never) where the same call can't ever go through though
/// its code says that it might, nothing otherwise.
std::optional<int64_t> RetryPushbackMs(const absl::Status& status);

/// A string from outside as it may appear in a message or a log line: quoted, escaped, cut after 64
/// bytes.
std::string Quoted(absl::string_view value);

/// What goes over the wire: code, message, and as details every google.rpc payload, an ErrorInfo (a
/// reason by code where none was given) and a RetryInfo where a wait was suggested
/// (kRetryAfterPayload of the engine, WithRetryDelay).
grpc::Status ToGrpcStatus(const absl::Status& status);

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_STATUS_H_
