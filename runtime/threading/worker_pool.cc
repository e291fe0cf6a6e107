#include "runtime/threading/worker_pool.h"

#include <algorithm>

#include "runtime/threading/cpu_topology.h"

namespace firesteel {
namespace {

// Pauses before a waiting thread sleeps: some 20 to 100 µs, longer than the phases of a small
// model's layer and than what a scheduler does between two steps, shorter than anybody notices on
// an idle machine.
constexpr int kSpins = 1000;

void Pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Returns once `value` differs from `old`.
void SpinThenWait(const std::atomic<uint32_t>& value, uint32_t old, int spins) {
  for (int i = 0; i < spins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    Pause();
  }
  while (value.load(std::memory_order_acquire) == old) {
    value.wait(old, std::memory_order_acquire);
  }
}

}  // namespace

size_t Worker::team_size() const { return pool_->num_threads(); }

void Worker::Barrier() { pool_->ArriveAndWait(); }

IndexRange Worker::Share(size_t n, size_t grain) const {
  const size_t team = pool_->num_threads();
  const size_t grains = (n + grain - 1) / grain;
  const auto cut = [&](size_t i) { return std::min(n, grains * i / team * grain); };
  return {cut(index_), cut(index_ + 1)};
}

WorkerPool::WorkerPool(size_t num_threads)
    : num_threads_(std::max<size_t>(1, num_threads)),
      // Where the team shares cores, a spinning member only keeps the others from arriving.
      spins_(num_threads_ <= AffinityCpuCount() ? kSpins : 0) {
  threads_.reserve(num_threads_ - 1);
  for (size_t i = 1; i < num_threads_; ++i) {
    threads_.emplace_back([this, i] { ThreadMain(i); });
  }
}

WorkerPool::~WorkerPool() {
  stopping_.store(true, std::memory_order_relaxed);
  job_epoch_.fetch_add(1, std::memory_order_release);
  job_epoch_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void WorkerPool::Run(const Job& job) {
  MutexLock lock(&run_mutex_);
  job_ = &job;
  job_epoch_.fetch_add(1, std::memory_order_release);
  job_epoch_.notify_all();
  Worker worker(this, 0);
  job(worker);
  ArriveAndWait();
}

void WorkerPool::ThreadMain(size_t index) {
  Worker worker(this, index);
  for (uint32_t seen = 0;;) {
    SpinThenWait(job_epoch_, seen, spins_);
    ++seen;  // Run can't publish the next job before this member has finished the last
    if (stopping_.load(std::memory_order_relaxed)) return;
    (*job_)(worker);
    ArriveAndWait();
  }
}

void WorkerPool::ArriveAndWait() {
  if (num_threads_ == 1) return;
  const uint32_t epoch = barrier_epoch_.load(std::memory_order_relaxed);
  if (barrier_arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads_) {
    barrier_arrived_.store(0, std::memory_order_relaxed);
    barrier_epoch_.fetch_add(1, std::memory_order_release);
    barrier_epoch_.notify_all();
  } else {
    SpinThenWait(barrier_epoch_, epoch, spins_);
  }
}

}  // namespace firesteel
