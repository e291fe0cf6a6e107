#include "kernels/integer_rows.h"

#include <algorithm>

#include "kernels/quantized_test_util.h"
#include "kernels/reference.h"

namespace firesteel::kernels {
namespace {

class IntegerRowsTest : public SimdTest {
 protected:
  Random random_{11};
};
FIRESTEEL_FOR_EACH_SIMD_TARGET(IntegerRowsTest);

// 8-bit weights; what pads a row is not zero, since nothing says that it is.
struct Rows {
  Rows(Random& random, size_t num_rows, size_t num_cols)
      : rows(num_rows), cols(num_cols), stride(SumCols(num_cols)), bytes(num_rows * stride) {
    std::fill(bytes.data(), bytes.data() + bytes.size(), int8_t{77});
    for (size_t r = 0; r < rows; ++r) {
      auto values = random.Floats(cols);
      for (float& v : values) v *= static_cast<float>(1 + r % 3);
      std::vector<int8_t> padded(stride);
      scales.push_back(QuantizeWeightsI8(values.data(), cols, padded.data()));
      std::copy_n(padded.data(), cols, bytes.data() + r * stride);
    }
  }
  TypedView view() const {
    return {bytes.data(), DType::kI8, rows, cols, stride, scales.data(), nullptr};
  }

  const size_t rows, cols, stride;
  Guarded<int8_t> bytes;
  std::vector<float> scales;
};

// The whole product, one way or the other.
std::vector<float> Product(const std::vector<float>& coefficients,
                           const std::vector<uint32_t>& active, const Rows& w, bool by_columns) {
  GuardedRows rounded(1, active.size());
  std::vector<float> scaled = coefficients;
  const QuantizedRows& c = rounded.view();
  QuantizeCoefficients(scaled.data(), active.data(), w.view(), c);
  Guarded<float> y(SumCols(w.cols));
  RowFetcher fetcher;  // asks for some of the rows meanwhile, which changes nothing
  fetcher.Add(w.view(), active.data(), active.size() / 2, 0, w.stride);
  if (by_columns) {
    std::fill(y.data(), y.data() + y.size(), 0.0f);
    const size_t middle = SumCols(w.cols / 2);
    SumIntegerColumns(c, active.data(), w.view(), middle, SumCols(w.cols), false, fetcher,
                      y.data());
    SumIntegerColumns(c, active.data(), w.view(), 0, middle, true, fetcher, y.data());
  } else {
    Guarded<int32_t> sums(SumCols(w.cols));
    std::fill(sums.data(), sums.data() + sums.size(), 0);
    SumIntegerRows(c, active.data(), w.view(), fetcher, sums.data(), y.data());
    EXPECT_TRUE(
        std::all_of(sums.span().begin(), sums.span().end(), [](int32_t v) { return v == 0; }));
    EXPECT_TRUE(sums.GuardsIntact());
  }
  ToColumnOrder(w.cols, y.data());
  EXPECT_TRUE(y.GuardsIntact() && rounded.GuardsIntact());
  return {y.data(), y.data() + w.cols};
}

TEST_P(IntegerRowsTest, MatchesReference) {
  for (const size_t cols : {1, 15, 16, 63, 64, 65, 130, 257, 512}) {
    for (const double density : {0.0, 0.08, 0.5, 1.0}) {
      Rows w(random_, 61, cols);
      const auto active = random_.Subset(w.rows, density);
      const auto coefficients = FloatsWithOutliers(random_, active.size());
      const auto y = Product(coefficients, active, w, false);
      EXPECT_TRUE(SameBits(Product(coefficients, active, w, true), y));
      const auto exact = reference::SparseVecMat(coefficients, active, w.view());
      // Half a step for each coefficient, times the largest weight.
      std::vector<float> scaled = coefficients;
      for (size_t j = 0; j < active.size(); ++j) scaled[j] *= w.scales[active[j]];
      GuardedRows rounded(1, active.size());
      QuantizeActivations(scaled.data(), rounded.view(), 0);
      const double step = static_cast<double>(rounded.view().scales[0]);
      const double tolerance =
          step * 0.51 * 127 * static_cast<double>(active.size()) +
          4 * kEps * MaxAbs(scaled) * 127 * static_cast<double>(active.size()) + kTiny;
      EXPECT_LE(WorstError(y, exact, [&](size_t) { return tolerance; }), 1.0) << cols;
      if (active.size() < 3 || cols < 4) continue;
      std::vector<float> wrong = coefficients;
      wrong.back() += 8 * static_cast<float>(MaxAbs(coefficients));
      EXPECT_GT(
          WorstError(Product(wrong, active, w, false), exact, [&](size_t) { return tolerance; }),
          1.0);
    }
  }
}

// Sums are exact and only their order of columns is the target's own.
TEST_P(IntegerRowsTest, EveryTargetGivesTheSameBits) {
  Random random(5);  // the same values for all
  Rows w(random, 70, 300);
  const auto active = random.Subset(w.rows, 0.6);
  const auto coefficients = FloatsWithOutliers(random, active.size());
  const auto y = Product(coefficients, active, w, false);
  ASSERT_TRUE(ForceSimdTarget(AvailableSimdTargets().back()));
  EXPECT_TRUE(SameBits(Product(coefficients, active, w, false), y));
}

TEST_P(IntegerRowsTest, ValuesThatAreNotFiniteSpoilTheSum) {
  Rows w(random_, 9, 20);
  const std::vector<uint32_t> active = {0, 3, 4, 8};
  for (const float bad : {kNaN, kInf}) {
    for (const float v : Product({1.0f, bad, 1.0f, 1.0f}, active, w, true))
      EXPECT_FALSE(std::isfinite(v));
  }
}

}  // namespace
}  // namespace firesteel::kernels
