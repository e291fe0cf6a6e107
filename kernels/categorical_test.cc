#include "kernels/categorical.h"

#include <numeric>

#include "kernels/reference.h"
#include "kernels/test_util.h"

namespace firesteel::kernels {
namespace {

class CategoricalTest : public SimdTest {
 protected:
  // Random logits, among them NaN, −∞ and some that weigh nothing.
  void FillLogits(std::span<float> logits) {
    random_.Fill(logits, 3.0f);
    constexpr float kSpecial[] = {kNaN, -kInf, -1e4f, -1e30f};
    for (size_t i = 1; i < logits.size(); i += 5) logits[i] = kSpecial[random_.Below(4)];
  }

  Random random_{1};
};
FIRESTEEL_FOR_EACH_SIMD_TARGET(CategoricalTest);

constexpr float kTemperatures[] = {0.1f, 1.0f, 2.5f};

// That of the exponent, and a few roundings. Weights so small that their floats are denormal may
// be 0.
double WeightTolerance(double expected, float temperature) {
  constexpr double kLargestExponent = 88;  // of weights that are floats at all
  const double exponent = std::min(kLargestExponent, 40.0 / static_cast<double>(temperature));
  return kEps * expected * (4 + exponent) + kTiny;
}

TEST_P(CategoricalTest, LargestLogitLeavesNaNOut) {
  for (const size_t n : Lengths()) {
    for (const size_t misalign : {0, 1, 3}) {
      Guarded<float> logits(n, misalign);
      FillLogits(logits.span());
      float expected = -kInf;
      for (const float logit : logits.span()) {
        if (logit > expected) expected = logit;
      }
      EXPECT_EQ(LargestLogit(logits.data(), n), expected) << n;
    }
  }
}

TEST_P(CategoricalTest, LargestLogitIsFoundAtEachPlace) {
  for (const size_t n : {1u, 17u, 130u}) {
    for (size_t place = 0; place < n; ++place) {
      std::vector<float> logits(n, -5.0f);
      logits[place] = -4.0f;
      EXPECT_EQ(LargestLogit(logits.data(), n), -4.0f) << place << " of " << n;
      logits[place] = kInf;
      EXPECT_EQ(LargestLogit(logits.data(), n), kInf) << place << " of " << n;
    }
  }
  const std::vector<float> none(40, kNaN);
  EXPECT_EQ(LargestLogit(none.data(), none.size()), -kInf);
}

TEST_P(CategoricalTest, WeightsMatchReference) {
  for (const size_t n : Lengths()) {
    for (const float temperature : kTemperatures) {
      Guarded<float> logits(n, 1), weights(n, 3);
      FillLogits(logits.span());
      const float largest = n == 0 ? 0.0f : std::max(-20.0f, LargestLogit(logits.data(), n));
      const auto expected = reference::CategoricalWeights(logits.span(), largest, temperature);
      CategoricalWeights(logits.data(), n, largest, temperature, weights.data());
      EXPECT_LE(WorstError(weights.span(), expected,
                           [&](size_t i) { return WeightTolerance(expected[i], temperature); }),
                1.0)
          << n;
      EXPECT_TRUE(weights.GuardsIntact()) << n;

      CategoricalWeights(logits.data(), n, largest, temperature, logits.data());
      EXPECT_TRUE(SameBits(logits.span(), weights.span())) << "in place, n = " << n;
    }
  }
}

TEST_P(CategoricalTest, BlockSumsAreThoseOfTheWeights) {
  for (const size_t n : {0u, 1u, 15u, 511u, 512u, 513u, 1024u, 1300u, 2307u}) {
    for (const float temperature : kTemperatures) {
      const size_t blocks = (n + kCategoricalBlock - 1) / kCategoricalBlock;
      Guarded<float> logits(n, 1);
      Guarded<double> sums(blocks);
      FillLogits(logits.span());
      const float largest = n == 0 ? 0.0f : std::max(-20.0f, LargestLogit(logits.data(), n));
      const auto weights = reference::CategoricalWeights(logits.span(), largest, temperature);
      CategoricalBlockSums(logits.data(), n, largest, temperature, sums.data());
      for (size_t b = 0; b < blocks; ++b) {
        const auto begin = weights.begin() + static_cast<ptrdiff_t>(b * kCategoricalBlock);
        const auto end =
            weights.begin() + static_cast<ptrdiff_t>(std::min(n, (b + 1) * kCategoricalBlock));
        const double expected = std::accumulate(begin, end, 0.0);
        EXPECT_NEAR(
            sums[b], expected,
            WeightTolerance(expected, temperature) + SumTolerance(1.0, expected, kCategoricalBlock))
            << "block " << b << " of " << n;
      }
      EXPECT_TRUE(sums.GuardsIntact()) << n;
    }
  }
}

// So that a draw is greedy in the limit, and never without any weight.
TEST_P(CategoricalTest, LargestWeighsOneAtAnyTemperature) {
  const std::vector<float> logits = {1.0f, 2.0f, 1.999f, -3.0f};
  for (const float temperature : {std::numeric_limits<float>::denorm_min(), 1e-30f, 1e30f}) {
    std::vector<float> weights(4);
    CategoricalWeights(logits.data(), 4, 2.0f, temperature, weights.data());
    EXPECT_EQ(weights[1], 1.0f) << temperature;
    EXPECT_EQ(weights[2], temperature < 1.0f ? 0.0f : 1.0f) << temperature;
  }
}

TEST_P(CategoricalTest, ToleranceSeesAWrongTemperatureAndAMissingElement) {
  const size_t n = 512;
  const auto logits = random_.Floats(n);
  const float largest = LargestLogit(logits.data(), n);
  std::vector<float> weights(n);
  CategoricalWeights(logits.data(), n, largest, 1.0f, weights.data());
  const auto wrong = reference::CategoricalWeights(logits, largest, 1.0 + 1e-5);
  EXPECT_GT(WorstError(weights, wrong, [&](size_t i) { return WeightTolerance(wrong[i], 1.0f); }),
            1.0);
  double sum = 0;
  CategoricalBlockSums(logits.data(), n, largest, 1.0f, &sum);
  const auto right = reference::CategoricalWeights(logits, largest, 1.0);
  const double without_first = std::accumulate(right.begin() + 1, right.end(), 0.0);
  EXPECT_GT(std::abs(sum - without_first),
            WeightTolerance(sum, 1.0f) + SumTolerance(1.0, sum, kCategoricalBlock));
}

}  // namespace
}  // namespace firesteel::kernels
