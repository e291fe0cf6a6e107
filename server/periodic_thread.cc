#include "server/periodic_thread.h"

#include <utility>

#include "absl/time/clock.h"

namespace firesteel::server {

PeriodicThread::PeriodicThread(absl::Duration period, std::function<void()> function)
    : period_(period), function_(std::move(function)), thread_([this] { Main(); }) {}

PeriodicThread::~PeriodicThread() {
  {
    MutexLock lock(&mutex_);
    stopping_ = true;
    stop_.NotifyAll();
  }
  thread_.join();
}

void PeriodicThread::Main() {
  while (true) {
    {
      MutexLock lock(&mutex_);
      const absl::Time next = absl::Now() + period_;
      while (!stopping_ && stop_.WaitUntil(&mutex_, next)) {
      }
      if (stopping_) return;
    }
    function_();
  }
}

}  // namespace firesteel::server
