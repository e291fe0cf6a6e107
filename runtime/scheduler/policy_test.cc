#include "runtime/scheduler/policy.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <vector>

namespace firesteel {
namespace {

using ::testing::ElementsAre;
using Slices = std::vector<PlannedSlice>;

struct Case {
  const char* name;
  std::vector<RunningView> running;
  std::vector<WaitingView> waiting;
  uint32_t max_batch_size = 4;
  uint32_t max_batch_tokens = 16;
  uint32_t max_prefill_tokens = 16;
  uint32_t max_scored_tokens = 16;
  uint32_t free_kv_blocks = 100;
  std::vector<uint64_t> admit;
  Slices slices;
};

WaitingView Waits(uint64_t id, uint32_t prompt, uint32_t blocks = 1) {
  return {.id = id, .prompt_tokens = prompt, .kv_blocks = blocks};
}

TEST(PlanStep, Table) {
  const std::vector<Case> cases = {
      {.name = "nothing"},
      {.name = "decodes get one row each", .running = {{1, 0}, {2, 0}}, .slices = {{1, 1}, {2, 1}}},
      {.name = "decodes come first, prompts share the rest in order of admission",
       .running = {{1, 20}, {2, 0}, {3, 5}},
       .slices = {{2, 1}, {1, 15}}},
      {.name = "a short prompt leaves room for the next",
       .running = {{1, 6}, {2, 0}, {3, 50}},
       .slices = {{2, 1}, {1, 6}, {3, 9}}},
      {.name = "the prefill budget binds beside decodes",
       .running = {{1, 50}, {2, 0}},
       .max_prefill_tokens = 4,
       .slices = {{2, 1}, {1, 4}}},
      {.name = "the prefill budget does not bind without decodes",
       .running = {{1, 50}},
       .max_prefill_tokens = 4,
       .slices = {{1, 16}}},
      {.name = "requests join at once",
       .running = {{1, 0}},
       .waiting = {Waits(2, 3), Waits(3, 4)},
       .admit = {2, 3},
       .slices = {{1, 1}, {2, 3}, {3, 4}}},
      {.name = "a full batch admits nobody",
       .running = {{1, 0}, {2, 0}, {3, 0}, {4, 0}},
       .waiting = {Waits(5, 3)},
       .slices = {{1, 1}, {2, 1}, {3, 1}, {4, 1}}},
      {.name = "places are counted",
       .running = {{1, 0}, {2, 0}, {3, 0}},
       .waiting = {Waits(4, 1), Waits(5, 1)},
       .admit = {4},
       .slices = {{1, 1}, {2, 1}, {3, 1}, {4, 1}}},
      {.name = "no admission without a token for it",
       .running = {{1, 100}},
       .waiting = {Waits(2, 1)},
       .slices = {{1, 16}}},
      {.name = "what does not fit into the cache holds up those behind",
       .waiting = {Waits(1, 3, 5), Waits(2, 3, 7), Waits(3, 3, 1)},
       .free_kv_blocks = 11,
       .admit = {1},
       .slices = {{1, 3}}},
      {.name = "exactly fitting is fitting",
       .waiting = {Waits(1, 3, 5), Waits(2, 3, 6)},
       .free_kv_blocks = 11,
       .admit = {1, 2},
       .slices = {{1, 3}, {2, 3}}},
      {.name = "sequences to come hold their places",
       .running = {{.id = 1, .tokens_left = 2, .sequences = 2}, {2, 0}},
       .waiting = {Waits(3, 1), Waits(4, 1)},
       .admit = {3},
       .slices = {{2, 1}, {1, 2}, {3, 1}}},
      {.name = "a request takes a place for each of its sequences",
       .running = {{1, 0}},
       .waiting = {{.id = 2, .prompt_tokens = 1, .kv_blocks = 1, .sequences = 3}, Waits(3, 1)},
       .admit = {2},
       .slices = {{1, 1}, {2, 1}}},
      {.name = "and waits until there are so many",
       .running = {{1, 0}, {2, 0}},
       .waiting = {{.id = 3, .prompt_tokens = 1, .kv_blocks = 1, .sequences = 3}, Waits(4, 1)},
       .slices = {{1, 1}, {2, 1}}},
      {.name = "the sequences of a request decode each for itself",
       .running = {{.id = 1, .sequence = 0}, {.id = 1, .sequence = 2}},
       .slices = {{1, 1, 0}, {1, 1, 2}}},
      {.name = "scored prompts share a budget of their own",
       .running = {{.id = 1, .tokens_left = 9, .scored = true},
                   {.id = 2, .tokens_left = 9, .scored = true},
                   {3, 2}},
       .max_scored_tokens = 10,
       .slices = {{1, 9}, {2, 1}, {3, 2}}},
      {.name = "a batch of decodes as large as the budget",
       .running = {{1, 0}, {2, 0}},
       .waiting = {Waits(3, 1)},
       .max_batch_tokens = 2,
       .slices = {{1, 1}, {2, 1}}},
  };
  for (const Case& c : cases) {
    const StepPlan plan = PlanStep({.running = c.running,
                                    .waiting = c.waiting,
                                    .max_batch_size = c.max_batch_size,
                                    .max_batch_tokens = c.max_batch_tokens,
                                    .max_prefill_tokens = c.max_prefill_tokens,
                                    .max_scored_tokens = c.max_scored_tokens,
                                    .free_kv_blocks = c.free_kv_blocks});
    EXPECT_EQ(plan.admit, c.admit) << c.name;
    EXPECT_EQ(plan.slices, c.slices) << c.name;
  }
}

// Random arrivals and lengths, driven by the policy alone: budgets hold in each step, blocks
// balance, and every request ends, in the order of admission where they are alike.
TEST(PlanStep, InvariantsUnderRandomArrivals) {
  for (uint32_t seed = 0; seed < 50; ++seed) {
    std::mt19937 random(seed);
    const auto pick = [&](uint32_t lo, uint32_t hi) {
      return static_cast<uint32_t>(lo + random() % (hi - lo + 1));
    };
    const uint32_t batch = pick(1, 6);
    const uint32_t tokens = pick(batch, 24);
    const uint32_t total_blocks = pick(8, 20);
    struct Live {
      WaitingView view;
      uint32_t prompt_left;
      uint32_t decodes_left;
    };
    std::vector<WaitingView> waiting;
    std::vector<Live> running;
    uint32_t free_blocks = total_blocks;
    uint64_t arrived = 0;
    uint64_t finished = 0;
    uint64_t steps = 0;
    for (; steps < 5000 && (arrived < 60 || finished < arrived); ++steps) {
      if (arrived < 60 && pick(0, 2) == 0)
        waiting.push_back(Waits(++arrived, pick(1, 40), pick(1, 8)));
      std::vector<RunningView> views;
      for (const Live& live : running) views.push_back({live.view.id, live.prompt_left});
      const StepPlan plan = PlanStep({.running = views,
                                      .waiting = waiting,
                                      .max_batch_size = batch,
                                      .max_batch_tokens = tokens,
                                      .max_prefill_tokens = pick(1, tokens),
                                      .free_kv_blocks = free_blocks});
      for (uint64_t id : plan.admit) {
        ASSERT_EQ(id, waiting.front().id);
        ASSERT_LE(waiting.front().kv_blocks, free_blocks);
        free_blocks -= waiting.front().kv_blocks;
        running.push_back({waiting.front(), waiting.front().prompt_tokens, pick(1, 10)});
        waiting.erase(waiting.begin());
      }
      ASSERT_LE(running.size(), batch);
      ASSERT_TRUE(!plan.slices.empty() || (running.empty() && waiting.empty()));
      uint32_t used = 0;
      std::map<uint64_t, uint32_t> served;
      for (const PlannedSlice& slice : plan.slices) {
        ASSERT_GE(slice.tokens, 1u);
        ASSERT_TRUE(served.emplace(slice.id, slice.tokens).second) << "a sequence twice in a step";
        used += slice.tokens;
      }
      ASSERT_LE(used, tokens);
      for (auto live = running.begin(); live != running.end();) {
        const auto it = served.find(live->view.id);
        if (live->prompt_left == 0) {
          ASSERT_NE(it, served.end()) << "a decoding sequence was left out";
        }
        if (it != served.end()) {
          ASSERT_LE(it->second, std::max(1u, live->prompt_left));
          if (live->prompt_left > 0) {
            live->prompt_left -= it->second;
          } else if (--live->decodes_left == 0) {
            free_blocks += live->view.kv_blocks;
            ++finished;
            live = running.erase(live);
            continue;
          }
        }
        ++live;
      }
    }
    EXPECT_EQ(finished, 60u) << "seed " << seed;
    EXPECT_EQ(free_blocks, total_blocks) << "seed " << seed;
  }
}

// A sequence that decodes, with room in its blocks and blocks of its own.
RunningView Decodes(uint64_t id, uint32_t room, uint32_t blocks, uint32_t sequence = 0) {
  return {.id = id,
          .sequence = sequence,
          .room = room,
          .next_block_room = 32,
          .private_kv_blocks = blocks};
}

TEST(PlanStep, PreemptsTheLastAdmittedWhereDecodesNeedBlocks) {
  const std::vector<RunningView> running = {Decodes(1, 0, 3), Decodes(2, 0, 2), Decodes(3, 5, 4)};
  const std::vector<WaitingView> waiting = {Waits(4, 1)};
  SchedulerSnapshot snapshot = {.running = running,
                                .waiting = waiting,
                                .max_batch_size = 8,
                                .max_batch_tokens = 16,
                                .max_prefill_tokens = 16,
                                .free_kv_blocks = 2,
                                .may_preempt = true};
  StepPlan plan = PlanStep(snapshot);
  EXPECT_THAT(plan.preempt, testing::IsEmpty());
  EXPECT_EQ(plan.slices, (Slices{{1, 1}, {2, 1}, {3, 1}})) << "two blocks are enough for two";
  EXPECT_THAT(plan.admit, testing::IsEmpty()) << "and leave none for a third";

  snapshot.free_kv_blocks = 1;
  plan = PlanStep(snapshot);
  EXPECT_THAT(plan.preempt, ElementsAre(3));
  EXPECT_EQ(plan.slices, (Slices{{1, 1}, {2, 1}}));
  EXPECT_THAT(plan.admit, testing::IsEmpty()) << "nobody comes while others have to go";
}

TEST(PlanStep, PreemptsWholeRequestsAndNeverTheOnlyOne) {
  const std::vector<RunningView> running = {Decodes(1, 0, 1, 0), Decodes(1, 0, 1, 1),
                                            Decodes(2, 0, 1, 0), Decodes(2, 9, 1, 1)};
  StepPlan plan = PlanStep({.running = running,
                            .max_batch_size = 8,
                            .max_batch_tokens = 16,
                            .max_prefill_tokens = 16,
                            .may_preempt = true});
  EXPECT_THAT(plan.preempt, ElementsAre(2));
  EXPECT_EQ(plan.slices, (Slices{{1, 1, 0}, {1, 1, 1}}));

  plan = PlanStep({.running = std::span(running).first(2),
                   .max_batch_size = 8,
                   .max_batch_tokens = 16,
                   .max_prefill_tokens = 16,
                   .may_preempt = true});
  EXPECT_THAT(plan.preempt, testing::IsEmpty());
}

TEST(PlanStep, WhatAPreemptionLostComesBackInChunksAsBlocksAllow) {
  std::vector<RunningView> running = {Decodes(1, 4, 1), Decodes(2, 3, 1)};
  running[1].tokens_left = 60;
  SchedulerSnapshot snapshot = {.running = running,
                                .max_batch_size = 8,
                                .max_batch_tokens = 100,
                                .max_prefill_tokens = 50,
                                .free_kv_blocks = 1,
                                .may_preempt = true};
  EXPECT_EQ(PlanStep(snapshot).slices, (Slices{{1, 1}, {2, 35}}));
  snapshot.free_kv_blocks = 2;
  EXPECT_EQ(PlanStep(snapshot).slices, (Slices{{1, 1}, {2, 50}}));
  snapshot.free_kv_blocks = 9;
  EXPECT_EQ(PlanStep(snapshot).slices, (Slices{{1, 1}, {2, 50}}));

  // None of two can go on: the later one makes room for the first.
  running = {Decodes(1, 0, 1), Decodes(2, 0, 1)};
  running[0].tokens_left = running[1].tokens_left = 20;
  snapshot.running = running;
  snapshot.free_kv_blocks = 0;
  const StepPlan plan = PlanStep(snapshot);
  EXPECT_THAT(plan.preempt, ElementsAre(2));
  EXPECT_EQ(plan.slices, (Slices{{1, 20}}));
}

TEST(PlanStep, ReservedBlocksAreNotForNewcomers) {
  const std::vector<RunningView> running = {Decodes(1, 0, 3)};
  const std::vector<WaitingView> waiting = {Waits(2, 3, 4)};
  SchedulerSnapshot snapshot = {.running = running,
                                .waiting = waiting,
                                .max_batch_size = 8,
                                .max_batch_tokens = 16,
                                .max_prefill_tokens = 16,
                                .free_kv_blocks = 10,
                                .reserved_kv_blocks = 7};
  EXPECT_THAT(PlanStep(snapshot).admit, testing::IsEmpty());
  snapshot.reserved_kv_blocks = 6;
  EXPECT_THAT(PlanStep(snapshot).admit, ElementsAre(2));
}

// Decodes take 100 ms: 40 and 10 for each of six rows.
ChunkQuestion SixStreams(StepCost cost = {
                             .step = 0.04, .prefill_token = 0.002, .decode_row = 0.01}) {
  return {.cost = cost, .decodes = {.decode_rows = 6}, .max_tokens = 256};
}

TEST(ChunkTokens, WithoutATargetAPromptMayAddThreeTenths) {
  ChunkQuestion question = SixStreams();
  EXPECT_EQ(ChunkTokens(question), 15u);
  question.decodes.decode_rows = 1;
  EXPECT_EQ(ChunkTokens(question), 7u) << "of the decodes there are";
  question.cost->context = 0.00001;
  question.decodes.context = 5000;
  EXPECT_EQ(ChunkTokens(question), 15u) << "and of how far they look back";
  question.max_tokens = 12;
  EXPECT_EQ(ChunkTokens(question), 12u);
}

TEST(ChunkTokens, ASlowMachineChangesNothing) {
  for (const double speed : {1.0, 0.5, 0.25}) {
    EXPECT_EQ(
        ChunkTokens(SixStreams(
            {.step = 0.04 / speed, .prefill_token = 0.002 / speed, .decode_row = 0.01 / speed})),
        15u);
  }
}

TEST(ChunkTokens, PromptsThatWaitMakeRoomForEachOther) {
  ChunkQuestion question = SixStreams();
  for (const auto& [prompts, tokens] : {std::pair(1u, 15u), {2u, 30u}, {4u, 60u}, {50u, 60u}}) {
    question.prompts = prompts;
    EXPECT_EQ(ChunkTokens(question), tokens);
  }
}

TEST(ChunkTokens, NobodyFeelsAShortStep) {
  // Decodes take 10 ms, 3 would be three tenths.
  EXPECT_EQ(ChunkTokens(SixStreams({.step = 0.004, .prefill_token = 0.0002, .decode_row = 0.001})),
            50u);
}

TEST(ChunkTokens, ATargetIsForTheWholeStep) {
  ChunkQuestion question = SixStreams();
  question.target = absl::Milliseconds(170);
  question.prompts = 3;
  EXPECT_EQ(ChunkTokens(question), 35u);
  question.target = absl::Milliseconds(90);  // the decodes alone take longer
  EXPECT_EQ(ChunkTokens(question), kLeastChunk);
  question.target = absl::Minutes(1);
  EXPECT_EQ(ChunkTokens(question), 256u);
}

TEST(ChunkTokens, WhatAPromptCostsAtAllCounts) {
  ChunkQuestion question = SixStreams();
  question.cost->prefill = 0.009;
  EXPECT_EQ(ChunkTokens(question), 10u);
  question.cost->prefill = 0.034;
  EXPECT_EQ(ChunkTokens(question), kLeastChunk);
}

TEST(ChunkTokens, BeforeAnythingIsKnownItIsTheLeast) {
  ChunkQuestion question = SixStreams();
  question.cost->prefill_token = 0;
  EXPECT_EQ(ChunkTokens(question), kLeastChunk) << "no prompt was seen";
  question.cost.reset();
  question.target = absl::Minutes(1);
  EXPECT_EQ(ChunkTokens(question), kLeastChunk);
  question.max_tokens = 3;
  EXPECT_EQ(ChunkTokens(question), 3u);
}

}  // namespace
}  // namespace firesteel
