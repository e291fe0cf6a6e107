// How many calls are under way, so that a drain can wait for their last bytes.

#ifndef FIRESTEEL_SERVER_LIVE_CALLS_H_
#define FIRESTEEL_SERVER_LIVE_CALLS_H_

#include <cstddef>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace firesteel::server {

/// Thread-safe.
class LiveCalls {
 public:
  void Enter() ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    ++count_;
  }
  void Leave() ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    --count_;
  }
  /// False where the deadline passed first.
  bool WaitForNone(absl::Time deadline) ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    const auto none = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return count_ == 0; };
    return mutex_.AwaitWithDeadline(absl::Condition(&none), deadline);
  }

 private:
  absl::Mutex mutex_;
  size_t count_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_LIVE_CALLS_H_
