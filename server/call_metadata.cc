#include "server/call_metadata.h"

#include <algorithm>
#include <chrono>
#include <cstdint>

#include "absl/random/random.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/status.h"

namespace firesteel::server {
namespace {

constexpr size_t kMaxLength = 128;
constexpr absl::Duration kDeadlineSlack = absl::Milliseconds(5);

// The first value of a key; empty where there is none.
std::string FirstValue(const grpc::ServerContextBase& context, const char* key) {
  const auto& metadata = context.client_metadata();
  const auto entry = metadata.find(key);
  return entry == metadata.end() ? "" : std::string(entry->second.data(), entry->second.size());
}

}  // namespace

bool CancelledByDeadline(absl::Time deadline) { return absl::Now() + kDeadlineSlack >= deadline; }

bool IsRequestId(absl::string_view text) {
  return !text.empty() && text.size() <= kMaxLength &&
         std::all_of(text.begin(), text.end(),
                     [](unsigned char c) { return c > 0x20 && c < 0x7F; });
}

bool IsTraceparent(absl::string_view text) {
  return !text.empty() && text.size() <= kMaxLength &&
         std::all_of(text.begin(), text.end(), [](unsigned char c) {
           return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f') || c == '-';
         });
}

std::string NewRequestId() {
  thread_local absl::BitGen generator;
  return absl::StrCat(absl::Hex(absl::Uniform<uint64_t>(generator), absl::kZeroPad16),
                      absl::Hex(absl::Uniform<uint64_t>(generator), absl::kZeroPad16));
}

CallMetadata ReadCallMetadata(const grpc::ServerContextBase& context) {
  CallMetadata out;
  out.request_id = FirstValue(context, kRequestIdKey);
  if (!IsRequestId(out.request_id)) out.request_id = NewRequestId();
  out.traceparent = FirstValue(context, "traceparent");
  if (!IsTraceparent(out.traceparent)) out.traceparent.clear();
  out.peer = context.peer();
  const auto deadline = context.deadline();
  if (deadline != std::chrono::system_clock::time_point::max()) {
    out.deadline = absl::FromChrono(deadline);
  }
  return out;
}

void AddTrailers(const CallMetadata& metadata, const absl::Status& status,
                 grpc::ServerContextBase* context) {
  context->AddTrailingMetadata(kRequestIdKey, metadata.request_id);
  if (const auto ms = RetryPushbackMs(status)) {
    context->AddTrailingMetadata("grpc-retry-pushback-ms", absl::StrCat(*ms));
  }
}

}  // namespace firesteel::server
