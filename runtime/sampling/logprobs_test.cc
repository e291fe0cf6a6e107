#include "runtime/sampling/logprobs.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

namespace firesteel {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

TEST(LogprobOf, IsTheLogarithmOfTheSoftmax) {
  const std::vector<double> p = {0.1, 0.4, 0.05, 0.25, 0.2};
  std::vector<float> logits;
  for (const double v : p) logits.push_back(static_cast<float>(std::log(v) + 300));
  for (size_t i = 0; i < p.size(); ++i) {
    const TokenLogprob result = LogprobOf(logits, static_cast<int32_t>(i), 0);
    EXPECT_EQ(result.token_id, static_cast<int32_t>(i));
    EXPECT_NEAR(result.logprob, std::log(p[i]), 4e-5);  // float's spacing at 300
    EXPECT_TRUE(result.alternatives.empty());
  }
}

TEST(LogprobOf, AlternativesAreTheMostProbableInOrder) {
  const std::vector<float> logits = {1, 3, 2, 3, 0, kNaN, kInf};
  const TokenLogprob result = LogprobOf(logits, 4, 3);
  ASSERT_EQ(result.alternatives.size(), 3u);
  EXPECT_EQ(result.alternatives[0].token_id, 1);
  EXPECT_EQ(result.alternatives[1].token_id, 3);
  EXPECT_EQ(result.alternatives[2].token_id, 2);
  EXPECT_EQ(result.alternatives[0].logprob, result.alternatives[1].logprob);
  EXPECT_NEAR(result.alternatives[0].logprob - result.logprob, 3, 1e-6);
  EXPECT_EQ(LogprobOf(logits, 0, 20).alternatives.size(), 5u) << "what is not finite is none";
  EXPECT_EQ(LogprobOf(logits, 5, 0).logprob, -kInf);
}

}  // namespace
}  // namespace firesteel
