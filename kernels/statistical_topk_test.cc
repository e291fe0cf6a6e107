#include "kernels/statistical_topk.h"

#include "kernels/reference.h"
#include "kernels/test_util.h"

namespace firesteel::kernels {
namespace {

class StatisticalTopKTest : public SimdTest {
 protected:
  Random random_{4};
};
FIRESTEEL_FOR_EACH_SIMD_TARGET(StatisticalTopKTest);

// Lower tail probability of the standard normal, in extended precision where the machine has it.
long double LowerTail(long double x) { return 0.5L * std::erfc(-x / std::sqrt(2.0L)); }

TEST(NormalQuantileTest, KnownValues) {
  EXPECT_EQ(NormalQuantile(0.5), 0.0);
  EXPECT_NEAR(NormalQuantile(0.975), 1.9599639845400545, 4e-15);
  EXPECT_NEAR(NormalQuantile(0.92), 1.4050715603096329, 4e-15);
  EXPECT_NEAR(NormalQuantile(1e-10), -6.3613409024040562, 1e-14);
  EXPECT_NEAR(NormalQuantile(0.02425), -1.9729610490848714, 1e-3);  // both sides of the branch
  EXPECT_EQ(NormalQuantile(0.25), -NormalQuantile(0.75));
}

TEST(NormalQuantileTest, InvertsTheDistributionFunction) {
  for (int i = -300; i < 0; ++i) {
    const double p = 0.5 * std::pow(10.0, i / 1.0);
    const long double x = NormalQuantile(p);
    // A relative error e of x is an error e · x² of ln p.
    const long double error = std::abs(LowerTail(x) / static_cast<long double>(p) - 1.0L);
    EXPECT_LE(static_cast<double>(error), 4e-16 * static_cast<double>(1.0L + x * x)) << p;
  }
  for (int i = 1; i < 1000; ++i) {
    const double p = i / 1000.0;
    EXPECT_NEAR(static_cast<double>(LowerTail(NormalQuantile(p))), p, 3e-16) << p;
  }
}

TEST(NormalQuantileTest, IsNaNOutsideItsDomain) {
  for (const double p :
       {0.0, 1.0, -0.1, 1.1, static_cast<double>(kNaN), static_cast<double>(kInf)}) {
    EXPECT_TRUE(std::isnan(NormalQuantile(p))) << p;
  }
  EXPECT_TRUE(std::isfinite(NormalQuantile(std::numeric_limits<double>::denorm_min())));
  EXPECT_TRUE(std::isfinite(NormalQuantile(1.0 - 0x1p-53)));
}

// Rounding of n additions of squares in double.
double ThresholdTolerance(std::span<const float> scores, double quantile) {
  const double n = static_cast<double>(scores.size());
  return 1e-16 * std::sqrt(n) * 8 * (MaxAbs(scores) + 1e-300) * (1.0 + std::abs(quantile));
}

TEST_P(StatisticalTopKTest, ThresholdMatchesReferenceAndSeesAWrongDivisor) {
  for (const size_t n : Lengths()) {
    if (n < 2) continue;
    for (const float shift : {0.0f, 3.0f}) {
      Guarded<float> scores(n, n % 4);
      random_.Fill(scores.span());
      for (float& s : scores.span()) s += shift;
      const double quantile = NormalQuantile(0.92);
      const double theta = StatisticalThreshold(scores.data(), n, quantile);
      const double tolerance = ThresholdTolerance(scores.span(), quantile);
      const double exact = reference::StatisticalThreshold(scores.span(), quantile);
      EXPECT_NEAR(theta, exact, tolerance) << n;
      const double wrong = reference::StatisticalThreshold(scores.span(), quantile, 0);
      EXPECT_GT(std::abs(theta - wrong), tolerance) << "the divisor n, " << n;
      if (n > 2) {
        const double shorter =
            reference::StatisticalThreshold(scores.span().first(n - 1), quantile);
        EXPECT_GT(std::abs(theta - shorter), tolerance) << "without the last score, " << n;
      }
    }
  }
}

TEST_P(StatisticalTopKTest, ThresholdOfLargeOffsetsKeepsTheStd) {
  // In f32 the squares of these would leave nothing of a std of 1.
  std::vector<float> scores = random_.Floats(3072);
  for (float& s : scores) s += 10000.0f;
  const double exact = reference::StatisticalThreshold(scores, 1.4);
  EXPECT_NEAR(StatisticalThreshold(scores.data(), scores.size(), 1.4), exact, 1e-9);
}

TEST_P(StatisticalTopKTest, EqualScoresHaveNoSpread) {
  for (const size_t n : {2, 5, 16, 33, 1000}) {
    const std::vector<float> scores(n, 0.1f);
    EXPECT_EQ(StatisticalThreshold(scores.data(), n, 5.0), static_cast<double>(0.1f)) << n;
    std::vector<uint32_t> indices(n + kCompactionSlack);
    EXPECT_EQ(CompactAbove(scores.data(), n, static_cast<double>(0.1f), indices.data(), nullptr),
              0u);
  }
}

TEST_P(StatisticalTopKTest, ScoresThatAreNotFiniteGiveNaN) {
  for (const float bad : {kNaN, kInf, -kInf}) {
    for (const size_t at : {0, 1, 20, 36}) {
      std::vector<float> scores = random_.Floats(37);
      scores[at] = bad;
      EXPECT_TRUE(std::isnan(StatisticalThreshold(scores.data(), 37, 1.4))) << bad << " at " << at;
    }
  }
}

TEST_P(StatisticalTopKTest, AboutKOfGaussianScoresSurvive) {
  const size_t n = 13824, k = 1106;
  const std::vector<float> scores = random_.Floats(n, 0.3f);
  const double theta =
      StatisticalThreshold(scores.data(), n, NormalQuantile(1.0 - 1106.0 / 13824.0));
  std::vector<uint32_t> indices(n + kCompactionSlack);
  const size_t count = CompactAbove(scores.data(), n, theta, indices.data(), nullptr);
  EXPECT_NEAR(static_cast<double>(count), static_cast<double>(k), 100.0);
}

TEST_P(StatisticalTopKTest, CompactionMatchesReference) {
  for (const size_t n : Lengths()) {
    // Survivors: none, 8%, half, all.
    for (const double theta : {100.0, 1.4050715603, 0.0, -100.0}) {
      Guarded<float> scores(n, n % 5);
      random_.Fill(scores.span());
      for (size_t i = 0; i < n; i += 4)
        scores[i] = static_cast<float>(theta);  // ties are not above
      const auto expected =
          reference::CompactAbove(scores.span(), static_cast<double>(static_cast<float>(theta)));
      Guarded<uint32_t> indices(n + kCompactionSlack, 1);
      Guarded<float> excess(n + kCompactionSlack, 3);
      const double limit = static_cast<double>(static_cast<float>(theta));
      const size_t count = CompactAbove(scores.data(), n, limit, indices.data(), excess.data());
      ASSERT_EQ(std::vector<uint32_t>(indices.data(), indices.data() + count), expected) << n;
      for (size_t j = 0; j < count; ++j) {
        const double exact = static_cast<double>(scores[indices[j]]) - limit;
        EXPECT_GT(excess[j], 0.0f);
        EXPECT_NEAR(excess[j], exact, kEps * exact);
      }
      EXPECT_TRUE(indices.GuardsIntact() && excess.GuardsIntact()) << n;
      if (n > 0) {
        const auto wrong = reference::CompactAbove(scores.span(), limit, /*strict=*/false);
        EXPECT_NE(expected.size(), wrong.size()) << "≥ instead of >";
      }
      Guarded<uint32_t> alone(n + kCompactionSlack);
      ASSERT_EQ(CompactAbove(scores.data(), n, limit, alone.data(), nullptr), count);
      EXPECT_TRUE(std::equal(alone.data(), alone.data() + count, indices.data()));
    }
  }
}

// θ is a double between two floats: neither neighbour may be misjudged by rounding it to f32.
TEST_P(StatisticalTopKTest, ComparesAsReals) {
  for (const float base :
       {1.0f, -1.0f, 1e-20f, -3e10f, std::numeric_limits<float>::denorm_min(), 0.0f}) {
    const float above = std::nextafter(base, kInf), below = std::nextafter(base, -kInf);
    const std::vector<float> scores = {below, base, above};
    const double to_above = static_cast<double>(above) - static_cast<double>(base);
    const double to_below = static_cast<double>(base) - static_cast<double>(below);
    const auto survivors = [&](double theta) {
      std::vector<uint32_t> indices(3 + kCompactionSlack);
      std::vector<float> excess(3 + kCompactionSlack);
      const size_t n = CompactAbove(scores.data(), 3, theta, indices.data(), excess.data());
      for (size_t j = 0; j < n; ++j) EXPECT_GT(excess[j], 0.0f) << base;
      return n;
    };
    EXPECT_EQ(survivors(static_cast<double>(base)), 1u) << base;
    EXPECT_EQ(survivors(static_cast<double>(base) + 0.25 * to_above), 1u) << base;
    EXPECT_EQ(survivors(static_cast<double>(base) + 0.75 * to_above), 1u) << base;
    EXPECT_EQ(survivors(static_cast<double>(base) - 0.25 * to_below), 2u) << base;
    EXPECT_EQ(survivors(static_cast<double>(base) - 0.75 * to_below), 2u) << base;
  }
}

TEST_P(StatisticalTopKTest, ThresholdsAtTheEndsOfTheRange) {
  constexpr float kMax = std::numeric_limits<float>::max();
  const std::vector<float> scores = {-kInf, -kMax, -1.0f, kNaN, 1.0f, kMax, kInf};
  const auto survivors = [&](double theta) {
    std::vector<uint32_t> indices(7 + kCompactionSlack);
    const size_t n = CompactAbove(scores.data(), 7, theta, indices.data(), nullptr);
    return std::vector<uint32_t>(indices.begin(), indices.begin() + static_cast<ptrdiff_t>(n));
  };
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  using Indices = std::vector<uint32_t>;
  EXPECT_EQ(survivors(std::numeric_limits<double>::quiet_NaN()), Indices());
  EXPECT_EQ(survivors(kInfinity), Indices());
  EXPECT_EQ(survivors(1e300), Indices({6}));
  EXPECT_EQ(survivors(static_cast<double>(kMax)), Indices({6}));
  EXPECT_EQ(survivors(std::nextafter(static_cast<double>(kMax), 0.0)), Indices({5, 6}));
  EXPECT_EQ(survivors(-1e300), Indices({1, 2, 4, 5, 6}));
  EXPECT_EQ(survivors(-kInfinity), Indices({1, 2, 4, 5, 6}));
}

}  // namespace
}  // namespace firesteel::kernels
