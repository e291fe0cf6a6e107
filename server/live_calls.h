// How many calls are under way, so that a drain can wait for their last bytes.

#ifndef FIRESTEEL_SERVER_LIVE_CALLS_H_
#define FIRESTEEL_SERVER_LIVE_CALLS_H_

#include <cstddef>

#include "absl/base/thread_annotations.h"
#include "absl/time/time.h"
#include "runtime/threading/mutex.h"

namespace firesteel::server {

/// Thread-safe.
class LiveCalls {
 public:
  void Enter() ABSL_LOCKS_EXCLUDED(mutex_) {
    MutexLock lock(&mutex_);
    ++count_;
  }
  void Leave() ABSL_LOCKS_EXCLUDED(mutex_) {
    MutexLock lock(&mutex_);
    if (--count_ == 0) none_.NotifyAll();
  }
  /// False where the deadline passed first.
  bool WaitForNone(absl::Time deadline) ABSL_LOCKS_EXCLUDED(mutex_) {
    MutexLock lock(&mutex_);
    while (count_ != 0) {
      if (!none_.WaitUntil(&mutex_, deadline)) return count_ == 0;
    }
    return true;
  }

 private:
  Mutex mutex_;
  CondVar none_;
  size_t count_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_LIVE_CALLS_H_
