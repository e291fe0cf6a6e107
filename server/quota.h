// What one client may use: requests at a time, tokens a minute.

#ifndef FIRESTEEL_SERVER_QUOTA_H_
#define FIRESTEEL_SERVER_QUOTA_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "runtime/scheduler/clock.h"
#include "runtime/threading/mutex.h"

namespace firesteel::server {

/// 0: no limit.
struct QuotaLimits {
  uint32_t max_concurrent_requests = 0;
  uint64_t tokens_per_minute = 0;
};

/// The account of one client. Tokens of a prompt are charged when its request is admitted,
/// generated ones when it ends, so a request may overdraw the account: then the next has to wait
/// until the debt is paid off. Never more than a minute's worth is saved up. Thread-safe.
class Quota : public std::enable_shared_from_this<Quota> {
 public:
  /// One request's place; gives it back when it goes.
  class Lease {
   public:
    explicit Lease(std::shared_ptr<Quota> quota) : quota_(std::move(quota)) {}
    ~Lease() { quota_->Release(); }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;

    void Charge(uint64_t tokens) { quota_->Charge(tokens); }

   private:
    const std::shared_ptr<Quota> quota_;
  };

  /// `name` is the client's, for messages. `clock` outlives it.
  Quota(std::string name, const QuotaLimits& limits, const Clock* clock);

  /// From now on; what was used so far stays used.
  void SetLimits(const QuotaLimits& limits) ABSL_LOCKS_EXCLUDED(mutex_);

  /// A place for one more request. ResourceExhausted with a google.rpc.QuotaFailure and a RetryInfo
  /// where a limit is reached.
  absl::StatusOr<std::unique_ptr<Lease>> Admit() ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  void Charge(uint64_t tokens) ABSL_LOCKS_EXCLUDED(mutex_);
  void Release() ABSL_LOCKS_EXCLUDED(mutex_);
  void Refill() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::string name_;
  const Clock* const clock_;

  Mutex mutex_;
  QuotaLimits limits_ ABSL_GUARDED_BY(mutex_);
  uint32_t running_ ABSL_GUARDED_BY(mutex_) = 0;
  double tokens_ ABSL_GUARDED_BY(mutex_) = 0;  // left; negative: a debt
  absl::Time refilled_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_QUOTA_H_
