#include "runtime/scheduler/admission.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"

namespace firesteel {
namespace {

// Weight of the latest request in running means.
constexpr double kMeanWeight = 0.1;

absl::Status Exhausted(absl::string_view message, absl::Duration retry) {
  absl::Status status = absl::ResourceExhaustedError(message);
  const std::string milliseconds = absl::StrCat(absl::ToInt64Milliseconds(retry));
  // A view: clang and gcc disagree on the mangled name of Cord's constructor from std::string.
  status.SetPayload(kRetryAfterPayload, absl::Cord(absl::string_view(milliseconds)));
  return status;
}

}  // namespace

std::optional<Refusal> Admission::Check(const GenerationRequest& request, absl::Time now) const {
  if (requests_ >= options_.max_queue_requests) {
    return Refusal{RejectionReason::kQueueFull,
                   Exhausted(absl::StrCat("queue: ", requests_,
                                          " requests wait, the limit is max-queue-requests ",
                                          options_.max_queue_requests),
                             RetryAfter())};
  }
  if (prompt_tokens_ + request.prompt.size() > options_.max_queue_tokens) {
    return Refusal{RejectionReason::kQueueTokens,
                   Exhausted(absl::StrCat("queue: ", prompt_tokens_, " prompt tokens wait and ",
                                          request.prompt.size(), " more exceed max-queue-tokens ",
                                          options_.max_queue_tokens),
                             RetryAfter())};
  }
  return CheckDeadline(request, now);
}

// Work that can't be done in time is not begun: it would only take time from others.
std::optional<Refusal> Admission::CheckDeadline(const GenerationRequest& request,
                                                absl::Time now) const {
  if (request.deadline == absl::InfiniteFuture() || !cost_.has_value()) return std::nullopt;
  Load load = running_;
  load.waiting = sequences_;
  load.prompt_tokens += prompt_tokens_;
  const double ahead = load.sequences + load.waiting;
  load.mean_answer =
      mean_answer_share_ * (running_answer_tokens_ + answer_tokens_) / std::max(1.0, ahead);
  load.max_batch_size = options_.max_batch_size;
  if (mean_answer_tokens_ > 0) load.prompt_per_answer = mean_prompt_tokens_ / mean_answer_tokens_;
  const double share = request.stopping.ignore_eos ? 1.0 : mean_answer_share_;
  const absl::Duration estimate =
      EstimateCompletion(*cost_, load, static_cast<uint32_t>(request.prompt.size()),
                         share * request.max_tokens, request.n);
  const absl::Duration left = std::max(request.deadline - now, absl::ZeroDuration());
  if (estimate <= left) return std::nullopt;
  return Refusal{RejectionReason::kDeadline,
                 absl::DeadlineExceededError(absl::StrCat(
                     "deadline: ", absl::ToDoubleSeconds(left),
                     " s are left, and at the speed measured so far the request would take about ",
                     absl::ToDoubleSeconds(estimate), " s, with ", load.sequences,
                     " sequences running and ", load.waiting, " waiting"))};
}

// The queue drains by one request each time a place in the batch becomes free.
absl::Duration Admission::RetryAfter() const {
  const double seconds = mean_service_seconds_ * (1.0 + requests_) / options_.max_batch_size;
  return std::clamp(absl::Seconds(seconds), absl::Milliseconds(50), absl::Seconds(60));
}

void Admission::Count(const GenerationRequest& request, int sign) {
  requests_ += static_cast<uint32_t>(sign);
  sequences_ += static_cast<uint32_t>(sign) * request.n;
  prompt_tokens_ += static_cast<uint64_t>(sign) * request.prompt.size();
  answer_tokens_ += sign * static_cast<double>(request.max_tokens) * request.n;
}

void Admission::LearnEnd(const GenerationRequest& request, const GenerationResult& result) {
  const double seconds = absl::ToDoubleSeconds(result.timings.total - result.timings.queue);
  mean_service_seconds_ += kMeanWeight * (seconds - mean_service_seconds_);
  const double computed = result.usage.prompt_tokens - result.usage.cached_tokens;
  mean_prompt_tokens_ += kMeanWeight * (computed - mean_prompt_tokens_);
  mean_answer_tokens_ += kMeanWeight * (result.usage.generated_tokens - mean_answer_tokens_);
  const bool by_itself = result.reason == FinishReason::kLength ||
                         result.reason == FinishReason::kEos ||
                         result.reason == FinishReason::kStop;
  if (!by_itself || request.stopping.ignore_eos || request.max_tokens == 0) return;
  const double share =
      result.usage.generated_tokens / (static_cast<double>(request.max_tokens) * request.n);
  mean_answer_share_ += kMeanWeight * (share - mean_answer_share_);
}

}  // namespace firesteel
