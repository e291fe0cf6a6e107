#include "server/delivery_thread.h"

#include <utility>

namespace firesteel::server {

DeliveryThread::DeliveryThread() : thread_([this] { Main(); }) {}

DeliveryThread::~DeliveryThread() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
  }
  thread_.join();
}

void DeliveryThread::Schedule(std::shared_ptr<Deliverable> item) {
  absl::MutexLock lock(&mutex_);
  queue_.push_back(std::move(item));
}

void DeliveryThread::Main() {
  std::vector<std::shared_ptr<Deliverable>> batch;
  const auto ready = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return stopping_ || !queue_.empty();
  };
  while (true) {
    {
      absl::MutexLock lock(&mutex_);
      mutex_.Await(absl::Condition(&ready));
      if (queue_.empty()) return;
      batch.swap(queue_);
    }
    for (const auto& item : batch) item->Deliver();
    batch.clear();
  }
}

}  // namespace firesteel::server
