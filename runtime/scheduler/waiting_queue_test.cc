#include "runtime/scheduler/waiting_queue.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <string>

namespace firesteel {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

const absl::Time kStart = absl::UnixEpoch() + absl::Hours(1);
constexpr absl::Duration kAgeing = absl::Seconds(10);

TEST(WaitingQueue, PriorityThenArrival) {
  WaitingQueue queue(kAgeing);
  EXPECT_TRUE(queue.empty());
  EXPECT_THAT(queue.Next(5, kStart), IsEmpty());
  for (const auto& [id, priority] : std::map<uint64_t, int32_t>{{1, 0}, {2, 5}, {3, -1}, {4, 5}}) {
    queue.Push(id, priority, "a", 10, kStart);
  }
  EXPECT_THAT(queue.Next(9, kStart), ElementsAre(2, 4, 1, 3));
  EXPECT_THAT(queue.Next(2, kStart), ElementsAre(2, 4));
  queue.Admit(2, kStart);
  queue.Remove(1, kStart);
  EXPECT_THAT(queue.Next(9, kStart), ElementsAre(4, 3));
  EXPECT_EQ(queue.size(), 2u);
}

TEST(WaitingQueue, ClientsTakeTurnsByWhatTheyWereServed) {
  WaitingQueue queue(kAgeing);
  for (uint64_t id = 1; id <= 4; ++id) queue.Push(id, 0, "many", 100, kStart);
  queue.Push(5, 0, "few", 30, kStart);
  queue.Push(6, 0, "few", 30, kStart);
  // 0 and 0: the earlier one. 100 and 0, 100 and 30: few. Then many is behind again.
  EXPECT_THAT(queue.Next(9, kStart), ElementsAre(1, 5, 6, 2, 3, 4));
  queue.Admit(1, kStart);
  EXPECT_THAT(queue.Next(2, kStart), ElementsAre(5, 6));
  // What was not used is credited.
  queue.End(1, 95);
  EXPECT_THAT(queue.Next(2, kStart), ElementsAre(5, 2));
}

TEST(WaitingQueue, OneAmongAThousandIsNext) {
  WaitingQueue queue(kAgeing);
  for (uint64_t id = 1; id <= 1000; ++id) queue.Push(id, 0, "many", 100, kStart);
  for (uint64_t id = 1; id <= 20; ++id) queue.Admit(queue.Next(1, kStart).front(), kStart);
  // All of them are old by now, and it is new: fairness comes before age where lines are alike.
  const absl::Time later = kStart + absl::Seconds(9);
  queue.Push(1001, 0, "one", 100, later);
  const auto next = queue.Next(2, later);
  EXPECT_TRUE(next[0] == 1001 || next[1] == 1001);
}

TEST(WaitingQueue, IdlingSavesUpNothing) {
  WaitingQueue queue(kAgeing);
  queue.Push(1, 0, "busy", 1000, kStart);
  queue.Push(2, 0, "busy", 1000, kStart);
  queue.Push(3, 0, "busy", 1000, kStart);
  queue.Admit(1, kStart);
  queue.Push(4, 0, "late", 10, kStart);
  queue.Push(5, 0, "late", 10, kStart);
  // Level at 1000: by arrival. Then late is at an advantage of 1000, not of 2000.
  EXPECT_THAT(queue.Next(9, kStart), ElementsAre(2, 4, 5, 3));
}

TEST(WaitingQueue, TheHeadOfALineAges) {
  WaitingQueue queue(kAgeing);
  queue.Push(1, -5, "a", 10, kStart);
  queue.Push(2, -5, "a", 10, kStart);
  absl::Time now = kStart + kAgeing - absl::Seconds(1);
  queue.Push(3, 9, "a", 10, now);
  queue.Push(4, 9, "a", 10, now);
  EXPECT_THAT(queue.Next(9, now), ElementsAre(3, 4, 1, 2));
  now += absl::Seconds(1);
  EXPECT_THAT(queue.Next(9, now), ElementsAre(1, 3, 4, 2)) << "the second one's time begins now";
  queue.Admit(1, now);
  now += kAgeing - absl::Seconds(1);
  EXPECT_THAT(queue.Next(9, now), ElementsAre(3, 4, 2));
  now += absl::Seconds(1);
  // Both lines have waited: the one that arrived first.
  EXPECT_THAT(queue.Next(9, now), ElementsAre(2, 3, 4));
}

TEST(WaitingQueue, PreemptedGoFirstInTheirOldOrder) {
  WaitingQueue queue(kAgeing);
  for (uint64_t id = 1; id <= 4; ++id) queue.Push(id, id == 4 ? 9 : 0, "a", 10, kStart);
  queue.Admit(4, kStart);
  queue.Admit(1, kStart);
  queue.PushPreempted(1);
  queue.PushPreempted(4);
  EXPECT_THAT(queue.Next(9, kStart), ElementsAre(4, 1, 2, 3));
  EXPECT_EQ(queue.size(), 4u);
  queue.Admit(4, kStart);
  queue.End(1, 5);  // cancelled while it waited
  EXPECT_THAT(queue.Next(9, kStart), ElementsAre(2, 3));
  queue.End(4, 0);
}

TEST(WaitingQueue, ForgetsClientsThatHaveNothing) {
  WaitingQueue queue(kAgeing);
  for (uint64_t id = 1; id <= 100; ++id) {
    queue.Push(id, 0, "client" + std::to_string(id), 10, kStart);
    if (id % 2 == 0) {
      queue.Admit(id, kStart);
      queue.End(id, 1);
    } else {
      queue.Remove(id, kStart);
    }
  }
  EXPECT_EQ(queue.num_clients(), 0u);
  EXPECT_TRUE(queue.empty());
}

// Clients of every appetite, priorities of every height, one place: whoever waits is admitted in
// bounded time.
TEST(WaitingQueue, NobodyStarves) {
  for (uint32_t seed = 0; seed < 20; ++seed) {
    std::mt19937 random(seed);
    WaitingQueue queue(kAgeing);
    absl::Time now = kStart;
    uint64_t next_id = 0;
    struct Waiting {
      absl::Time since;
      int client;
    };
    std::map<uint64_t, Waiting> waiting;
    std::map<int, double> served;
    const auto push = [&](int client, int32_t priority) {
      queue.Push(++next_id, priority, std::to_string(client), 10, now);
      waiting[next_id] = {now, client};
    };
    for (int i = 0; i < 30; ++i) push(0, 0);
    absl::Duration longest;
    for (int step = 0; step < 3000; ++step) {
      now += absl::Milliseconds(100);
      // Client 0 keeps 30 waiting, client 1 one of high priority, clients 2 and 3 one of any.
      int in_queue[4] = {};
      for (const auto& [id, w] : waiting) ++in_queue[w.client];
      while (in_queue[0]++ < 30) push(0, 0);
      if (in_queue[1] == 0) push(1, 1000);
      for (const int client : {2, 3}) {
        if (in_queue[client] == 0) push(client, static_cast<int32_t>(random() % 2000) - 1000);
      }
      const uint64_t id = queue.Next(1, now).front();
      queue.Admit(id, now);
      queue.End(id, 0);
      longest = std::max(longest, now - waiting.at(id).since);
      served[waiting.at(id).client] += 10;
      waiting.erase(id);
    }
    for (const auto& [client, tokens] : served) {
      // A line that ages gets one place in each such time: 29 of them here.
      EXPECT_GT(tokens, client == 1 ? 20000 : 250) << "client " << client << ", seed " << seed;
    }
    // Of the clients with one request each, none waits longer than ageing and a few turns; client
    // 0's own requests wait for each other.
    for (const auto& [id, w] : waiting) {
      if (w.client != 0) {
        EXPECT_LT(now - w.since, kAgeing + absl::Seconds(2));
      }
    }
    EXPECT_LT(longest, 35 * kAgeing);
  }
}

}  // namespace
}  // namespace firesteel
