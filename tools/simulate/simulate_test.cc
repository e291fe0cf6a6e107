#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "runtime/model/kv_cache.h"
#include "runtime/model/synthetic.h"
#include "tools/simulate/outcome.h"
#include "tools/simulate/simulator.h"
#include "tools/simulate/trace.h"

namespace firesteel::simulate {
namespace {

using ::testing::HasSubstr;

const StepCost kCost = {.step = 0.004, .prefill_token = 0.0002, .decode_row = 0.001};
const Objectives kObjectives = {.ttft_seconds = 1, .itl_seconds = 0.06};

Outcome Play(const std::vector<Arrival>& trace, EngineOptions options = {},
             size_t kv_cache_tokens = 32 * 1024, Intake intake = Intake::kOpen) {
  const auto outcome =
      Simulate(trace, {.cost = kCost}, options, kv_cache_tokens, 1024, intake, kObjectives);
  EXPECT_TRUE(outcome.ok()) << outcome.status();
  return *outcome;
}

TEST(Trace, PoissonHasItsRateAndMeans) {
  const auto trace = MakeTrace({.requests = 20000,
                                .rate = 5,
                                .mean_prompt_tokens = 100,
                                .mean_answer_tokens = 40,
                                .max_prompt_tokens = 5000,
                                .max_answer_tokens = 5000});
  double prompt = 0, answer = 0;
  for (const Arrival& a : trace) {
    prompt += a.prompt_tokens;
    answer += a.answer_tokens;
  }
  EXPECT_NEAR(trace.back().seconds, 4000, 100);
  EXPECT_NEAR(prompt / 20000, 100, 2);
  EXPECT_NEAR(answer / 20000, 40, 1);
}

TEST(Trace, FilesAreCheckedLineByLine) {
  const auto good = ParseTrace(
      "seconds,answer_tokens,prompt_tokens,client,priority\n0,5,10,0,0\n\n0.5,6,20,1,-3\r\n");
  ASSERT_TRUE(good.ok()) << good.status();
  ASSERT_EQ(good->size(), 2u);
  EXPECT_EQ((*good)[1].answer_tokens, 6u);
  EXPECT_EQ((*good)[1].prompt_tokens, 20u);
  EXPECT_EQ((*good)[1].priority, -3);
  const auto error = [](const std::string& text) {
    return std::string(ParseTrace(text).status().message());
  };
  const std::string header = "seconds,prompt_tokens,answer_tokens\n";
  EXPECT_THAT(error(""), HasSubstr("no request"));
  EXPECT_THAT(error(header), HasSubstr("no request"));
  EXPECT_THAT(error("seconds,prompt_tokens\n"), HasSubstr("no column answer_tokens"));
  EXPECT_THAT(error("seconds,prompt_tokens,answer_tokens,x\n"), HasSubstr("unknown column 'x'"));
  EXPECT_THAT(error(header + "0,1\n"), HasSubstr("line 2: has 2 columns, the header 3"));
  EXPECT_THAT(error(header + "0,0,1\n"), HasSubstr("'0' is not a number from 1"));
  EXPECT_THAT(error(header + "0,nan,1\n"), HasSubstr("'nan'"));
  EXPECT_THAT(error(header + "1,1,1\n0,1,1\n"), HasSubstr("line 3: is earlier"));
  EXPECT_EQ(ReadTrace("/nonexistent").status().code(), absl::StatusCode::kNotFound);
}

TEST(Trace, PromptsOfAGroupBeginAlike) {
  const Arrival arrival = {.prompt_tokens = 50, .answer_tokens = 9, .prefix_tokens = 32};
  const GenerationRequest a = ToRequest(arrival, 1, 1000), b = ToRequest(arrival, 2, 1000);
  EXPECT_TRUE(std::equal(a.prompt.begin(), a.prompt.begin() + 32, b.prompt.begin()));
  EXPECT_NE(a.prompt, b.prompt);
  EXPECT_EQ(a.max_tokens, 9u);
}

TEST(Simulate, OneRequestTakesWhatItsStepsTake) {
  const Outcome o = Play({{.seconds = 3, .prompt_tokens = 100, .answer_tokens = 11}});
  EXPECT_EQ(o.completed, 1u);
  EXPECT_EQ(o.steps, 11u);
  EXPECT_NEAR(o.ttft.p50, 0.004 + 100 * 0.0002, 1e-9);
  EXPECT_NEAR(o.itl.p50, 0.005, 1e-9);
  EXPECT_NEAR(o.seconds, 0.024 + 10 * 0.005, 1e-9);
  EXPECT_EQ(o.generated_tokens, 11u);
}

TEST(Simulate, TheCostOfItsStepsIsTheOneGiven) {
  const StepCost cost = Play(MakeTrace({.requests = 500, .rate = 8})).cost;
  EXPECT_NEAR(cost.step, kCost.step, 0.01 * kCost.step);
  EXPECT_NEAR(cost.prefill_token, kCost.prefill_token, 0.01 * kCost.prefill_token);
  EXPECT_NEAR(cost.decode_row, kCost.decode_row, 0.01 * kCost.decode_row);
  EXPECT_LT(cost.context, 1e-7);
}

// The engine and a model, in real time: how long it takes is the machine's affair.
TEST(RunForReal, CompletesTheTraceAndMeasuresItsSteps) {
  ModelConfig config = *NamedShape("spark-stories");
  config.num_layers = 1;
  config.layer_types.resize(1);
  config.vocab_size = 200;
  config.max_position_embeddings = 192;
  const auto weights = MakeSyntheticWeights(config, kernels::DType::kBF16, 1);
  const auto trace = MakeTrace({.requests = 20,
                                .rate = 1e6,
                                .mean_prompt_tokens = 20,
                                .mean_answer_tokens = 10,
                                .max_prompt_tokens = 90,
                                .max_answer_tokens = 90});
  for (const Intake intake : {Intake::kOpen, Intake::kStatic}) {
    const auto real = RunForReal(trace, weights, {.max_batch_size = 4}, 1, intake, kObjectives);
    ASSERT_TRUE(real.ok()) << real.status();
    EXPECT_EQ(real->measured.completed, 20u);
    EXPECT_GT(real->machine.cost.Seconds({.prefill_tokens = 20, .decode_rows = 1}), 0);
  }
  const auto cost = MeasureCost(weights, {.max_batch_size = 4}, 1);
  ASSERT_TRUE(cost.ok()) << cost.status();
  // Where a run was held up, all of a step may be told by one term: ask for all of them.
  EXPECT_GT(cost->Seconds({.prefill_tokens = 20, .decode_rows = 4, .context = 100}), 0);
}

TEST(Simulate, TheSameTraceGivesTheSameOutcome) {
  const auto trace = MakeTrace({.requests = 3000, .rate = 8});
  EXPECT_EQ(ToJson(Play(trace)), ToJson(Play(trace)));
}

// The policy must not get worse: figures of one trace, with room for what a better one changes.
TEST(Simulate, OverloadIsRefusedAndWhatIsTakenIsServedWell) {
  PoissonTrace load = {.requests = 4000};
  const EngineOptions options = {.max_batch_size = 16, .max_queue_requests = 8};
  const auto at = [&](double rate) {
    load.rate = rate;
    return Play(MakeTrace(load), options);
  };
  const Outcome calm = at(8), storm = at(30);
  EXPECT_GT(calm.served_well, 3950u);
  EXPECT_GT(storm.refused[static_cast<size_t>(RejectionReason::kQueueFull)], 1000u);
  EXPECT_GE(storm.goodput(), 0.9 * calm.goodput());
  EXPECT_LE(storm.most_waiting, 8u);
}

// Answers of very different lengths, and a queue that is bounded by time alone.
TEST(Simulate, ABoundedWaitKeepsGoodputWhateverTheLengths) {
  PoissonTrace load = {.requests = 4000, .spread = 1};
  const EngineOptions options = {.max_batch_size = 16, .max_queue_wait = absl::Milliseconds(400)};
  const auto at = [&](double rate) {
    load.rate = rate;
    return Play(MakeTrace(load), options);
  };
  const Outcome calm = at(8), storm = at(30);
  EXPECT_GT(calm.served_well, 3800u);
  EXPECT_GT(storm.refused[static_cast<size_t>(RejectionReason::kQueueWait)], 1000u);
  EXPECT_EQ(storm.refused[static_cast<size_t>(RejectionReason::kQueueFull)], 0u);
  EXPECT_GE(storm.goodput(), 0.9 * calm.goodput());
  EXPECT_LT(storm.ttft.p99, 1.5);
}

TEST(Simulate, ContinuousBatchingBeatsStaticBatching) {
  // All there at once, and of very different lengths.
  auto trace = MakeTrace({.requests = 600, .rate = 1e6, .spread = 1});
  const EngineOptions options = {.max_batch_size = 16};
  const Outcome continuous = Play(trace, options);
  const Outcome in_batches = Play(trace, options, 32 * 1024, Intake::kStatic);
  const Outcome one = Play(trace, {.max_batch_size = 1});
  EXPECT_GT(continuous.tokens_per_second(), 1.2 * in_batches.tokens_per_second());
  EXPECT_GT(in_batches.tokens_per_second(), one.tokens_per_second());
  EXPECT_EQ(continuous.generated_tokens, one.generated_tokens);
}

TEST(Simulate, SharedPrefixesAreFound) {
  const auto trace = MakeTrace({.requests = 1000,
                                .rate = 5,
                                .mean_prompt_tokens = 20,
                                .prefix_groups = 3,
                                .prefix_tokens = 320});
  const Outcome shared = Play(trace);
  const Outcome apart = Play(trace, {.prefix_cache = false});
  EXPECT_GT(shared.cached_tokens, 990u * 320);
  EXPECT_EQ(apart.cached_tokens, 0u);
  EXPECT_LT(shared.ttft.p50, 0.5 * apart.ttft.p50);
}

TEST(Simulate, OptimisticAdmissionFillsATightCache) {
  // Clients allow 400 tokens, answers have 40.
  std::vector<Arrival> trace = MakeTrace({.requests = 1500, .rate = 20, .mean_answer_tokens = 40});
  for (Arrival& a : trace) a.max_tokens = 400;
  const EngineOptions worst = {.max_queue_requests = 5000};
  EngineOptions optimistic = worst;
  optimistic.optimistic_admission = true;
  const Outcome careful = Play(trace, worst, 4096), bold = Play(trace, optimistic, 4096);
  EXPECT_EQ(careful.completed, 1500u);
  EXPECT_EQ(bold.completed, 1500u);
  EXPECT_EQ(careful.preemptions, 0u);
  EXPECT_GT(bold.mean_batch, 1.5 * careful.mean_batch);
  EXPECT_GT(bold.tokens_per_second(), 1.1 * careful.tokens_per_second());
}

// Nobody is made to wait for what cannot be in time.
TEST(Simulate, DeadlinesAreRefusedAtOnceRatherThanMissed) {
  PoissonTrace load = {.requests = 3000, .rate = 30, .timeout_seconds = 3};
  const Outcome o = Play(MakeTrace(load), {.max_batch_size = 16});
  EXPECT_GT(o.refused[static_cast<size_t>(RejectionReason::kDeadline)], 500u);
  EXPECT_LT(o.deadline_exceeded, o.completed / 10);
}

TEST(Simulate, ATargetBoundsTheTimeBetweenTokens) {
  auto trace = MakeTrace({.requests = 400, .rate = 4, .mean_prompt_tokens = 30});
  for (size_t i = 0; i < trace.size(); i += 10) trace[i].prompt_tokens = 900;
  for (Arrival& a : trace) a.answer_tokens = std::min(a.answer_tokens, 100u);
  const Outcome free = Play(trace, {.target_itl = absl::Minutes(1)});
  const Outcome bounded = Play(trace, {.target_itl = absl::Milliseconds(25)});
  EXPECT_GT(free.itl.max, 0.05);
  EXPECT_LT(bounded.itl.p99, 0.03);
}

// What streams have behind them takes a part of the step, too.
TEST(Simulate, ATargetCountsTheContextOfStreams) {
  const StepCost cost = {
      .step = 0.001, .prefill_token = 0.00025, .decode_row = 0.0005, .context = 2e-6};
  std::vector<Arrival> trace(8, {.prompt_tokens = 10, .answer_tokens = 900});
  for (int i = 0; i < 100; ++i) {
    trace.push_back({.seconds = 5 + 0.05 * i, .prompt_tokens = 60, .answer_tokens = 1});
  }
  const auto outcome = Simulate(trace, {.cost = cost}, {.target_itl = absl::Milliseconds(25)},
                                32 * 1024, 1024, Intake::kOpen, kObjectives);
  ASSERT_TRUE(outcome.ok()) << outcome.status();
  EXPECT_EQ(outcome->completed, trace.size());
  EXPECT_LT(outcome->itl.p99, 0.028);
}

// Six streams of a large model, and prompts of 300 tokens one after another beside them, or all at
// once.
TEST(Simulate, StreamsHardlyFeelALongPrompt) {
  const StepCost cost = {
      .step = 0.06, .prefill_token = 0.006, .decode_row = 0.01, .prefill = 0.015};
  const auto play = [&](const std::vector<Arrival>& trace, const EngineOptions& options = {}) {
    auto outcome =
        Simulate(trace, {.cost = cost}, options, 32 * 1024, 1024, Intake::kOpen, kObjectives);
    EXPECT_TRUE(outcome.ok()) << outcome.status();
    return *std::move(outcome);
  };
  std::vector<Arrival> trace(6, {.prompt_tokens = 8, .answer_tokens = 400});
  const Outcome alone = play(trace);
  for (const double at : {5.0, 20.0, 35.0}) {
    trace.push_back({.seconds = at, .prompt_tokens = 300, .answer_tokens = 1});
  }
  const Outcome beside = play(trace);
  EXPECT_LT(beside.itl.p99, 1.7 * alone.itl.p50);
  EXPECT_GT(play(trace, {.target_itl = absl::Minutes(1)}).itl.max, 5 * alone.itl.p50);
  // Who pays is who waits for the first token, but not without bound.
  EXPECT_LT(beside.ttft.max, 15.0);
  for (Arrival& arrival : trace) arrival.seconds = arrival.seconds > 0 ? 5 : 0;
  EXPECT_LT(play(trace).itl.p99, 2.7 * alone.itl.p50);
}

TEST(Simulate, WhatNoEngineCouldServeIsAnError) {
  const auto outcome = Simulate({{.prompt_tokens = 1000, .answer_tokens = 25}}, {.cost = kCost}, {},
                                4096, 1024, Intake::kOpen, kObjectives);
  EXPECT_THAT(std::string(outcome.status().message()), HasSubstr("request 1: prompt: 1000 tokens"));
}

}  // namespace
}  // namespace firesteel::simulate
