#include "kernels/quantized.h"

#include "kernels/reference.h"
#include "kernels/test_util.h"

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

// Owns activations as integers, each part between guards.
struct Activations {
  Activations(size_t num_rows, size_t num_cols)
      : rows(num_rows),
        cols(num_cols),
        plane(RoundUp(num_cols, kQuantizedPadding)),
        planes(2 * rows * plane),
        offsets(rows * plane / 4),
        scales(rows),
        high_sums(rows),
        low_sums(rows) {}
  QuantizedRows view() {
    return {planes.data(),   offsets.data(), scales.data(), high_sums.data(),
            low_sums.data(), rows,           cols,          plane};
  }
  // The value that row and column stand for; the upper plane alone where the weights have 4 bits.
  double At(size_t row, size_t col, DType weights) const {
    const double fine = weights == DType::kI8 ? planes[(2 * row + 1) * plane + col] : 0.0;
    return static_cast<double>(scales[row]) * (256.0 * planes[2 * row * plane + col] + fine);
  }
  bool GuardsIntact() {
    return planes.GuardsIntact() && offsets.GuardsIntact() && scales.GuardsIntact() &&
           high_sums.GuardsIntact() && low_sums.GuardsIntact();
  }

  const size_t rows, cols, plane;
  Guarded<int8_t> planes;
  Guarded<int32_t> offsets;
  Guarded<float> scales;
  Guarded<int32_t> high_sums, low_sums;
};

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

TEST_P(QuantizedTest, ActivationsRoundToSixteenBits) {
  for (const size_t cols : Lengths()) {
    if (cols == 0) continue;
    Guarded<float> x(cols, 1);
    random_.Fill(x.span());
    Activations q(3, cols);
    QuantizeActivations(x.data(), q.view(), 1);
    const double step = MaxAbs(x.span()) / (127 * 256);
    int64_t high_sum = 0, low_sum = 0;
    const QuantizedRows row = q.view().From(1, 1);
    for (size_t i = 0; i < q.plane; ++i) {
      const int high = row.High(0)[i], low = row.Low(0)[i];
      high_sum += high;
      low_sum += low;
      ASSERT_LE(std::abs(high), 127);
      const double value = i < cols ? static_cast<double>(x[i]) : 0.0;
      ASSERT_NEAR(step * (256 * high + low), value, step * 0.51) << cols << " at " << i;
      if (i % 4 == 3) {
        const int8_t* four = row.High(0) + i - 3;
        ASSERT_EQ(row.NibbleOffsets(0)[i / 4], -8 * (four[0] + four[1] + four[2] + four[3]));
      }
    }
    ASSERT_EQ(q.high_sums[1], high_sum);
    ASSERT_EQ(q.low_sums[1], low_sum);
    ASSERT_TRUE(q.GuardsIntact());
    ASSERT_EQ(q.view().Low(0)[q.plane - 1], -1) << "the row before is untouched";
    ASSERT_EQ(q.view().High(2)[0], -1) << "the row behind is untouched";
  }
}

TEST_P(QuantizedTest, ZerosStayZeros) {
  const std::vector<float> zeros(100, 0.0f);
  Activations q(1, 100);
  QuantizeActivations(zeros.data(), q.view(), 0);
  EXPECT_EQ(q.scales[0], 0.0f);
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
    Activations q(1, 70);
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
        Activations q(tokens, cols);
        for (size_t t = 0; t < tokens; ++t) {
          QuantizeActivations(random_.Floats(cols).data(), q.view(), t);
        }
        std::vector<double> exact;
        double largest = 0;
        for (size_t t = 0; t < tokens; ++t) {
          for (size_t r = 0; r < rows; ++r) {
            double sum = 0;
            for (size_t c = 0; c < cols; ++c) {
              const double product = q.At(t, c, dtype) * reference::At(w.view(), r, c);
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
        exact[0] += 2 * q.At(0, 0, dtype) * reference::At(w.view(), 0, 0);
        if (std::abs(q.At(0, 0, dtype) * reference::At(w.view(), 0, 0)) > tolerance) {
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
    Activations q(tokens, cols);
    for (size_t t = 0; t < tokens; ++t) {
      QuantizeActivations(random_.Floats(cols).data(), q.view(), t);
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
      Activations q(2, cols);
      for (size_t t = 0; t < 2; ++t) {
        QuantizeActivations(random_.Floats(cols).data(), q.view(), t);
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
  const std::vector<float> values = random.Floats(1000);
  Weights w(random, DType::kI8, 9, 1000);
  for (const std::string& target : AvailableSimdTargets()) {
    ASSERT_TRUE(ForceSimdTarget(target));
    Activations q(1, 1000);
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
