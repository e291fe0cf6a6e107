#include "server/quota.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/status.h"

namespace firesteel::server {
namespace {

// A place becomes free when some request ends; nobody knows when.
constexpr absl::Duration kPlaceRetry = absl::Seconds(1);

}  // namespace

Quota::Quota(std::string name, const QuotaLimits& limits, const Clock* clock)
    : name_(std::move(name)),
      clock_(clock),
      limits_(limits),
      tokens_(static_cast<double>(limits.tokens_per_minute)),
      refilled_(clock->Now()) {}

void Quota::Refill() {
  const absl::Time now = clock_->Now();
  const double rate = static_cast<double>(limits_.tokens_per_minute) / 60;
  tokens_ = std::min(tokens_ + rate * absl::ToDoubleSeconds(now - refilled_),
                     static_cast<double>(limits_.tokens_per_minute));
  refilled_ = now;
}

void Quota::SetLimits(const QuotaLimits& limits) {
  MutexLock lock(&mutex_);
  Refill();
  // What was spent of the old allowance is spent of the new one.
  tokens_ += static_cast<double>(limits.tokens_per_minute) -
             static_cast<double>(limits_.tokens_per_minute);
  limits_ = limits;
}

absl::StatusOr<std::unique_ptr<Quota::Lease>> Quota::Admit() {
  MutexLock lock(&mutex_);
  if (limits_.max_concurrent_requests > 0 && running_ >= limits_.max_concurrent_requests) {
    const std::string message = absl::StrCat("client ", Quoted(name_), " has ", running_,
                                             " requests under way, as many as it may");
    return WithRetryDelay(QuotaRefusal(kTooManyRequests, name_, message), kPlaceRetry);
  }
  if (limits_.tokens_per_minute > 0) {
    Refill();
    if (tokens_ <= 0) {
      const double seconds = (1 - tokens_) * 60 / static_cast<double>(limits_.tokens_per_minute);
      const std::string message = absl::StrCat("client ", Quoted(name_), " has used up its ",
                                               limits_.tokens_per_minute, " tokens a minute");
      return WithRetryDelay(QuotaRefusal(kTokensUsedUp, name_, message), absl::Seconds(seconds));
    }
  }
  ++running_;
  return std::make_unique<Lease>(shared_from_this());
}

void Quota::Charge(uint64_t tokens) {
  MutexLock lock(&mutex_);
  Refill();
  tokens_ -= static_cast<double>(tokens);
}

void Quota::Release() {
  MutexLock lock(&mutex_);
  --running_;
}

}  // namespace firesteel::server
