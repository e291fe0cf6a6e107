#include "kernels/quantized.h"

#include <algorithm>
#include <cmath>

#include "kernels/quantized_test_util.h"
#include "kernels/reference.h"

namespace firesteel::kernels {
namespace {

class QuantizedTest : public SimdTest {
 protected:
  Random random_{11};
};
FIRESTEEL_FOR_EACH_SIMD_TARGET(QuantizedTest);

constexpr size_t RoundUp(size_t n, size_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Random weights, rounded; rows between guards.
struct Weights {
  Weights(Random& random, DType type, size_t num_rows, size_t num_cols)
      : dtype(type),
        rows(num_rows),
        cols(num_cols),
        stride(RoundUp(num_cols, type == DType::kI4 ? kI4Group : kAlignment)),
        exact(rows * cols),
        bytes(BytesOf(type, rows * stride)),
        row_scales(rows),
        block_scales(rows * stride / kI4Block) {
    random.Fill(std::span(exact));
    for (size_t r = 0; r < rows; ++r) {
      if (dtype == DType::kI8) {
        row_scales[r] = QuantizeWeightsI8(&exact[r * cols], cols,
                                          reinterpret_cast<int8_t*>(bytes.data()) + r * stride);
      } else {
        QuantizeWeightsI4(&exact[r * cols], cols, bytes.data() + r * stride / 2,
                          &block_scales[r * stride / kI4Block]);
      }
    }
  }
  TypedView view() const {
    return {bytes.data(), dtype, rows, cols, stride, row_scales.data(), block_scales.data()};
  }

  const DType dtype;
  const size_t rows, cols, stride;
  std::vector<float> exact;
  Guarded<uint8_t> bytes;
  std::vector<float> row_scales;
  std::vector<BF16> block_scales;
};

constexpr DType kTypes[] = {DType::kI8, DType::kI4};

// Rounds x to one row of three and checks all that is said of it but the step.
void CheckRounded(std::span<const float> x, const GuardedRows& q) {
  const double step = static_cast<double>(q.view().scales[1]);
  int64_t high_sum = 0, low_sum = 0;
  const QuantizedRows row = q.view().From(1, 1);
  for (size_t i = 0; i < row.plane; ++i) {
    const int high = row.High(0)[i], low = row.Low(0)[i];
    high_sum += high;
    low_sum += low;
    ASSERT_LE(std::abs(high), 127);
    const double value = i < x.size() ? static_cast<double>(x[i]) : 0.0;
    ASSERT_NEAR(q.At(1, i), value, step * 0.51) << x.size() << " at " << i;
    if (high != 0) {
      ASSERT_TRUE(row.HighBlocks(0)[i / 64 / 64] >> (i / 64 % 64) & 1) << i;
    }
    if (i % 4 == 3) {
      const int8_t* four = row.Low(0) + i - 3;
      ASSERT_EQ(row.NibbleOffsets(0)[i / 4], -8 * (four[0] + four[1] + four[2] + four[3]));
    }
  }
  ForHighBlocks(row.HighBlocks(0), row.HighWords(), [&](size_t block) {
    const int8_t* const high = row.High(0) + block * kHighBlock;
    ASSERT_TRUE(std::any_of(high, high + kHighBlock, [](int8_t v) { return v != 0; })) << block;
  });
  ASSERT_EQ(row.HasHigh(0), high_sum != 0 || std::any_of(row.High(0), row.High(0) + row.plane,
                                                         [](int8_t v) { return v != 0; }));
  ASSERT_EQ(row.high_sums[0], high_sum);
  ASSERT_EQ(row.low_sums[0], low_sum);
}

TEST_P(QuantizedTest, ActivationsRoundToBytesAndWhatIsLeftOfOutliers) {
  size_t with_high = 0;
  for (const size_t cols : Lengths()) {
    if (cols == 0) continue;
    for (const bool outliers : {false, true}) {
      const std::vector<float> x =
          outliers ? FloatsWithOutliers(random_, cols) : random_.Floats(cols);
      GuardedRows q(3, cols);
      QuantizeActivations(x.data(), q.view(), 1);
      CheckRounded(x, q);
      double mean = 0;
      for (const float v : x) mean += std::abs(static_cast<double>(v)) / static_cast<double>(cols);
      const double largest = MaxAbs(std::span(x));
      const double step = std::clamp(6 * mean / 127, largest / 32512, largest / 127);
      ASSERT_NEAR(static_cast<double>(q.view().scales[1]), step, 1e-3 * step) << cols;
      with_high += q.view().HasHigh(1);
      ASSERT_TRUE(outliers || !q.view().HasHigh(1)) << cols;
      ASSERT_TRUE(q.GuardsIntact());
      ASSERT_EQ(q.view().High(0)[q.view().plane - 1], -1) << "the row before is untouched";
      ASSERT_EQ(q.view().Low(2)[0], -1) << "the row behind is untouched";
    }
  }
  EXPECT_GT(with_high, 10u);
}

TEST_P(QuantizedTest, BytesReachToTheLargestValue) {
  for (const size_t cols : Lengths()) {
    if (cols == 0) continue;
    const std::vector<float> x = FloatsWithOutliers(random_, cols);
    GuardedRows q(3, cols);
    QuantizeToBytes(x.data(), q.view(), 1);
    CheckRounded(x, q);
    ASSERT_FALSE(q.view().HasHigh(1)) << cols;
    const double step = MaxAbs(std::span(x)) / 127;
    ASSERT_NEAR(static_cast<double>(q.view().scales[1]), step, 1e-6 * step);
  }
}

// The largest value is a million times the others, or all are close to the least number there is.
TEST_P(QuantizedTest, ExtremesStayInRange) {
  std::vector<float> x(3000, 1e-6f);
  x[70] = -1.0f;
  GuardedRows q(3, x.size());
  QuantizeActivations(x.data(), q.view(), 1);
  CheckRounded(x, q);
  EXPECT_EQ(q.view().High(1)[70], -127);
  for (const float tiny : {1e-45f, 1e-40f, 1e-37f, 3e-34f}) {
    for (float& v : x) v = tiny;
    x[5] = 0.0f;
    QuantizeActivations(x.data(), q.view(), 1);
    for (size_t i = 0; i < x.size(); ++i) {
      ASSERT_NEAR(q.At(1, i), static_cast<double>(x[i]), 1e-36) << tiny;
    }
  }
}

TEST_P(QuantizedTest, ZerosStayZeros) {
  const std::vector<float> zeros(100, 0.0f);
  GuardedRows q(1, 100);
  QuantizeActivations(zeros.data(), q.view(), 0);
  EXPECT_EQ(q.view().scales[0], 0.0f);
  for (const DType dtype : kTypes) {
    Weights w(random_, dtype, 5, 100);
    std::vector<float> y(5, kNaN);
    QuantizedMatMul(q.view(), w.view(), 0, 5, {y.data(), 1, 5, 5});
    for (const float v : y) EXPECT_EQ(v, 0.0f);
  }
}

TEST_P(QuantizedTest, ValuesThatAreNotFiniteAreSeen) {
  for (const float spoiler : {kNaN, kInf, -kInf}) {
    std::vector<float> x = random_.Floats(70);
    x[33] = spoiler;
    GuardedRows q(1, 70);
    QuantizeActivations(x.data(), q.view(), 0);
    for (const DType dtype : kTypes) {
      Weights w(random_, dtype, 3, 70);
      std::vector<float> y(3);
      QuantizedMatMul(q.view(), w.view(), 0, 3, {y.data(), 1, 3, 3});
      for (const float v : y) EXPECT_FALSE(std::isfinite(v));
    }
  }
}

TEST_P(QuantizedTest, WeightsRoundToTheNearest) {
  for (const size_t cols : {1, 63, 64, 65, 128, 129, 300}) {
    for (const DType dtype : kTypes) {
      Weights w(random_, dtype, 4, cols);
      for (size_t r = 0; r < w.rows; ++r) {
        for (size_t c = 0; c < w.stride; ++c) {
          const double scale = dtype == DType::kI8
                                   ? static_cast<double>(w.row_scales[r])
                                   : static_cast<double>(ToF32(w.view().BlockScales(r)[c / 64]));
          const double rounded = reference::At(w.view(), r, c);
          if (c >= cols) {
            ASSERT_EQ(rounded, 0.0) << "padding";
            continue;
          }
          const double value = static_cast<double>(w.exact[r * cols + c]);
          // 4 bits: some scales clip the largest values on purpose.
          const double reach = dtype == DType::kI8 ? 127.5 : 7.0;
          if (std::abs(value) <= reach * std::abs(scale)) {
            ASSERT_NEAR(rounded, value, 0.5001 * std::abs(scale)) << r << ", " << c;
          } else {
            ASSERT_NEAR(rounded, value, 0.4 * std::abs(value)) << r << ", " << c;
          }
          float one = 0;
          if (c % kI4Group == 0) {
            Dequantize(w.view(), r, c, 1, &one);
            ASSERT_FLOAT_EQ(one, static_cast<float>(rounded));
          }
        }
      }
      ASSERT_TRUE(w.bytes.GuardsIntact());
    }
  }
}

TEST_P(QuantizedTest, DequantizeIsWhatTheBytesStandFor) {
  Weights w(random_, DType::kI4, 3, 300);
  std::vector<float> row(300);
  Dequantize(w.view(), 2, 0, 300, row.data());
  for (size_t c = 0; c < 300; ++c) {
    ASSERT_FLOAT_EQ(row[c], static_cast<float>(reference::At(w.view(), 2, c)));
  }
}

TEST_P(QuantizedTest, MatMulMatchesReference) {
  for (const size_t cols : Lengths()) {
    if (cols == 0) continue;
    for (const DType dtype : kTypes) {
      for (const size_t tokens : {1, 2, 5}) {
        const size_t rows = 1 + random_.Below(11);
        Weights w(random_, dtype, rows, cols);
        GuardedRows q(tokens, cols);
        for (size_t t = 0; t < tokens; ++t) {
          QuantizeActivations(FloatsWithOutliers(random_, cols).data(), q.view(), t);
        }
        std::vector<double> exact;
        double largest = 0;
        for (size_t t = 0; t < tokens; ++t) {
          for (size_t r = 0; r < rows; ++r) {
            double sum = 0;
            for (size_t c = 0; c < cols; ++c) {
              const double product = q.At(t, c) * reference::At(w.view(), r, c);
              sum += product;
              largest = std::max(largest, std::abs(product));
            }
            exact.push_back(sum);
          }
        }
        Guarded<float> y(tokens * rows);
        QuantizedMatMul(q.view(), w.view(), 0, rows, {y.data(), tokens, rows, rows});
        const double tolerance = SumTolerance(largest, 1.0, cols) + kTiny;
        ASSERT_LE(WorstError(y.span(), exact, [&](size_t) { return tolerance; }), 1.0)
            << cols << " x " << rows;
        ASSERT_TRUE(y.GuardsIntact());
        // A wrong sign in one product must not pass.
        exact[0] += 2 * q.At(0, 0) * reference::At(w.view(), 0, 0);
        if (std::abs(q.At(0, 0) * reference::At(w.view(), 0, 0)) > tolerance) {
          ASSERT_GT(WorstError(y.span(), exact, [&](size_t) { return tolerance; }), 1.0);
        }
      }
    }
  }
}

TEST_P(QuantizedTest, TokensAndRowRangesDoNotChangeBits) {
  const size_t cols = 330, rows = 23, tokens = 7;
  for (const DType dtype : kTypes) {
    Weights w(random_, dtype, rows, cols);
    GuardedRows q(tokens, cols);
    for (size_t t = 0; t < tokens; ++t) {
      QuantizeActivations(FloatsWithOutliers(random_, cols).data(), q.view(), t);
    }
    std::vector<float> whole(tokens * rows);
    QuantizedMatMul(q.view(), w.view(), 0, rows, {whole.data(), tokens, rows, rows});
    for (size_t t = 0; t < tokens; ++t) {
      for (size_t at = 0; at <= rows; at += 3) {
        Guarded<float> cut(rows);
        const MatView y{cut.data(), 1, rows, rows};
        QuantizedMatMul(q.view().From(t, 1), w.view(), at, rows, y);
        for (size_t r = 0; r < at; ++r) ASSERT_TRUE(std::isnan(cut[r]));
        QuantizedMatMul(q.view().From(t, 1), w.view(), 0, at, y);
        ASSERT_TRUE(SameBits(cut.span(), std::span(whole).subspan(t * rows, rows)));
        ASSERT_TRUE(cut.GuardsIntact());
      }
    }
  }
}

TEST_P(QuantizedTest, MaskedMatVecHasTheBitsOfMatMul) {
  for (const double density : {0.0, 0.08, 1.0}) {
    for (const DType dtype : kTypes) {
      const size_t cols = 200, rows = 90;
      Weights w(random_, dtype, rows, cols);
      GuardedRows q(2, cols);
      for (size_t t = 0; t < 2; ++t) {
        QuantizeActivations(FloatsWithOutliers(random_, cols).data(), q.view(), t);
      }
      std::vector<float> dense(rows);
      QuantizedMatMul(q.view().From(1, 1), w.view(), 0, rows, {dense.data(), 1, rows, rows});
      const auto active = random_.Subset(rows, density);
      std::vector<float> expected;
      for (const uint32_t row : active) expected.push_back(dense[row]);
      Guarded<float> out(active.size());
      const size_t at = active.size() / 3;
      RowFetcher fetcher;
      QuantizedMaskedMatVec(q.view().From(1, 1), w.view(), active.data(), at, active.size(),
                            fetcher, out.data());
      for (size_t j = 0; j < at; ++j) ASSERT_TRUE(std::isnan(out[j]));
      QuantizedMaskedMatVec(q.view().From(1, 1), w.view(), active.data(), 0, at, fetcher,
                            out.data());
      ASSERT_TRUE(SameBits(out.span(), expected)) << density;
      ASSERT_TRUE(out.GuardsIntact());
    }
  }
}

// Integers are exact: for 8-bit weights every target gives the same bits.
TEST(QuantizedTargetsTest, EightBitsAreTheSameOnAllTargets) {
  Random random(5);
  const std::string best = AvailableSimdTargets().front();
  std::vector<float> first;
  const std::vector<float> values = FloatsWithOutliers(random, 1000);
  Weights w(random, DType::kI8, 9, 1000);
  for (const std::string& target : AvailableSimdTargets()) {
    ASSERT_TRUE(ForceSimdTarget(target));
    GuardedRows q(1, 1000);
    QuantizeActivations(values.data(), q.view(), 0);
    std::vector<float> y(9);
    QuantizedMatMul(q.view(), w.view(), 0, 9, {y.data(), 1, 9, 9});
    if (first.empty()) first = y;
    EXPECT_TRUE(SameBits(y, first)) << target;
  }
  ASSERT_TRUE(ForceSimdTarget(best));
}

}  // namespace
}  // namespace firesteel::kernels
