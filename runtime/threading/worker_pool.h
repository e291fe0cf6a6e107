// The process's only compute threads: a fixed team that runs one job at a time, each member the
// same code on its own share.

#ifndef FIRESTEEL_RUNTIME_THREADING_WORKER_POOL_H_
#define FIRESTEEL_RUNTIME_THREADING_WORKER_POOL_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "runtime/threading/mutex.h"

namespace firesteel {

class WorkerPool;

/// A half-open range of indices.
struct IndexRange {
  size_t begin = 0;
  size_t end = 0;
};

/// One member of the team inside a job.
class Worker {
 public:
  size_t index() const { return index_; }  // 0 … team size − 1; 0 is the thread that called Run
  size_t team_size() const;

  /// Waits until every member has called Barrier as often as this one. What was written before it
  /// is visible to all after it. Spins for a bounded time, then sleeps.
  void Barrier();

  /// This member's contiguous share of [0, n), cut at multiples of `grain`. The shares of all
  /// members are disjoint and cover [0, n).
  IndexRange Share(size_t n, size_t grain = 1) const;

 private:
  friend class WorkerPool;
  Worker(WorkerPool* pool, size_t index) : pool_(pool), index_(index) {}
  WorkerPool* const pool_;
  const size_t index_;
};

/// Thread-safe: callers of Run take turns, so several engines may share one pool.
class WorkerPool {
 public:
  using Job = std::function<void(Worker&)>;

  /// A team of `num_threads` ≥ 1: the caller of Run and num_threads − 1 threads of its own.
  explicit WorkerPool(size_t num_threads);
  /// Joins the threads. No Run may be under way.
  ~WorkerPool();
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  size_t num_threads() const { return num_threads_; }

  /// Runs `job` on every member of the team and returns when all are done. The job must not throw
  /// and must not call Run.
  void Run(const Job& job) ABSL_LOCKS_EXCLUDED(run_mutex_);

 private:
  friend class Worker;
  void ThreadMain(size_t index);
  void ArriveAndWait();

  const size_t num_threads_;
  const int spins_;  // before a waiting member sleeps
  Mutex run_mutex_;  // one job at a time

  // Self-synchronised. A job is published by raising job_epoch_; the closing barrier hands it back.
  const Job* job_ = nullptr;
  std::atomic<uint32_t> job_epoch_{0};
  std::atomic<bool> stopping_{false};
  std::atomic<uint32_t> barrier_arrived_{0};
  std::atomic<uint32_t> barrier_epoch_{0};

  std::vector<std::thread> threads_;
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_THREADING_WORKER_POOL_H_
