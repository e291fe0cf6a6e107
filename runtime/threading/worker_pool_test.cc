#include "runtime/threading/worker_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace firesteel {
namespace {

TEST(WorkerPool, SharesAreDisjointAndCoverEverything) {
  for (size_t threads : {1, 2, 3, 5}) {
    WorkerPool pool(threads);
    for (size_t n : {0, 1, 2, 7, 64, 1000}) {
      for (size_t grain : {1, 4, 16}) {
        std::vector<IndexRange> shares(threads);
        pool.Run([&](Worker& worker) { shares[worker.index()] = worker.Share(n, grain); });
        size_t next = 0;
        for (const IndexRange& share : shares) {
          EXPECT_EQ(share.begin, next);
          EXPECT_LE(share.begin, share.end);
          if (share.end != n) {
            EXPECT_EQ(share.end % grain, 0u);
          }
          next = share.end;
        }
        EXPECT_EQ(next, n);
      }
    }
  }
}

TEST(WorkerPool, BarrierMakesWritesVisibleToTheWholeTeam) {
  for (size_t threads : {1, 2, 4}) {
    WorkerPool pool(threads);
    std::vector<int> value(threads,
                           0);  // plain ints: a missing barrier is a data race for TSan too
    std::vector<int> errors(threads, 0);
    pool.Run([&](Worker& worker) {
      for (int round = 1; round <= 2000; ++round) {
        value[worker.index()] = round;
        worker.Barrier();
        for (int v : value) errors[worker.index()] += v != round;
        worker.Barrier();
      }
    });
    for (int e : errors) EXPECT_EQ(e, 0);
  }
}

TEST(WorkerPool, RunReturnsOnlyWhenAllAreDone) {
  WorkerPool pool(3);
  for (int i = 0; i < 500; ++i) {
    std::vector<int> done(3, 0);
    pool.Run([&](Worker& worker) { done[worker.index()] = 1; });
    EXPECT_EQ(done, std::vector<int>({1, 1, 1}));
  }
}

TEST(WorkerPool, ConcurrentCallersTakeTurns) {
  WorkerPool pool(2);
  std::atomic<int> inside{0};
  std::atomic<int> overlaps{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 3; ++c) {
    callers.emplace_back([&] {
      for (int i = 0; i < 200; ++i) {
        pool.Run([&](Worker& worker) {
          if (worker.index() == 0 && inside.fetch_add(1) != 0) overlaps.fetch_add(1);
          worker.Barrier();
          if (worker.index() == 0) inside.fetch_sub(1);
        });
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(overlaps.load(), 0);
}

}  // namespace
}  // namespace firesteel
