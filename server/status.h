// From absl::Status, which the runtime and the checks speak, to what goes over the wire: a
// grpc::Status whose details are the google.rpc messages that clients and proxies know.
//
// Details travel inside the absl::Status as payloads under their own type URL, so every layer can
// add one.

#ifndef FIRESTEEL_SERVER_STATUS_H_
#define FIRESTEEL_SERVER_STATUS_H_

#include <grpcpp/support/status.h>

#include <cstddef>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "google/rpc/error_details.pb.h"

namespace firesteel::server {

/// Domain of every google.rpc.ErrorInfo that the server sends.
inline constexpr char kErrorDomain[] = "firesteel";

/// Reasons of google.rpc.ErrorInfo: stable, programs rely on them.
inline constexpr char kReasonInvalidRequest[] = "INVALID_REQUEST";
inline constexpr char kReasonModelNotFound[] = "MODEL_NOT_FOUND";
inline constexpr char kReasonOverloaded[] = "OVERLOADED";
inline constexpr char kReasonExceedsCapacity[] = "EXCEEDS_CAPACITY";
inline constexpr char kReasonDraining[] = "SERVER_DRAINING";
inline constexpr char kReasonNotSupported[] = "RPC_NOT_SUPPORTED";
inline constexpr char kReasonCancelled[] = "REQUEST_CANCELLED";
inline constexpr char kReasonDeadline[] = "DEADLINE_EXCEEDED";
inline constexpr char kReasonInternal[] = "INTERNAL_ERROR";

/// Collects everything that is wrong in a request, so that its sender can mend it in one go. Only
/// the first kMaxListed go over the wire: all of them together must fit into the trailing metadata
/// of an answer (8 KiB).
class FieldViolations {
 public:
  static constexpr size_t kMaxListed = 10;

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

/// NotFound for a model that is not loaded.
absl::Status ModelNotFound(absl::string_view name);

/// Unimplemented for a method of the API that this version lacks, e.g. "GenerationService.Score".
absl::Status RpcNotSupported(absl::string_view method);

/// `status` with a google.rpc.ErrorInfo of this reason.
absl::Status WithReason(absl::Status status, absl::string_view reason);

/// A string from outside as it may appear in a message or a log line: quoted, escaped, cut after 64
/// bytes.
std::string Quoted(absl::string_view value);

/// What goes over the wire: code, message, and as details every google.rpc payload, an ErrorInfo (a
/// reason by code where none was given) and a RetryInfo where the engine suggested a wait
/// (kRetryAfterPayload).
grpc::Status ToGrpcStatus(const absl::Status& status);

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_STATUS_H_
