// The thread between the engines and gRPC: what the engine's thread hands out, this one serializes
// and writes, so that the batch never waits for a socket.

#ifndef FIRESTEEL_SERVER_DELIVERY_THREAD_H_
#define FIRESTEEL_SERVER_DELIVERY_THREAD_H_

#include <memory>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "runtime/threading/mutex.h"

namespace firesteel::server {

/// Something with output to write.
class Deliverable {
 public:
  virtual ~Deliverable() = default;
  /// Writes what there is. Must not block.
  virtual void Deliver() = 0;
};

/// Thread-safe. Each Deliverable sees to it that it is scheduled at most once at a time, which
/// bounds the queue by the number of calls. Destruction delivers what is queued, then stops.
class DeliveryThread {
 public:
  DeliveryThread();
  ~DeliveryThread();
  DeliveryThread(const DeliveryThread&) = delete;
  DeliveryThread& operator=(const DeliveryThread&) = delete;

  /// Has the thread call Deliver(), in the order of these calls. Never blocks.
  void Schedule(std::shared_ptr<Deliverable> item) ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  void Main() ABSL_LOCKS_EXCLUDED(mutex_);

  Mutex mutex_;
  CondVar changed_;
  std::vector<std::shared_ptr<Deliverable>> queue_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;  // last: it uses the others
};

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_DELIVERY_THREAD_H_
