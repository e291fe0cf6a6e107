#include "server/status.h"

#include <algorithm>
#include <cstdint>
#include <string>

#include "absl/strings/cord.h"
#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "google/rpc/status.pb.h"
#include "runtime/scheduler/engine.h"

namespace firesteel::server {
namespace {

constexpr char kTypePrefix[] = "type.googleapis.com/";
constexpr size_t kMaxDescriptionBytes = 300;
constexpr size_t kMaxMessageBytes = 1000;
constexpr size_t kMaxQuotedBytes = 64;

template <typename Message>
std::string TypeUrl() {
  return absl::StrCat(kTypePrefix, Message::descriptor()->full_name());
}

template <typename Message>
void SetPayload(const Message& message, absl::Status* status) {
  status->SetPayload(TypeUrl<Message>(),
                     absl::Cord(absl::string_view(message.SerializeAsString())));
}

// Proto strings must be UTF-8 and trailers are small: plain ASCII, and not too much of it, escapes
// included.
std::string WireText(absl::string_view text, size_t max_bytes) {
  const absl::string_view start = text.substr(0, max_bytes);
  const bool plain = std::all_of(start.begin(), start.end(),
                                 [](unsigned char c) { return c >= 0x20 && c < 0x7F; });
  if (plain) return std::string(start);
  std::string out;
  for (size_t i = 0; i < start.size(); ++i) {
    const std::string escaped = absl::CEscape(start.substr(i, 1));
    if (out.size() + escaped.size() > max_bytes) break;
    out += escaped;
  }
  return out;
}

// Of statuses that come from the engine, which knows no reasons.
const ErrorReason& DefaultReason(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
      return kInvalidRequest;
    case absl::StatusCode::kNotFound:
      return kModelNotFound;
    case absl::StatusCode::kResourceExhausted:
      return status.GetPayload(kRetryAfterPayload) ? kOverloaded : kExceedsCapacity;
    case absl::StatusCode::kUnavailable:
      return kDraining;
    case absl::StatusCode::kCancelled:
      return kCancelled;
    case absl::StatusCode::kDeadlineExceeded:
      return kDeadlineExceeded;
    default:
      return kInternalError;
  }
}

google::rpc::ErrorInfo MakeErrorInfo(const ErrorReason& reason) {
  google::rpc::ErrorInfo info;
  info.set_reason(reason.name);
  info.set_domain(kErrorDomain);
  return info;
}

// The suggested wait, if there is one.
std::optional<int64_t> RetryMilliseconds(const absl::Status& status) {
  const auto payload = status.GetPayload(kRetryAfterPayload);
  if (!payload) return std::nullopt;
  int64_t ms = 0;
  if (!absl::SimpleAtoi(std::string(*payload), &ms)) ms = 1000;
  return std::clamp<int64_t>(ms, 1, 600'000);
}

google::rpc::RetryInfo MakeRetryInfo(int64_t ms) {
  google::rpc::RetryInfo retry;
  retry.mutable_retry_delay()->set_seconds(ms / 1000);
  retry.mutable_retry_delay()->set_nanos(static_cast<int32_t>(ms % 1000 * 1'000'000));
  return retry;
}

}  // namespace

void FieldViolations::Add(absl::string_view field, absl::string_view description) {
  if (++count_ > kMaxListed) return;
  auto* violation = bad_request_.add_field_violations();
  violation->set_field(WireText(field, kMaxDescriptionBytes));
  violation->set_description(WireText(description, kMaxDescriptionBytes));
  if (bad_request_.ByteSizeLong() > kMaxListedBytes) {
    bad_request_.mutable_field_violations()->RemoveLast();
  }
}

absl::Status FieldViolations::ToStatus() const {
  if (empty()) return absl::OkStatus();
  const auto& first = bad_request_.field_violations(0);
  std::string message = absl::StrCat(first.field(), ": ", first.description());
  if (count_ > 1) absl::StrAppend(&message, " (and ", count_ - 1, " more)");
  absl::Status status = Refusal(kInvalidRequest, message);
  SetPayload(bad_request_, &status);
  return status;
}

absl::Status InvalidField(absl::string_view field, absl::string_view description) {
  FieldViolations violations;
  violations.Add(field, description);
  return violations.ToStatus();
}

absl::Status MalformedRequest() {
  return Refusal(kMalformedRequest,
                 "the request is not a valid message of its type (strings must be UTF-8)");
}

absl::Status ModelNotFound(absl::string_view name) {
  return Refusal(kModelNotFound,
                 absl::StrCat("model: no model named ", Quoted(name), " is loaded"));
}

absl::Status Refusal(const ErrorReason& reason, absl::string_view message) {
  absl::Status status(reason.code, message);
  SetPayload(MakeErrorInfo(reason), &status);
  return status;
}

absl::Status QuotaRefusal(const ErrorReason& reason, absl::string_view client,
                          absl::string_view message) {
  absl::Status status = Refusal(reason, message);
  google::rpc::QuotaFailure failure;
  auto* const violation = failure.add_violations();
  violation->set_subject(WireText(absl::StrCat("client:", client), kMaxDescriptionBytes));
  violation->set_description(WireText(message, kMaxDescriptionBytes));
  SetPayload(failure, &status);
  return status;
}

std::string ReasonOf(const absl::Status& status) {
  const auto payload = status.GetPayload(TypeUrl<google::rpc::ErrorInfo>());
  google::rpc::ErrorInfo info;
  if (payload && info.ParseFromString(std::string(*payload))) return info.reason();
  return DefaultReason(status).name;
}

absl::Status WithRetryDelay(absl::Status status, absl::Duration delay) {
  const std::string ms =
      absl::StrCat(absl::ToInt64Milliseconds(absl::Ceil(delay, absl::Milliseconds(1))));
  status.SetPayload(kRetryAfterPayload, absl::Cord(absl::string_view(ms)));
  return status;
}

std::optional<int64_t> RetryPushbackMs(const absl::Status& status) {
  if (const auto ms = RetryMilliseconds(status)) return ms;
  if (status.code() == absl::StatusCode::kResourceExhausted) return -1;
  return std::nullopt;
}

std::string Quoted(absl::string_view value) {
  if (value.size() <= kMaxQuotedBytes) return absl::StrCat("\"", absl::CEscape(value), "\"");
  return absl::StrCat("\"", absl::CEscape(value.substr(0, kMaxQuotedBytes)), "...\" (",
                      value.size(), " bytes)");
}

grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  google::rpc::Status wire;
  wire.set_code(static_cast<int32_t>(status.code()));
  wire.set_message(WireText(status.message(), kMaxMessageBytes));

  status.ForEachPayload([&wire](absl::string_view type_url, const absl::Cord& payload) {
    if (type_url.rfind("type.googleapis.com/google.rpc.", 0) != 0) return;
    auto* detail = wire.add_details();
    detail->set_type_url(std::string(type_url));
    detail->set_value(std::string(payload));
  });
  if (!status.GetPayload(TypeUrl<google::rpc::ErrorInfo>())) {
    wire.add_details()->PackFrom(MakeErrorInfo(DefaultReason(status)));
  }
  if (const auto ms = RetryMilliseconds(status)) wire.add_details()->PackFrom(MakeRetryInfo(*ms));
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), wire.message(),
                      wire.SerializeAsString());
}

}  // namespace firesteel::server
