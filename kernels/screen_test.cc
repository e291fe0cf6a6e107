#include "kernels/screen.h"

#include "kernels/quantized_test_util.h"
#include "kernels/reference.h"
#include "kernels/statistical_topk.h"

namespace firesteel::kernels {
namespace {

class ScreenTest : public SimdTest {
 protected:
  Random random_{23};
};
FIRESTEEL_FOR_EACH_SIMD_TARGET(ScreenTest);

// Random rows, rounded to 2 bits; codes between guards.
struct Rows {
  Rows(Random& random, size_t num_rows, size_t num_cols)
      : rows(num_rows),
        cols(num_cols),
        exact(rows * PaddedI2Cols(cols)),
        codes(rows * BytesOfI2Row(cols)),
        scales(rows) {
    for (size_t r = 0; r < rows; ++r) {
      random.Fill(std::span(Row(r), cols));
      about.push_back(QuantizeWeightsI2(Row(r), cols, codes.data() + r * BytesOfI2Row(cols)));
      scales[r] = about.back().scale;
    }
  }
  float* Row(size_t r) { return &exact[r * PaddedI2Cols(cols)]; }
  I2View view() const { return {codes.data(), scales.data(), rows, cols}; }

  const size_t rows, cols;
  std::vector<float> exact;
  Guarded<uint8_t> codes;
  std::vector<float> scales;
  std::vector<I2Row> about;
};

// Activations [tokens, PaddedI2Cols(cols)], zeros behind cols.
struct Activations {
  Activations(size_t num_rows, size_t num_cols)
      : rows(num_rows), cols(num_cols), padded(PaddedI2Cols(num_cols)), rounded(num_rows, padded) {}
  const QuantizedRows& view() const { return rounded.view(); }
  void Set(size_t row, std::span<const float> x) {
    std::vector<float> all(padded, 0.0f);
    std::copy(x.begin(), x.end(), all.begin());
    QuantizeToBytes(all.data(), view(), row);
  }
  double At(size_t row, size_t col) const { return rounded.At(row, col); }

  const size_t rows, cols, padded;
  GuardedRows rounded;
};

double Norm(std::span<const float> x) {
  double sum = 0;
  for (const float v : x) sum += static_cast<double>(v) * static_cast<double>(v);
  return std::sqrt(sum);
}

TEST_P(ScreenTest, RoundingLeavesAResidualOrthogonalToTheRow) {
  for (const size_t cols : Lengths()) {
    if (cols == 0) continue;
    Rows w(random_, 3, cols);
    ASSERT_TRUE(w.codes.GuardsIntact());
    for (size_t r = 0; r < w.rows; ++r) {
      const double scale = static_cast<double>(w.scales[r]);
      const double norm = Norm({w.Row(r), cols});
      double product = 0, residual = 0, levels = 0;
      for (size_t c = 0; c < cols; ++c) {
        std::vector<double> unit(cols, 0.0);
        unit[c] = 1.0;
        const double level = reference::ScreenMatMul(unit, w.view())[r];  // scale · q
        const double value = static_cast<double>(w.Row(r)[c]);
        ASSERT_TRUE(value == 0.0 || (value > 0) == (level > 0)) << cols << " at " << c;
        product += (value - level) * value;
        residual += (value - level) * (value - level);
        levels += level * level;
        if (cols > 300) c += 6;  // the sums of long rows are not compared below
      }
      ASSERT_GT(scale, 0.0);
      if (cols > 300) continue;
      ASSERT_NEAR(product, 0.0, 1e-5 * norm * norm) << cols;
      ASSERT_NEAR(static_cast<double>(w.about[r].residual), std::sqrt(residual), 2e-3 * norm);
      ASSERT_NEAR(static_cast<double>(w.about[r].norm), std::sqrt(levels), 1e-5 * norm);
    }
  }
  // The two-bit quantizer of a Gaussian has the distortion 0.1188 (Max, 1960).
  Rows w(random_, 20, 2304);
  for (size_t r = 0; r < w.rows; ++r) {
    const double ratio = static_cast<double>(w.about[r].residual) / Norm({w.Row(r), 2304});
    EXPECT_NEAR(ratio, std::sqrt(0.1188 / (1 - 0.1188)), 0.015);
  }
}

TEST_P(ScreenTest, ARowOfZerosGivesZeros) {
  const std::vector<float> zeros(256, 0.0f);
  std::vector<uint8_t> codes(64);
  const I2Row row = QuantizeWeightsI2(zeros.data(), 100, codes.data());
  EXPECT_EQ(row.scale, 0.0f);
  EXPECT_EQ(row.residual, 0.0f);
  Activations x(1, 100);
  x.Set(0, random_.Floats(100));
  float y = kNaN;
  ScreenMatMul(x.view(), {codes.data(), &row.scale, 1, 100}, 0, 1, {&y, 1, 1, 1});
  EXPECT_EQ(y, 0.0f);
}

TEST_P(ScreenTest, MatMulMatchesReference) {
  for (const size_t cols : Lengths()) {
    if (cols == 0) continue;
    for (const size_t tokens : {1, 2, 3, 5}) {
      const size_t rows = 1 + random_.Below(11);
      Rows w(random_, rows, cols);
      Activations x(tokens, cols);
      std::vector<double> rounded;
      for (size_t t = 0; t < tokens; ++t) {
        x.Set(t, random_.Floats(cols));
        for (size_t c = 0; c < cols; ++c) rounded.push_back(x.At(t, c));
      }
      const std::vector<double> exact = reference::ScreenMatMul(rounded, w.view());
      Guarded<float> y(tokens * rows);
      ScreenMatMul(x.view(), w.view(), 0, rows, {y.data(), tokens, rows, rows});
      // Integers are exact: what is left is the rounding of four products of floats.
      ASSERT_LE(WorstError(y.span(), exact,
                           [&](size_t i) { return 4 * kEps * std::abs(exact[i]) + kTiny; }),
                1.0)
          << cols << " x " << rows;
      ASSERT_TRUE(y.GuardsIntact());
    }
  }
}

TEST_P(ScreenTest, TokensAndRowRangesDoNotChangeBits) {
  const size_t cols = 700, rows = 23, tokens = 5;
  Rows w(random_, rows, cols);
  Activations x(tokens, cols);
  for (size_t t = 0; t < tokens; ++t) x.Set(t, random_.Floats(cols));
  std::vector<float> whole(tokens * rows);
  ScreenMatMul(x.view(), w.view(), 0, rows, {whole.data(), tokens, rows, rows});
  for (size_t t = 0; t < tokens; ++t) {
    for (size_t at = 0; at <= rows; at += 3) {
      Guarded<float> cut(rows);
      const MatView y{cut.data(), 1, rows, rows};
      ScreenMatMul(x.view().From(t, 1), w.view(), at, rows, y);
      for (size_t r = 0; r < at; ++r) ASSERT_TRUE(std::isnan(cut[r]));
      ScreenMatMul(x.view().From(t, 1), w.view(), 0, at, y);
      ASSERT_TRUE(SameBits(cut.span(), std::span(whole).subspan(t * rows, rows)));
    }
  }
}

std::vector<float> Signs(Random& random, size_t n) {
  std::vector<float> signs(n);
  for (float& s : signs) s = random.Below(2) == 0 ? 1.0f : -1.0f;
  return signs;
}

TEST_P(ScreenTest, RotationMatchesReferenceAndKeepsProducts) {
  for (const size_t n : Lengths()) {
    if (n == 0 || n > 1000) continue;
    const auto signs = Signs(random_, 3 * n);
    const auto x = random_.Floats(n), y = random_.Floats(n);
    auto rotated_x = x, rotated_y = y;
    RotateAtRandom(signs.data(), n, rotated_x.data());
    RotateAtRandom(signs.data(), n, rotated_y.data());
    const auto exact = reference::RotateAtRandom(signs, x);
    const double tolerance = SumTolerance(MaxAbs(x), 1.0, 3 * n);
    ASSERT_LE(WorstError(rotated_x, exact, [&](size_t) { return tolerance; }), 1.0) << n;
    double before = 0, after = 0;
    for (size_t i = 0; i < n; ++i) {
      before += static_cast<double>(x[i]) * static_cast<double>(y[i]);
      after += static_cast<double>(rotated_x[i]) * static_cast<double>(rotated_y[i]);
    }
    ASSERT_NEAR(before, after, 1e-5 * Norm(x) * Norm(y)) << n;
  }
  RotateAtRandom(nullptr, 0, nullptr);
}

TEST_P(ScreenTest, PossibleRowsMatchTheDefinition) {
  for (const size_t n : Lengths()) {
    const auto estimates = random_.Floats(n);
    auto radii = random_.Floats(n);
    for (float& r : radii) r = std::abs(r);
    for (const float threshold : {-kInf, -1.0f, 0.5f, 2.0f, kInf}) {
      const size_t begin = n / 3;
      std::vector<uint32_t> expected;
      for (size_t i = begin; i < n; ++i) {
        const float width = 0.5f * radii[i];
        if (estimates[i] + width >= threshold) expected.push_back(static_cast<uint32_t>(i));
      }
      Guarded<uint32_t> ids(n - begin + kCompactionSlack);
      const size_t count =
          ListPossible(estimates.data(), radii.data(), 0.5f, threshold, begin, n, ids.data());
      ASSERT_EQ(std::vector<uint32_t>(ids.data(), ids.data() + count), expected) << n;
      ASSERT_TRUE(ids.GuardsIntact());
    }
  }
  const float nan = kNaN, one = 1.0f;
  Guarded<uint32_t> ids(1 + kCompactionSlack);
  EXPECT_EQ(ListPossible(&nan, &one, 1.0f, -kInf, 0, 1, ids.data()), 0u);
}

// What the whole method rests on: errors of rotated rows are Gaussian, of the stated size, whatever
// the rows and the inputs look like.
TEST(ScreenErrorTest, NormalizedErrorsAreGaussian) {
  Random random(3);
  const size_t d = 512, rotations = 500, rows = 40, inputs = 20;
  Activations x(1, d);
  // Rows that share a direction and have a few large columns, as trained embeddings do; the inputs
  // share it, too. Errors of one rotation are then not independent, hence many rotations.
  std::vector<float> weight(d, 0.3f);
  for (size_t i = 0; i < d; i += 97) weight[i] = 8.0f;
  double n = 0, squares = 0, fourth = 0, sum = 0;
  double beyond[4] = {};
  std::vector<float> y(rows), w(rows * d), scales(rows);
  std::vector<I2Row> about(rows);
  std::vector<uint8_t> codes(rows * BytesOfI2Row(d));
  for (size_t rotation = 0; rotation < rotations; ++rotation) {
    const auto signs = Signs(random, 3 * d);
    const auto shared = random.Floats(d);
    for (size_t r = 0; r < rows; ++r) {
      random.Fill(std::span(&w[r * d], d));
      for (size_t i = 0; i < d; ++i) w[r * d + i] = (w[r * d + i] + shared[i]) * weight[i];
      RotateAtRandom(signs.data(), d, &w[r * d]);
      about[r] = QuantizeWeightsI2(&w[r * d], d, &codes[r * BytesOfI2Row(d)]);
      scales[r] = about[r].scale;
    }
    for (size_t i = 0; i < inputs; ++i) {
      auto h = random.Floats(d);
      for (size_t k = 0; k < d; ++k) h[k] = (h[k] - 0.5f * shared[k]) * weight[k];
      RotateAtRandom(signs.data(), d, h.data());
      x.Set(0, h);
      ScreenMatMul(x.view(), {codes.data(), scales.data(), rows, d}, 0, rows,
                   {y.data(), 1, rows, rows});
      const double norm = Norm(h);
      for (size_t r = 0; r < rows; ++r) {
        double z = 0, square = 0;
        for (size_t k = 0; k < d; ++k) {
          const double value = static_cast<double>(w[r * d + k]);
          z += value * static_cast<double>(h[k]);
          square += value * value;
        }
        const double sine = std::sqrt(1 - z * z / (norm * norm * square));
        const double sigma =
            static_cast<double>(about[r].residual) * norm * sine / std::sqrt(d - 1.0);
        const double error = (z - static_cast<double>(y[r])) / sigma;
        n += 1;
        sum += error;
        squares += error * error;
        fourth += error * error * error * error;
        for (int c = 1; c <= 3; ++c) beyond[c] += error > c ? 1 : 0;
      }
    }
  }
  const double variance = squares / n;
  EXPECT_NEAR(sum / n, 0.0, 0.02);
  EXPECT_NEAR(variance, 1.0, 0.03);
  EXPECT_NEAR(fourth / n / (variance * variance), 3.0, 0.1);
  EXPECT_NEAR(beyond[1] / n, 0.1587, 0.005);
  EXPECT_NEAR(beyond[2] / n, 0.02275, 0.0015);
  EXPECT_NEAR(beyond[3] / n, 0.00135, 0.0003);
}

// Integers are exact: every target gives the same estimates.
TEST(ScreenTargetsTest, EstimatesAreTheSameOnAllTargets) {
  Random random(5);
  const std::string best = AvailableSimdTargets().front();
  const auto signs = Signs(random, 3 * 1000);
  auto values = random.Floats(1000);
  Rows w(random, 9, 1000);
  std::vector<float> first;
  for (const std::string& target : AvailableSimdTargets()) {
    ASSERT_TRUE(ForceSimdTarget(target));
    auto rotated = values;
    RotateAtRandom(signs.data(), 1000, rotated.data());
    Activations x(1, 1000);
    x.Set(0, rotated);
    std::vector<float> y(9);
    ScreenMatMul(x.view(), w.view(), 0, 9, {y.data(), 1, 9, 9});
    if (first.empty()) first = y;
    EXPECT_TRUE(SameBits(y, first)) << target;
  }
  ASSERT_TRUE(ForceSimdTarget(best));
}

}  // namespace
}  // namespace firesteel::kernels
