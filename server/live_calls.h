// The calls that are under way: kept alive here, waited for by a drain, watched for readers that do
// not read.

#ifndef FIRESTEEL_SERVER_LIVE_CALLS_H_
#define FIRESTEEL_SERVER_LIVE_CALLS_H_

#include <memory>
#include <unordered_map>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/time/time.h"
#include "runtime/threading/mutex.h"

namespace firesteel::server {

/// A call as this file sees it.
class LiveCall {
 public:
  virtual ~LiveCall() = default;
  /// Ends the call if its reader has not taken a write for too long. Must not block.
  virtual void EndIfStalled(absl::Time now) = 0;
};

/// Thread-safe. Calls its calls without holding its lock.
class LiveCalls {
 public:
  /// Keeps the call alive until Leave.
  void Enter(std::shared_ptr<LiveCall> call) ABSL_LOCKS_EXCLUDED(mutex_) {
    MutexLock lock(&mutex_);
    LiveCall* const key = call.get();
    calls_.emplace(key, std::move(call));
  }
  /// The call may be gone afterwards.
  void Leave(LiveCall* call) ABSL_LOCKS_EXCLUDED(mutex_) {
    std::shared_ptr<LiveCall> last;  // let go of outside the lock
    MutexLock lock(&mutex_);
    const auto entry = calls_.find(call);
    last = std::move(entry->second);
    calls_.erase(entry);
    if (calls_.empty()) none_.NotifyAll();
  }
  /// False where the deadline passed first.
  bool WaitForNone(absl::Time deadline) ABSL_LOCKS_EXCLUDED(mutex_) {
    MutexLock lock(&mutex_);
    while (!calls_.empty()) {
      if (!none_.WaitUntil(&mutex_, deadline)) return calls_.empty();
    }
    return true;
  }
  void EndStalled(absl::Time now) ABSL_LOCKS_EXCLUDED(mutex_) {
    std::vector<std::shared_ptr<LiveCall>> calls;
    {
      MutexLock lock(&mutex_);
      calls.reserve(calls_.size());
      for (const auto& [key, call] : calls_) calls.push_back(call);
    }
    for (const auto& call : calls) call->EndIfStalled(now);
  }

 private:
  Mutex mutex_;
  CondVar none_;
  std::unordered_map<LiveCall*, std::shared_ptr<LiveCall>> calls_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_LIVE_CALLS_H_
