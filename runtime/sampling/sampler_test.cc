#include "runtime/sampling/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <random>
#include <span>
#include <vector>

namespace firesteel {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

// How often each token comes in `draws` draws at successive positions.
std::map<int32_t, int> Count(const std::vector<float>& logits, const SamplingParams& params,
                             int draws, std::vector<int32_t> forbidden = {}) {
  Sampler sampler;
  std::map<int32_t, int> counts;
  for (int i = 0; i < draws; ++i) {
    ++counts[*sampler.Sample(logits, params, 0, static_cast<uint64_t>(i), forbidden)];
  }
  return counts;
}

// Σ (observed − expected)² / expected.
double ChiSquare(const std::map<int32_t, int>& counts, const std::vector<double>& p, int draws) {
  double chi = 0;
  for (size_t t = 0; t < p.size(); ++t) {
    const auto it = counts.find(static_cast<int32_t>(t));
    const double observed = it == counts.end() ? 0 : it->second;
    if (p[t] == 0) {
      EXPECT_EQ(observed, 0) << "token " << t << " has no probability";
      continue;
    }
    chi += (observed - p[t] * draws) * (observed - p[t] * draws) / (p[t] * draws);
  }
  return chi;
}

std::vector<double> Normalized(std::vector<double> p) {
  double sum = 0;
  for (double v : p) sum += v;
  for (double& v : p) v /= sum;
  return p;
}

std::vector<float> Logs(const std::vector<double>& p) {
  std::vector<float> logits;
  for (double v : p) logits.push_back(static_cast<float>(std::log(v)));
  return logits;
}

// A chi-square of 4 degrees of freedom exceeds 23.5 once in 10,000; the draws are fixed by the
// seed.
constexpr double kChiLimit = 23.5;
constexpr int kDraws = 40000;
const std::vector<double> kP = {0.1, 0.4, 0.05, 0.25, 0.2};

TEST(Sampler, GreedyTakesTheFirstLargest) {
  Sampler sampler;
  const SamplingParams greedy{.temperature = 0.0f};
  EXPECT_EQ(*sampler.Sample(std::vector<float>{1, 3, 3, 2}, greedy, 0, 0), 1);
  EXPECT_EQ(*sampler.Sample(std::vector<float>{kNaN, -5, kInf, -6}, greedy, 0, 0), 1);
  EXPECT_EQ(*sampler.Sample(std::vector<float>{1, 3, 3, 2}, greedy, 0, 0, std::vector<int32_t>{1}),
            2);
}

// Random logits, some of them NaN, −∞ or alike.
std::vector<float> SomeLogits(size_t n, std::mt19937& random) {
  std::normal_distribution<float> normal(0.0f, 2.0f);
  std::vector<float> logits(n);
  for (float& logit : logits) {
    const auto kind = random() % 16;
    logit = kind == 0 ? kNaN : kind == 1 ? -kInf : kind == 2 ? 1.5f : normal(random);
  }
  return logits;
}

// By its definition, in double precision: the first token at which the weights up to it exceed
// `uniform` of the whole. −1: there is none.
int32_t DrawnByDefinition(const std::vector<float>& logits, double temperature, double uniform,
                          int32_t forbidden) {
  std::vector<double> weights;
  for (size_t i = 0; i < logits.size(); ++i) {
    const bool none = !std::isfinite(logits[i]) || static_cast<int32_t>(i) == forbidden;
    weights.push_back(none ? 0.0 : std::exp(logits[i] / temperature));
  }
  double whole = 0;
  for (const double weight : weights) whole += weight;
  double sum = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    sum += weights[i];
    if (uniform * whole < sum) return static_cast<int32_t>(i);
  }
  return -1;
}

TEST(Sampler, GreedyTakesTheFirstLargestOfAnyNumber) {
  std::mt19937 random(11);
  Sampler sampler;
  for (size_t n = 1; n < 200; ++n) {
    const std::vector<float> logits = SomeLogits(n, random);
    int32_t first = -1, second = -1;  // what is drawn, and what where that is forbidden
    const auto beats = [&](size_t i, int32_t than) {
      return std::isfinite(logits[i]) &&
             (than < 0 || logits[i] > logits[static_cast<size_t>(than)]);
    };
    for (size_t i = 0; i < n; ++i) {
      if (beats(i, first)) first = static_cast<int32_t>(i);
    }
    for (size_t i = 0; i < n; ++i) {
      if (static_cast<int32_t>(i) != first && beats(i, second)) second = static_cast<int32_t>(i);
    }
    const SamplingParams greedy{.temperature = 0.0f};
    EXPECT_EQ(sampler.Sample(logits, greedy, 0, 0).value_or(-1), first) << n;
    EXPECT_EQ(sampler.Sample(logits, greedy, 0, 0, std::vector{first}).value_or(-1), second) << n;
  }
}

TEST(Sampler, DrawsOfLargeVocabulariesAreThoseOfTheDefinition) {
  std::mt19937 random(12);
  Sampler sampler;
  int draws = 0, others = 0;
  for (const size_t n : {2u, 511u, 512u, 513u, 1300u}) {
    for (const float temperature : {0.25f, 1.0f, 3.0f}) {
      const std::vector<float> logits = SomeLogits(n, random);
      const SamplingParams params{.temperature = temperature, .seed = n};
      // A cut that cuts nothing off takes the way of all cuts.
      const SamplingParams cut{.temperature = temperature, .min_p = 1e-37f, .seed = n};
      for (uint64_t position = 0; position < 300; ++position) {
        const auto forbidden = static_cast<int32_t>(random() % n);
        const int32_t expected =
            DrawnByDefinition(logits, temperature, CounterUniform(n, 3, position), forbidden);
        draws += 2;
        for (const SamplingParams& some : {params, cut}) {
          const auto token = sampler.Sample(logits, some, 3, position, std::vector{forbidden});
          others += token.value_or(-1) == expected ? 0 : 1;
        }
      }
    }
  }
  EXPECT_LE(others, draws / 1000) << "of " << draws;  // at the borders between two tokens
}

TEST(Sampler, NothingToDrawIsAnError) {
  Sampler sampler;
  EXPECT_EQ(sampler.Sample(std::vector<float>{kNaN, kInf}, {}, 0, 0).status().code(),
            absl::StatusCode::kInternal);
  EXPECT_FALSE(sampler.Sample(std::vector<float>{1}, {}, 0, 0, std::vector<int32_t>{0}).ok());
}

TEST(Sampler, DrawsTheDistribution) {
  EXPECT_LT(ChiSquare(Count(Logs(kP), {.seed = 1}, kDraws), kP, kDraws), kChiLimit);
  // The test would notice a temperature that is off by a tenth.
  EXPECT_GT(ChiSquare(Count(Logs(kP), {.temperature = 1.1f, .seed = 1}, kDraws), kP, kDraws),
            kChiLimit);
}

TEST(Sampler, TemperatureFlattensAndSharpens) {
  for (double t : {0.5, 2.0}) {
    std::vector<double> p;
    for (double v : kP) p.push_back(std::pow(v, 1 / t));
    const SamplingParams params{.temperature = static_cast<float>(t), .seed = 7};
    EXPECT_LT(ChiSquare(Count(Logs(kP), params, kDraws), Normalized(p), kDraws), kChiLimit) << t;
  }
  EXPECT_EQ(Count(Logs(kP), {.temperature = 1e-30f}, 100).size(), 1u);
}

TEST(Sampler, TopKKeepsTheMostProbable) {
  const auto counts = Count(Logs(kP), {.top_k = 2, .seed = 3}, kDraws);
  EXPECT_LT(ChiSquare(counts, Normalized({0, 0.4, 0, 0.25, 0}), kDraws), kChiLimit);
  EXPECT_EQ(Count(Logs(kP), {.top_k = 1}, 100).size(), 1u);
  EXPECT_EQ(Count(Logs(kP), {.top_k = 100}, 1000).size(), 5u);
}

TEST(Sampler, TopPKeepsTheSmallestSetThatReachesIt) {
  const auto counts = Count(Logs(kP), {.top_p = 0.6f, .seed = 5}, kDraws);
  EXPECT_LT(ChiSquare(counts, Normalized({0, 0.4, 0, 0.25, 0}), kDraws), kChiLimit);
  EXPECT_EQ(Count(Logs(kP), {.top_p = 1e-6f}, 100).size(), 1u);
}

TEST(Sampler, MinPIsRelativeToTheMostProbable) {
  const auto counts = Count(Logs(kP), {.min_p = 0.45f, .seed = 9}, kDraws);
  EXPECT_LT(ChiSquare(counts, Normalized({0, 0.4, 0, 0.25, 0.2}), kDraws), kChiLimit);
  // 1 leaves those that are as probable as the most probable one.
  const auto most = Count({1, 3, 2, 3}, {.min_p = 1.0f, .seed = 9}, kDraws);
  EXPECT_LT(ChiSquare(most, {0, 0.5, 0, 0.5}, kDraws), kChiLimit);
}

TEST(Sampler, FiltersApplyInOrder) {
  // top_k = 3 leaves 0.4, 0.25, 0.2 (of 0.85); top_p = 0.7 of that needs 0.595: the first two.
  const auto counts = Count(Logs(kP), {.top_k = 3, .top_p = 0.7f, .seed = 2}, kDraws);
  EXPECT_LT(ChiSquare(counts, Normalized({0, 0.4, 0, 0.25, 0}), kDraws), kChiLimit);
}

// Draws with penalties for tokens seen before.
std::map<int32_t, int> CountSeen(const std::vector<float>& logits, const SamplingParams& params,
                                 const TokenCounts& seen) {
  Sampler sampler;
  std::map<int32_t, int> counts;
  for (int i = 0; i < kDraws; ++i) {
    ++counts[*sampler.Sample(logits, params, 0, static_cast<uint64_t>(i), {}, &seen)];
  }
  return counts;
}

TEST(Sampler, RepetitionPenaltyDividesPositiveAndMultipliesNegativeLogits) {
  const std::vector<float> logits = {2.0f, 1.0f, -1.0f, 0.5f, -0.5f};
  const TokenCounts seen = {{0, 3}, {2, 1}};  // how often does not matter
  const std::vector<double> p = Normalized(
      {std::exp(2.0 / 1.5), std::exp(1.0), std::exp(-1.0 * 1.5), std::exp(0.5), std::exp(-0.5)});
  const auto counts = CountSeen(logits, {.repetition_penalty = 1.5f, .seed = 11}, seen);
  EXPECT_LT(ChiSquare(counts, p, kDraws), kChiLimit);
  EXPECT_GT(ChiSquare(CountSeen(logits, {.seed = 11}, seen), p, kDraws), kChiLimit);
}

TEST(Sampler, PresenceIsSubtractedOnceFrequencyEachTime) {
  const TokenCounts seen = {{1, 2}, {3, 5}};
  const auto expected = [&](double presence, double frequency) {
    std::vector<double> p = kP;
    for (const auto& [token, count] : seen) {
      p[static_cast<size_t>(token)] *= std::exp(-presence - frequency * count);
    }
    return Normalized(p);
  };
  const auto presence = CountSeen(Logs(kP), {.presence_penalty = 0.7f, .seed = 12}, seen);
  EXPECT_LT(ChiSquare(presence, expected(0.7, 0), kDraws), kChiLimit);
  const auto frequency = CountSeen(Logs(kP), {.frequency_penalty = 0.2f, .seed = 13}, seen);
  EXPECT_LT(ChiSquare(frequency, expected(0, 0.2), kDraws), kChiLimit);
  const auto both =
      CountSeen(Logs(kP), {.presence_penalty = -0.4f, .frequency_penalty = 0.1f, .seed = 14}, seen);
  EXPECT_LT(ChiSquare(both, expected(-0.4, 0.1), kDraws), kChiLimit);
  EXPECT_GT(ChiSquare(both, expected(0, 0.1), kDraws), kChiLimit);
}

// The repetition penalty scales the logit alone, not what the others subtract.
TEST(Sampler, PenaltiesDoNotScaleEachOther) {
  const TokenCounts seen = {{1, 2}, {3, 5}};
  std::vector<double> p = kP;
  for (const auto& [token, count] : seen) {
    double& q = p[static_cast<size_t>(token)];
    q = std::exp(1.5 * std::log(q) - 0.7 - 0.2 * count);
  }
  const SamplingParams params{
      .repetition_penalty = 1.5f, .presence_penalty = 0.7f, .frequency_penalty = 0.2f, .seed = 17};
  EXPECT_LT(ChiSquare(CountSeen(Logs(kP), params, seen), Normalized(p), kDraws), kChiLimit);
}

TEST(Sampler, BiasIsAddedToTheLogit) {
  SamplingParams params{.logit_bias = {{0, 1.0f}, {4, -2.0f}}, .seed = 15};
  const std::vector<double> p =
      Normalized({0.1 * std::exp(1.0), 0.4, 0.05, 0.25, 0.2 * std::exp(-2.0)});
  EXPECT_LT(ChiSquare(Count(Logs(kP), params, kDraws), p, kDraws), kChiLimit);
  // What is forbidden stays so, whatever its bias.
  params.logit_bias = {{1, 100.0f}};
  EXPECT_EQ(Count(Logs(kP), params, 1000, {1}).count(1), 0u);
  params.temperature = 0;
  EXPECT_EQ(Count(Logs(kP), params, 10).begin()->first, 1);
}

// Penalties and biases change logits before temperature and cuts see them.
TEST(Sampler, AdjustmentsComeBeforeTemperatureAndCuts) {
  const TokenCounts seen = {{1, 1}};
  const SamplingParams params{.temperature = 2.0f,
                              .top_k = 2,
                              .presence_penalty = 2.0f,
                              .logit_bias = {{2, 2.0f}},
                              .seed = 16};
  // Token 1 falls to 0.054, token 2 rises to 0.369: tokens 2 and 3 are the largest two.
  const std::vector<double> p =
      Normalized({0, 0, std::sqrt(0.05 * std::exp(2.0)), std::sqrt(0.25), 0});
  EXPECT_LT(ChiSquare(CountSeen(Logs(kP), params, seen), p, kDraws), kChiLimit);
  EXPECT_EQ(LargestLogitsNeeded(params), 0u);
  EXPECT_EQ(LargestLogitsNeeded({.top_k = 5, .repetition_penalty = 1.1f}), 0u);
  EXPECT_EQ(LargestLogitsNeeded({.temperature = 0, .frequency_penalty = 0.1f}), 0u);
}

TEST(Sampler, CandidatesDrawWhatAllLogitsDraw) {
  std::mt19937 random(1);
  const auto below = [&](uint32_t n) { return static_cast<uint32_t>(random() % n); };
  Sampler sampler;
  int differ_without_the_first = 0;
  for (int round = 0; round < 5000; ++round) {
    const size_t vocab = 130 + below(300);
    std::normal_distribution<float> normal(0.0f, 2.0f);
    std::vector<float> logits(vocab);
    // Every other round in steps of a half, so that many logits are equal.
    for (float& v : logits) {
      v = round % 2 == 0 ? normal(random) : std::round(2 * normal(random)) / 2;
    }
    SamplingParams params{.temperature = below(3) == 0 ? 0.0f : 0.2f + 0.1f * below(20),
                          .top_k = 1 + below(100),
                          .top_p = below(2) == 0 ? 1.0f : 0.05f * (1 + below(19)),
                          .min_p = below(3) == 0 ? 0.05f * below(10) : 0.0f,
                          .seed = random()};
    std::vector<int32_t> forbidden;
    for (uint32_t i = below(3); i > 0; --i) {
      const auto top = std::max_element(logits.begin(), logits.end()) - logits.begin();
      forbidden.push_back(static_cast<int32_t>(i == 1 ? top : below(vocab)));
    }
    ASSERT_EQ(LargestLogitsNeeded(params), params.temperature == 0.0f ? 1 : params.top_k);
    const size_t needed = LargestLogitsNeeded(params) + forbidden.size();
    std::vector<float> sorted = logits;
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    const size_t more = below(2) == 0 ? 0 : below(static_cast<uint32_t>(vocab - needed));
    std::vector<uint32_t> ids;
    std::vector<float> some;
    for (size_t i = 0; i < vocab; ++i) {
      if (logits[i] < sorted[needed - 1 + more]) continue;
      ids.push_back(static_cast<uint32_t>(i));
      some.push_back(logits[i]);
    }
    const auto expected = sampler.Sample(logits, params, 0, 9, forbidden);
    ASSERT_TRUE(expected.ok());
    ASSERT_EQ(*sampler.Sample(ids, some, params, 0, 9, forbidden), *expected) << round;
    // The comparison can fail: without the most probable one, others are drawn.
    const auto top = std::max_element(some.begin(), some.end()) - some.begin();
    some[static_cast<size_t>(top)] = kNaN;
    const auto other = sampler.Sample(ids, some, params, 0, 9, forbidden);
    if (!other.ok() || *other != *expected) ++differ_without_the_first;
  }
  EXPECT_GT(differ_without_the_first, 1000);
  EXPECT_EQ(LargestLogitsNeeded({}), 0u);
  EXPECT_EQ(LargestLogitsNeeded({.temperature = 0.0f, .top_k = 7}), 1u);
  EXPECT_FALSE(
      sampler.Sample(std::span<const uint32_t>(), std::span<const float>(), {}, 0, 0).ok());
}

TEST(CounterUniform, DependsOnEachArgumentAndIsUniform) {
  EXPECT_EQ(CounterUniform(1, 2, 3), CounterUniform(1, 2, 3));
  EXPECT_NE(CounterUniform(1, 2, 3), CounterUniform(2, 2, 3));
  EXPECT_NE(CounterUniform(1, 2, 3), CounterUniform(1, 3, 3));
  EXPECT_NE(CounterUniform(1, 2, 3), CounterUniform(1, 2, 4));
  EXPECT_NE(CounterUniform(1, 2, 3), CounterUniform(1, 3, 2));
  double sum = 0;
  for (uint64_t i = 0; i < 10000; ++i) {
    const double u = CounterUniform(i % 100, i / 100, 0);
    ASSERT_GE(u, 0.0);
    ASSERT_LT(u, 1.0);
    sum += u;
  }
  EXPECT_NEAR(sum / 10000, 0.5, 4 * 0.289 / 100);
}

// 0.5 and 0.3 don't reach 0.82: the token that crosses it is kept, the one behind it is not.
TEST(Sampler, TopPKeepsTheTokenThatReachesIt) {
  const std::vector<float> logits = {std::log(0.5f), std::log(0.3f), std::log(0.15f),
                                     std::log(0.05f)};
  SamplingParams params;
  params.temperature = 1.0f;
  params.top_p = 0.82f;
  Sampler sampler;
  std::vector<int> drawn(logits.size());
  for (uint64_t position = 0; position < 500; ++position) {
    const auto token = sampler.Sample(logits, params, 0, position, {}, nullptr);
    ASSERT_TRUE(token.ok());
    ++drawn[static_cast<size_t>(*token)];
  }
  EXPECT_GT(drawn[2], 0);
  EXPECT_EQ(drawn[3], 0);
}

}  // namespace
}  // namespace firesteel
