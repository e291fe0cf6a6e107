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

// Hints when to retry are neither a busy loop nor for ever.
constexpr absl::Duration kMinRetry = absl::Milliseconds(50);
constexpr absl::Duration kMaxRetry = absl::Seconds(60);

absl::Status Exhausted(absl::string_view message, absl::Duration retry) {
  absl::Status status = absl::ResourceExhaustedError(message);
  const std::string milliseconds =
      absl::StrCat(absl::ToInt64Milliseconds(std::clamp(retry, kMinRetry, kMaxRetry)));
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
  return CheckTime(request, now);
}

// As WaitingQueue orders lines: what is more important goes first, equal clients take turns. Ageing
// is left out: it moves one request in a long while.
uint32_t Admission::SequencesBefore(const GenerationRequest& request) const {
  const auto own = lines_.find({request.priority, request.client});
  const uint32_t own_sequences = own == lines_.end() ? 0 : own->second;
  uint32_t before = 0;
  for (auto line = lines_.lower_bound({request.priority, ""}); line != lines_.end(); ++line) {
    const bool equal = line->first.first == request.priority;
    before += equal ? std::min(line->second, own_sequences + request.n) : line->second;
  }
  return before;
}

// What the engine has to do before the request, or beside it.
Load Admission::LoadBefore(const GenerationRequest& request) const {
  Load load = running_;
  load.waiting = SequencesBefore(request);
  if (sequences_ > 0) load.prompt_tokens += prompt_tokens_ * load.waiting / sequences_;
  load.mean_answer = mean_answer_share_ * (running_answer_tokens_ + answer_tokens_) /
                     std::max(1u, running_.sequences + sequences_);
  load.max_batch_size = options_.max_batch_size;
  if (mean_answer_tokens_ > 0) load.prompt_per_answer = mean_prompt_tokens_ / mean_answer_tokens_;
  return load;
}

// Work that comes too late is not begun: it would only take time from others.
std::optional<Refusal> Admission::CheckTime(const GenerationRequest& request,
                                            absl::Time now) const {
  const bool wait_is_bounded = options_.max_queue_wait > absl::ZeroDuration();
  const bool has_deadline = request.deadline != absl::InfiniteFuture();
  if (!cost_.has_value() || !(wait_is_bounded || has_deadline)) return std::nullopt;
  const Load load = LoadBefore(request);
  const double share = request.stopping.ignore_eos ? 1.0 : mean_answer_share_;
  const ServiceEstimate estimate =
      EstimateService(*cost_, load, static_cast<uint32_t>(request.prompt.size()),
                      share * request.max_tokens, request.n);
  const std::string because = absl::StrCat(" s, with ", load.sequences, " sequences running and ",
                                           load.waiting, " waiting before it");
  const absl::Duration left = std::max(request.deadline - now, absl::ZeroDuration());
  if (has_deadline && estimate.total > left) {
    return Refusal{
        RejectionReason::kDeadline,
        absl::DeadlineExceededError(absl::StrCat(
            "deadline: ", absl::ToDoubleSeconds(left),
            " s are left, and at the speed measured so far the request would take about ",
            absl::ToDoubleSeconds(estimate.total), because))};
  }
  if (wait_is_bounded && estimate.wait > options_.max_queue_wait) {
    return Refusal{
        RejectionReason::kQueueWait,
        Exhausted(absl::StrCat("queue: at the speed measured so far the request would wait about ",
                               absl::ToDoubleSeconds(estimate.wait), because,
                               "; the limit is max-queue-ms ",
                               absl::ToDoubleMilliseconds(options_.max_queue_wait)),
                  estimate.wait - options_.max_queue_wait)};
  }
  return std::nullopt;
}

// The queue drains by one request each time a place in the batch becomes free.
absl::Duration Admission::RetryAfter() const {
  return absl::Seconds(mean_service_seconds_ * (1.0 + requests_) / options_.max_batch_size);
}

void Admission::Count(const GenerationRequest& request, int sign) {
  requests_ += static_cast<uint32_t>(sign);
  sequences_ += static_cast<uint32_t>(sign) * request.n;
  prompt_tokens_ += static_cast<uint64_t>(sign) * request.prompt.size();
  answer_tokens_ += sign * static_cast<double>(request.max_tokens) * request.n;
  const std::pair line(request.priority, request.client);
  if ((lines_[line] += static_cast<uint32_t>(sign) * request.n) == 0) lines_.erase(line);
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
