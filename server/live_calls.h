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
  /// The server drains: ends the call as soon as it only waits for its client. Must not block.
  virtual void EndOnceIdle() {}
};

/// Thread-safe. Calls its calls without holding its lock.
class LiveCalls {
 public:
  /// Keeps the call alive until Leave.
  void Enter(const std::shared_ptr<LiveCall>& call) ABSL_LOCKS_EXCLUDED(mutex_) {
    bool draining = false;
    {
      MutexLock lock(&mutex_);
      calls_.emplace(call.get(), call);
      draining = draining_;
    }
    if (draining) call->EndOnceIdle();
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
    for (const auto& call : All()) call->EndIfStalled(now);
  }
  /// Those that come later, too.
  void EndIdle() ABSL_LOCKS_EXCLUDED(mutex_) {
    {
      MutexLock lock(&mutex_);
      draining_ = true;
    }
    for (const auto& call : All()) call->EndOnceIdle();
  }

 private:
  std::vector<std::shared_ptr<LiveCall>> All() ABSL_LOCKS_EXCLUDED(mutex_) {
    std::vector<std::shared_ptr<LiveCall>> calls;
    MutexLock lock(&mutex_);
    calls.reserve(calls_.size());
    for (const auto& [key, call] : calls_) calls.push_back(call);
    return calls;
  }

  Mutex mutex_;
  CondVar none_;
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  std::unordered_map<LiveCall*, std::shared_ptr<LiveCall>> calls_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_LIVE_CALLS_H_
