#include "server/delivery_thread.h"

#include <utility>

namespace firesteel::server {

DeliveryThread::DeliveryThread() : thread_([this] { Main(); }) {}

DeliveryThread::~DeliveryThread() {
  {
    MutexLock lock(&mutex_);
    stopping_ = true;
    changed_.NotifyAll();
  }
  thread_.join();
}

void DeliveryThread::Schedule(std::shared_ptr<Deliverable> item) {
  MutexLock lock(&mutex_);
  queue_.push_back(std::move(item));
  changed_.NotifyAll();
}

void DeliveryThread::Main() {
  std::vector<std::shared_ptr<Deliverable>> batch;
  while (true) {
    {
      MutexLock lock(&mutex_);
      while (!stopping_ && queue_.empty()) changed_.Wait(&mutex_);
      if (queue_.empty()) return;
      batch.swap(queue_);
    }
    for (const auto& item : batch) item->Deliver();
    batch.clear();
  }
}

}  // namespace firesteel::server
