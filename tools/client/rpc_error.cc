#include "tools/client/rpc_error.h"

#include <iterator>
#include <map>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "google/protobuf/any.pb.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "tools/client/format.h"

namespace firesteel::client {
namespace {

// A line of ours for each thing that a detail says.
std::string FormatDetail(const google::protobuf::Any& detail) {
  std::string text;
  if (google::rpc::BadRequest bad_request; detail.UnpackTo(&bad_request)) {
    for (const auto& violation : bad_request.field_violations()) {
      absl::StrAppend(&text, "  field ", violation.field(), ": ", violation.description(), "\n");
    }
  } else if (google::rpc::RetryInfo retry; detail.UnpackTo(&retry)) {
    absl::StrAppend(&text, "  retry after ", ShortDuration(ToDuration(retry.retry_delay())), "\n");
  } else if (google::rpc::QuotaFailure quota; detail.UnpackTo(&quota)) {
    for (const auto& violation : quota.violations()) {
      absl::StrAppend(&text, "  quota ", violation.subject(), ": ", violation.description(), "\n");
    }
  } else if (google::rpc::ErrorInfo info; detail.UnpackTo(&info)) {
    absl::StrAppend(&text, "  reason ", info.reason(), " (", info.domain(), ")");
    // A proto map has no order of its own.
    for (const auto& [key, value] :
         std::map<std::string, std::string>(info.metadata().begin(), info.metadata().end())) {
      absl::StrAppend(&text, " ", key, "=", value);
    }
    text += "\n";
  } else {
    absl::StrAppend(&text, "  detail of type ", detail.type_url(), "\n");
  }
  return text;
}

}  // namespace

std::string StatusCodeName(grpc::StatusCode code) {
  static constexpr const char* kNames[] = {"OK",
                                           "CANCELLED",
                                           "UNKNOWN",
                                           "INVALID_ARGUMENT",
                                           "DEADLINE_EXCEEDED",
                                           "NOT_FOUND",
                                           "ALREADY_EXISTS",
                                           "PERMISSION_DENIED",
                                           "RESOURCE_EXHAUSTED",
                                           "FAILED_PRECONDITION",
                                           "ABORTED",
                                           "OUT_OF_RANGE",
                                           "UNIMPLEMENTED",
                                           "INTERNAL",
                                           "UNAVAILABLE",
                                           "DATA_LOSS",
                                           "UNAUTHENTICATED"};
  const int number = static_cast<int>(code);
  if (number < 0 || number >= static_cast<int>(std::size(kNames))) {
    return absl::StrCat("code ", number);
  }
  return kNames[number];
}

std::string FormatError(const grpc::Status& status) {
  std::string text = absl::StrCat("error: ", StatusCodeName(status.error_code()), ": ",
                                  status.error_message(), "\n");
  if (google::rpc::Status details; details.ParseFromString(status.error_details())) {
    for (const auto& detail : details.details()) text += FormatDetail(detail);
  }
  return text;
}

std::string FormatError(const grpc::Status& status, const grpc::ClientContext& context) {
  std::string text = FormatError(status);
  const auto& metadata = context.GetServerTrailingMetadata();
  if (const auto id = metadata.find("x-request-id"); id != metadata.end()) {
    absl::StrAppend(&text, "  request id ", absl::string_view(id->second.data(), id->second.size()),
                    "\n");
  }
  return text;
}

}  // namespace firesteel::client
