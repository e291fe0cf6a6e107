#include "runtime/scheduler/step_cost.h"

#include <gtest/gtest.h>

#include <random>

namespace firesteel {
namespace {

const StepCost kTrue = {.step = 0.002,
                        .prefill_token = 0.0001,
                        .decode_row = 0.0005,
                        .context = 1e-7,
                        .prefill = 0.003};

TEST(StepCostFit, FindsTheModelBehindNoisySteps) {
  std::mt19937 random(1);
  std::normal_distribution<double> noise(1.0, 0.05);
  StepCostFit fit;
  EXPECT_FALSE(fit.known());
  for (int i = 0; i < 2000; ++i) {
    StepWork work;
    work.prefill_tokens = random() % 3 == 0 ? static_cast<uint32_t>(random() % 200) : 0;
    work.decode_rows = static_cast<uint32_t>(random() % 16);
    work.context = (work.prefill_tokens + work.decode_rows) * (random() % 800);
    fit.Add(work, absl::Seconds(kTrue.Seconds(work) * noise(random)));
  }
  EXPECT_TRUE(fit.known());
  const StepCost cost = fit.cost();
  EXPECT_NEAR(cost.step, kTrue.step, 0.05 * kTrue.step);
  EXPECT_NEAR(cost.prefill_token, kTrue.prefill_token, 0.1 * kTrue.prefill_token);
  EXPECT_NEAR(cost.decode_row, kTrue.decode_row, 0.05 * kTrue.decode_row);
  EXPECT_NEAR(cost.context, kTrue.context, 0.2 * kTrue.context);
  EXPECT_NEAR(cost.prefill, kTrue.prefill, 0.1 * kTrue.prefill);
}

TEST(StepCostFit, FollowsAChange) {
  StepCostFit fit;
  for (int i = 0; i < 3000; ++i) fit.Add({.decode_rows = 1}, absl::Milliseconds(3));
  for (int i = 0; i < 3000; ++i) fit.Add({.decode_rows = 1}, absl::Milliseconds(6));
  EXPECT_NEAR(fit.cost().Seconds({.decode_rows = 1}), 0.006, 0.0001);
}

// One step in ten is held up: what many steps take together is met all the same.
TEST(StepCostFit, MeetsTheSumOfUnevenSteps) {
  std::mt19937 random(2);
  StepCostFit fit;
  double measured = 0, expected = 0;
  for (int i = 0; i < 6000; ++i) {
    const StepWork work = {.prefill_tokens = i % 5 == 0 ? static_cast<uint32_t>(random() % 200) : 0,
                           .decode_rows = static_cast<uint32_t>(1 + random() % 8)};
    const double seconds = kTrue.Seconds(work) * (random() % 10 == 0 ? 5 : 1);
    fit.Add(work, absl::Seconds(seconds));
    if (i < 1000) continue;
    measured += seconds;
    expected += fit.cost().Seconds(work);
  }
  EXPECT_NEAR(expected / measured, 1, 0.03);
}

// What was always alike is told as a whole, and nothing is below zero.
TEST(StepCostFit, UnseenTermsCostNothing) {
  StepCostFit fit;
  for (int i = 0; i < 100; ++i) fit.Add({.decode_rows = 2, .context = 20}, absl::Milliseconds(4));
  fit.Add({.decode_rows = 2}, absl::ZeroDuration());  // a clock that stood still
  const StepCost cost = fit.cost();
  EXPECT_NEAR(cost.Seconds({.decode_rows = 2, .context = 20}), 0.004, 1e-5);
  EXPECT_EQ(cost.prefill_token, 0);
  for (const double term : {cost.step, cost.decode_row, cost.context}) EXPECT_GE(term, 0);
}

TEST(EstimateService, Table) {
  const StepCost cost = {.step = 0.010, .prefill_token = 0.001, .decode_row = 0.002};
  const auto seconds = [&](Load load, uint32_t prompt, double answer, uint32_t n = 1) {
    return absl::ToDoubleSeconds(EstimateService(cost, load, prompt, answer, n).total);
  };
  const auto wait = [&](Load load) {
    return absl::ToDoubleSeconds(EstimateService(cost, load, 100, 11, 1).wait);
  };
  // Alone: a step with the prompt, then a step of one row for each further token.
  EXPECT_NEAR(seconds({.max_batch_size = 4}, 100, 11), 0.110 + 10 * 0.012, 1e-9);
  EXPECT_NEAR(seconds({.max_batch_size = 4}, 100, 0), 0.110, 1e-9);
  EXPECT_EQ(wait({.max_batch_size = 4}), 0);
  // Beside two others: longer steps, but no waiting.
  const Load two = {.sequences = 2, .mean_answer = 40, .max_batch_size = 4};
  EXPECT_NEAR(seconds(two, 100, 11), 0.114 + 10 * 0.016, 1e-9);
  // Their prompts come first.
  Load prompts = two;
  prompts.prompt_tokens = 300;
  EXPECT_NEAR(seconds(prompts, 100, 11), 0.314 + 0.114 + 10 * 0.016, 1e-9);
  EXPECT_NEAR(wait(prompts), 0.314, 1e-9);
  // Beside others a prompt takes a step for each chunk.
  Load chunks = prompts;
  chunks.chunk_tokens = 10;
  EXPECT_NEAR(wait(chunks), 30 * 0.014 + 0.300, 1e-9);
  EXPECT_NEAR(seconds(chunks, 100, 11), 30 * 0.014 + 0.300 + 10 * 0.014 + 0.100 + 10 * 0.016, 1e-9);
  EXPECT_NEAR(seconds({.max_batch_size = 4, .chunk_tokens = 10}, 100, 0), 0.110, 1e-9);
  // A full batch of four, as many waiting: five of eight have to go before it comes, one every ten
  // steps.
  const Load full = {.sequences = 4, .waiting = 4, .mean_answer = 40, .max_batch_size = 4};
  EXPECT_NEAR(seconds(full, 100, 11), 50 * 0.018 + 0.116 + 10 * 0.018, 1e-9);
  EXPECT_NEAR(wait(full), 50 * 0.018, 1e-9);
  // Who ends is followed by another, with two tokens of a prompt for each token of an answer.
  Load busy = full;
  busy.prompt_per_answer = 2;
  EXPECT_NEAR(seconds(busy, 100, 11), 50 * 0.026 + 0.116 + 10 * 0.024, 1e-9);
  // In chunks of 40 a place is held for two steps more.
  busy.chunk_tokens = 40;
  EXPECT_NEAR(wait(busy), 5 * 42 / 4.0 * 0.026, 1e-9);
  // Two sequences need two places.
  EXPECT_NEAR(seconds(full, 100, 11, 2), 60 * 0.018 + 0.114 + 10 * 0.018, 1e-9);
}

// A prompt costs something whatever its length, in each step that computes some of it; a new one
// begins once an answer.
TEST(EstimateService, APromptCostsSomethingByItself) {
  const StepCost cost = {
      .step = 0.010, .prefill_token = 0.001, .decode_row = 0.002, .prefill = 0.008};
  const Load two = {.sequences = 2, .mean_answer = 40, .max_batch_size = 4};
  EXPECT_NEAR(absl::ToDoubleSeconds(EstimateService(cost, two, 100, 11, 1).total),
              0.114 + 0.008 + 10 * (0.016 + 2 * 0.008 / 40), 1e-9);
  EXPECT_NEAR(absl::ToDoubleSeconds(EstimateService(cost, {}, 100, 1, 1).total), 0.118, 1e-9);
}

}  // namespace
}  // namespace firesteel
