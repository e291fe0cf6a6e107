#include "kernels/amx.h"

#include <algorithm>

#include "kernels/integer_rows.h"
#include "kernels/quantized_test_util.h"

namespace firesteel::kernels {
namespace {

constexpr size_t RoundUp(size_t n, size_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

class AmxTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!AmxAvailable()) GTEST_SKIP() << "no AMX here";
  }
  Random random_{21};
};

// Random weights of 8 bits.
struct ByteWeights {
  ByteWeights(Random& random, size_t num_rows, size_t num_cols, size_t row_stride)
      : rows(num_rows), cols(num_cols), stride(row_stride), bytes(rows * stride), scales(rows) {
    for (size_t r = 0; r < rows; ++r) {
      int8_t* const row = bytes.data() + r * stride;
      scales[r] = QuantizeWeightsI8(random.Floats(cols).data(), cols, row);
      std::fill(row + RoundUp(cols, kAlignment), row + stride, int8_t{99});
    }
  }
  TypedView view() const {
    return {bytes.data(), DType::kI8, rows, cols, stride, scales.data(), nullptr};
  }

  const size_t rows, cols, stride;
  Guarded<int8_t> bytes;
  std::vector<float> scales;
};

struct Columns {
  Columns(size_t columns, size_t words)
      : memory(TileColumns::Words(columns, words)),
        tiles{memory.data(), TileColumns::Depth(words)} {}
  Guarded<int32_t> memory;
  TileColumns tiles;
};

TEST_F(AmxTest, IntegersHaveTheBitsOfTheVectorKernel) {
  for (const size_t cols : {1, 63, 64, 130, 1024, 2304}) {
    for (const size_t tokens : {1, 2, 7, 8, 9, 16, 17, 23, 24, 40, 304}) {
      const bool outlying = random_.Below(3) > 0;
      const size_t rows = 1 + random_.Below(130);
      const ByteWeights weights(random_, rows, cols, RoundUp(cols, kAlignment));
      const TypedView w = weights.view();

      GuardedRows rounded(tokens, cols);
      const QuantizedRows& x = rounded.view();
      Columns columns(tokens, x.plane / 4), high_columns(tokens, x.plane / 4);
      columns.tiles.high = high_columns.tiles.words;
      Guarded<uint64_t> high_blocks(tokens * x.HighWords());
      columns.tiles.high_blocks = high_blocks.data();
      std::ranges::fill(high_columns.memory.span(), 0);
      std::ranges::fill(high_blocks.span(), 0);
      for (const bool earlier_step : {true, false}) {
        for (size_t t = 0; t < tokens; ++t) {
          // Some groups of tokens have no outliers at all, but may have had some.
          const bool outliers = outlying && (earlier_step || t % 64 < 32);
          const auto values = outliers ? FloatsWithOutliers(random_, cols) : random_.Floats(cols);
          QuantizeActivations(values.data(), x, t);
          SetTileColumn(x, t, columns.tiles);
        }
      }
      std::vector<float> expected(tokens * rows);
      QuantizedMatMul(x, w, 0, rows, {expected.data(), tokens, rows, rows});
      Guarded<float> y(tokens * rows);
      const MatView out{y.data(), tokens, rows, rows};
      const size_t cut = rows / 3;
      AmxMatMul(x, columns.tiles, w, cut, rows, out);
      for (size_t t = 0; t < tokens; ++t) {
        for (size_t r = 0; r < cut; ++r) ASSERT_TRUE(std::isnan(y[t * rows + r]));
      }
      AmxMatMul(x, columns.tiles, w, 0, cut, out);
      ASSERT_TRUE(SameBits(y.span(), expected)) << cols << ", " << tokens << ", " << rows;
      ASSERT_TRUE(y.GuardsIntact() && columns.memory.GuardsIntact() &&
                  high_columns.memory.GuardsIntact() && high_blocks.GuardsIntact());
    }
  }
}

// Coefficients of some rows, spread among zeros, times all rows.
TEST_F(AmxTest, SumsOfAllRowsHaveTheBitsOfThoseOfListedOnes) {
  for (const size_t cols : {64, 192, 320}) {
    for (const size_t tokens : {1, 31, 32, 70}) {
      const size_t rows = 1 + random_.Below(200);
      const ByteWeights weights(random_, rows, cols, cols + 64);
      const TypedView w = weights.view();
      const size_t padded = RoundUp(tokens, kAmxSumRows);
      const size_t depth = RoundUp(rows, kAlignment);
      Guarded<int8_t> coefficients(padded * depth), scratch(AmxSumBytes(rows, cols));
      Guarded<float> scales(tokens), y(tokens * cols);
      const ByteRows c{coefficients.data(), scales.data(), tokens, depth};
      std::vector<float> expected(tokens * cols);
      const uint32_t first_row = 1000;  // of a matrix of which these rows are a part
      for (size_t t = 0; t < tokens; ++t) {
        const auto active = random_.Subset(rows, 0.3);
        std::vector<float> values = random_.Floats(active.size());
        GuardedRows rounded(1, active.size());
        QuantizeCoefficients(values.data(), active.data(), w, rounded.view());
        std::vector<uint32_t> places = active;
        for (uint32_t& place : places) place += first_row;
        SpreadCoefficients(rounded.view(), places.data(), first_row, c, t);
        RowFetcher fetcher;
        float* const sums = &expected[t * cols];
        SumIntegerColumns(rounded.view(), active.data(), w, 0, cols, false, fetcher, sums);
        if (cols > 64) {
          SumIntegerColumns(rounded.view(), active.data(), w, 64, cols, true, fetcher, sums);
        }
      }
      const MatView out{y.data(), tokens, cols, cols};
      AmxSumColumns(c, w, 64, cols, false, scratch.data(), out);
      for (size_t t = 0; t < tokens; ++t) ASSERT_TRUE(std::isnan(y[t * cols + 63]));
      AmxSumColumns(c, w, 0, 64, false, scratch.data(), out);
      AmxSumColumns(c, w, 64, cols, true, scratch.data(), out);
      ASSERT_TRUE(SameBits(y.span(), expected)) << cols << ", " << tokens << ", " << rows;
      ASSERT_TRUE(coefficients.GuardsIntact() && scratch.GuardsIntact() && y.GuardsIntact() &&
                  scales.GuardsIntact());
    }
  }
}

// bf16 values in rows that are padded with zeros, and tokens of the same depth in tiles.
struct FloatProduct {
  FloatProduct(Random& random, size_t num_tokens, size_t num_rows, size_t num_cols)
      : tokens(num_tokens),
        rows(num_rows),
        cols(num_cols),
        stride(RoundUp(num_cols, kAlignment / sizeof(BF16))),
        x(num_tokens * stride),
        weights(num_rows * stride),
        columns(num_tokens, (num_cols + 1) / 2) {
    Fill(random, tokens, x);
    Fill(random, rows, weights);
    for (size_t t = 0; t < tokens; ++t) SetTileColumn(&x[t * stride], cols, t, columns.tiles);
  }
  void Fill(Random& random, size_t count, Guarded<BF16>& out) const {
    std::fill(out.data(), out.data() + count * stride, BF16{0});
    for (size_t i = 0; i < count; ++i) random.Fill(std::span(out.data() + i * stride, cols));
  }
  TypedView w() const { return {weights.data(), DType::kBF16, rows, cols, stride}; }

  const size_t tokens, rows, cols, stride;
  Guarded<BF16> x, weights;
  Columns columns;
};

TEST_F(AmxTest, FloatsAreNearTheExactSumsAndTouchNothingElse) {
  for (const size_t cols : {1, 2, 31, 32, 33, 130, 1024, 2304}) {
    for (const size_t tokens : {1, 15, 16, 17, 32, 33, 100}) {
      FloatProduct p(random_, tokens, 1 + random_.Below(100), cols);
      Guarded<float> y(tokens * p.rows);
      const size_t row_begin = p.rows / 3, row_end = p.rows - p.rows / 5;
      const size_t begin = tokens / 4, end = tokens - tokens / 5;
      AmxMatMul(p.columns.tiles, begin, end, p.w(), row_begin, row_end,
                {y.data(), tokens, p.rows, p.rows});
      for (size_t t = 0; t < tokens; ++t) {
        for (size_t n = 0; n < p.rows; ++n) {
          const float value = y[t * p.rows + n];
          if (t < begin || t >= end || n < row_begin || n >= row_end) {
            ASSERT_TRUE(std::isnan(value)) << t << ", " << n;
            continue;
          }
          double sum = 0, magnitude = 0;
          for (size_t k = 0; k < cols; ++k) {
            const double product =
                double{ToF32(p.x[t * p.stride + k])} * ToF32(p.weights[n * p.stride + k]);
            sum += product;
            magnitude += std::abs(product);
          }
          // Products are exact in f32; each addition rounds by at most half an ulp of a partial
          // sum, which the magnitude bounds.
          const double tolerance = static_cast<double>(cols + 1) * 0x1p-24 * magnitude + 1e-30;
          ASSERT_NEAR(value, sum, tolerance) << t << ", " << n << " of " << cols;
        }
      }
      ASSERT_TRUE(y.GuardsIntact() && p.columns.memory.GuardsIntact());
    }
  }
}

// A token's bits may not tell with which others, nor with which rows, it was multiplied, nor
// whether its column goes on for another matrix.
TEST_F(AmxTest, BitsOfFloatsDependOnTheTokenAndTheRowAlone) {
  for (const size_t cols : {100, 1024, 2304}) {
    const size_t tokens = 150, rows = 97;
    const FloatProduct p(random_, tokens, rows, cols);
    std::vector<float> all(tokens * rows);
    AmxMatMul(p.columns.tiles, 0, tokens, p.w(), 0, rows, {all.data(), tokens, rows, rows});
    Columns longer(tokens, cols);
    std::vector<BF16> x(2 * cols);
    const size_t places[] = {77, 0, 16, 31, 149};
    for (const size_t token : {0, 3, 64, 149}) {
      std::copy_n(&p.x[token * p.stride], cols, x.data());
      random_.Fill(std::span(x.data() + p.stride, 2 * cols - p.stride));
      for (const size_t place : places) {
        SetTileColumn(x.data(), 2 * cols, place, longer.tiles);
        std::vector<float> y(tokens * rows);
        for (const auto& [begin, end] : {std::pair<size_t, size_t>{0, 5}, {5, 64}, {64, rows}}) {
          AmxMatMul(longer.tiles, place, place + 1, p.w(), begin, end,
                    {y.data(), tokens, rows, rows});
        }
        ASSERT_TRUE(
            SameBits(std::span(&y[place * rows], rows), std::span(&all[token * rows], rows)))
            << token << " at " << place << " of " << cols;
      }
    }
  }
}

TEST(AmxTargetTest, FollowsTheChosenTarget) {
  const std::string best = AvailableSimdTargets().front();
  ASSERT_TRUE(ForceSimdTarget(AvailableSimdTargets().back()));
  EXPECT_FALSE(AmxAvailable()) << "as if on a CPU without it";
  ASSERT_TRUE(ForceSimdTarget(best));
}

// bf16 coefficients of all rows on tiles, and of those that are not zero on vectors.
TEST_F(AmxTest, SumsOfBF16AreTheSameOnTilesAndOnVectors) {
  for (const size_t cols : {32, 160, 320}) {
    for (const size_t tokens : {1, 16, 17, 32, 45, 70}) {
      const size_t rows = 1 + random_.Below(1000), first_row = 1000;
      const size_t stride = RoundUp(cols, 32) + 32, depth = RoundUp(rows, 32);
      Guarded<BF16> weights((first_row + rows) * stride), coefficients(tokens * depth);
      for (BF16& v : weights.span()) v = ToBF16(random_.Floats(1)[0]);
      const TypedView all{weights.data(), DType::kBF16, first_row + rows, cols, stride};
      TypedView w = all;
      w.data = all.RowBytes(first_row);
      w.rows = rows;
      Guarded<int8_t> scratch(kAmxPairBytes);
      Guarded<float> y(tokens * cols);
      std::vector<float> listed(tokens * cols);
      std::vector<double> exact(tokens * cols), magnitude(tokens * cols);
      const bool add = random_.Below(2) == 1;
      RowFetcher fetcher;
      for (size_t i = 0; i < y.size(); ++i) {
        y[i] = listed[i] = random_.Floats(1)[0];
        exact[i] = add ? static_cast<double>(y[i]) : 0.0;
      }
      std::ranges::fill(coefficients.span(), BF16{});
      for (size_t t = 0; t < tokens; ++t) {
        std::vector<float> c;
        std::vector<uint32_t> active;
        for (size_t j = 0; j < rows; ++j) {
          if (random_.Below(10) > 0) continue;
          const BF16 v = ToBF16(random_.Floats(1, 3.0f)[0]);
          coefficients[t * depth + j] = v;
          c.push_back(ToF32(v));
          active.push_back(static_cast<uint32_t>(first_row + j));
          for (size_t i = 0; i < cols; ++i) {
            const double product =
                static_cast<double>(c.back()) * static_cast<double>(ToF32(w.Row<BF16>(j)[i]));
            exact[t * cols + i] += product;
            magnitude[t * cols + i] += std::abs(product);
          }
        }
        SumInTileOrder(c.data(), active.data(), c.size(), all, first_row, 0, cols, add, fetcher,
                       &listed[t * cols]);
      }
      const TypedView c{coefficients.data(), DType::kBF16, tokens, rows, depth};
      const MatView out{y.data(), tokens, cols, cols};
      const size_t cut = cols / 64 * 32;
      AmxSumColumns(c, w, cut, cols, add, scratch.data(), out);
      AmxSumColumns(c, w, 0, cut, add, scratch.data(), out);
      ASSERT_TRUE(SameBits(y.span(), listed)) << cols << ", " << tokens << ", " << rows;
      for (size_t i = 0; i < y.size(); ++i) {
        ASSERT_NEAR(static_cast<double>(y[i]), exact[i], 64 * kEps * (1 + magnitude[i]));
      }
      ASSERT_TRUE(y.GuardsIntact() && scratch.GuardsIntact() && coefficients.GuardsIntact());
    }
  }
}

}  // namespace
}  // namespace firesteel::kernels
