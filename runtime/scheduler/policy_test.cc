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

// A step of so many milliseconds, that would have taken `alone` without prompts.
MixedStep Took(uint32_t tokens, double milliseconds, double alone = 0) {
  return {.prefill_tokens = tokens,
          .duration = absl::Milliseconds(milliseconds),
          .decodes_alone = absl::Milliseconds(alone)};
}

TEST(ChunkBudget, WithATargetItShrinksInProportionAndGrowsBack) {
  ChunkBudget budget(absl::Milliseconds(20), 256);
  EXPECT_EQ(budget.tokens(), ChunkBudget::kMinTokens) << "nobody pays for finding out";
  for (int i = 0; i < 100; ++i) budget.Update(Took(budget.tokens(), 1));
  EXPECT_EQ(budget.tokens(), 256u);
  budget.Update(Took(256, 40));
  EXPECT_EQ(budget.tokens(), 128u);
  budget.Update(Took(128, 18));  // close to the target: stays
  EXPECT_EQ(budget.tokens(), 128u);
  budget.Update(Took(50, 5));  // the prompt was short, says nothing about 128
  EXPECT_EQ(budget.tokens(), 128u);
  budget.Update(Took(128, 10));
  EXPECT_EQ(budget.tokens(), 160u);
  for (int i = 0; i < 100; ++i) budget.Update(Took(budget.tokens(), 1));
  EXPECT_EQ(budget.tokens(), 256u);
  for (int i = 0; i < 100; ++i) budget.Update(Took(budget.tokens(), 1000));
  EXPECT_EQ(budget.tokens(), ChunkBudget::kMinTokens);
}

TEST(ChunkBudget, OnlyWhatThePromptAddedCountsAgainstIt) {
  ChunkBudget budget(absl::Milliseconds(20), 256);
  for (int i = 0; i < 100; ++i) budget.Update(Took(budget.tokens(), 1));
  budget.Update(Took(256, 30, 10));  // twice the 10 ms that were allowed
  EXPECT_EQ(budget.tokens(), 128u);
  budget.Update(Took(128, 17, 10));
  EXPECT_EQ(budget.tokens(), 160u);
  budget.Update(Took(160, 30, 25));  // the decodes alone take too long
  EXPECT_EQ(budget.tokens(), ChunkBudget::kMinTokens);
}

TEST(ChunkBudget, WithoutATargetItFollowsTheDecodes) {
  ChunkBudget budget(absl::ZeroDuration(), 256);
  for (int i = 0; i < 100; ++i) budget.Update(Took(budget.tokens(), 1));
  EXPECT_EQ(budget.tokens(), ChunkBudget::kMinTokens) << "what decodes take is not known";
  // A step of 100 ms may take 140; each token adds 2.
  const auto settle = [&](double alone, double token) {
    for (int i = 0; i < 100; ++i) {
      budget.Update(Took(budget.tokens(), alone + token * budget.tokens(), alone));
    }
    return budget.tokens();
  };
  EXPECT_THAT(settle(100, 2), testing::AllOf(testing::Ge(16u), testing::Le(20u)));
  EXPECT_THAT(settle(50, 2), testing::AllOf(testing::Ge(8u), testing::Le(10u)));
  EXPECT_EQ(settle(100, 0.001), 256u);
  // Where the whole machine is slow for a while, it comes back.
  for (int i = 0; i < 100; ++i) budget.Update(Took(budget.tokens(), 200, 100));
  EXPECT_EQ(budget.tokens(), ChunkBudget::kMinTokens);
  EXPECT_THAT(settle(100, 2), testing::Ge(16u));
}

TEST(ChunkBudget, PromptsThatWaitMakeRoomForEachOther) {
  for (const auto& [prompts, tokens] : {std::pair(1u, 20u), {2u, 40u}, {4u, 80u}, {50u, 80u}}) {
    ChunkBudget budget(absl::ZeroDuration(), 256);
    MixedStep step = Took(0, 0, 100);
    step.prompts = prompts;
    for (int i = 0; i < 100; ++i) {
      step.prefill_tokens = budget.tokens();
      step.duration = step.decodes_alone + budget.tokens() * absl::Milliseconds(2);
      budget.Update(step);
    }
    EXPECT_THAT(budget.tokens(), testing::AllOf(testing::Ge(tokens * 3 / 4), testing::Le(tokens)));
  }
}

TEST(ChunkBudget, NoFewerTokensThanMakeAPromptInAStepWorthIt) {
  ChunkBudget budget(absl::Milliseconds(10), 256);
  MixedStep step = Took(4, 100);
  for (const auto& [worth, least] : {std::pair(0u, 4u), {7u, 7u}, {500u, 16u}, {5u, 5u}}) {
    step.worth_tokens = worth;
    for (int i = 0; i < 100; ++i) budget.Update(step);
    EXPECT_EQ(budget.tokens(), least);
  }
}

TEST(ChunkBudget, TinyMaximum) {
  ChunkBudget budget(absl::Milliseconds(1), 3);
  EXPECT_EQ(budget.tokens(), 3u);
  budget.Update(Took(3, 1000));
  EXPECT_EQ(budget.tokens(), 3u);
}

}  // namespace
}  // namespace firesteel
