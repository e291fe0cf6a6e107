// A thread that does one thing again and again.

#ifndef FIRESTEEL_SERVER_PERIODIC_THREAD_H_
#define FIRESTEEL_SERVER_PERIODIC_THREAD_H_

#include <functional>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/time/time.h"
#include "runtime/threading/mutex.h"

namespace firesteel::server {

/// Calls a function every `period` from its making until its end, which waits for a call under way.
class PeriodicThread {
 public:
  PeriodicThread(absl::Duration period, std::function<void()> function);
  ~PeriodicThread();
  PeriodicThread(const PeriodicThread&) = delete;
  PeriodicThread& operator=(const PeriodicThread&) = delete;

 private:
  void Main() ABSL_LOCKS_EXCLUDED(mutex_);

  const absl::Duration period_;
  const std::function<void()> function_;
  Mutex mutex_;
  CondVar stop_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;  // last: it uses the others
};

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_PERIODIC_THREAD_H_
