#include "kernels/amx.h"

#include "kernels/test_util.h"

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

struct Columns {
  Columns(size_t tokens, size_t words)
      : memory(TileColumns::Words(tokens, words)),
        tiles{memory.data(), (words + kTileWords - 1) / kTileWords} {}
  Guarded<int32_t> memory;
  TileColumns tiles;
};

TEST_F(AmxTest, IntegersHaveTheBitsOfTheVectorKernel) {
  for (const size_t cols : {1, 63, 64, 130, 1024, 2304}) {
    for (const size_t tokens : {1, 2, 7, 8, 9, 17, 23, 24, 40, 304}) {
      const size_t rows = 1 + random_.Below(130);
      const size_t stride = RoundUp(cols, kAlignment);
      Guarded<int8_t> bytes(rows * stride);
      std::vector<float> row_scales(rows);
      for (size_t r = 0; r < rows; ++r) {
        row_scales[r] =
            QuantizeWeightsI8(random_.Floats(cols).data(), cols, bytes.data() + r * stride);
      }
      const TypedView w{bytes.data(), DType::kI8, rows, cols, stride, row_scales.data()};

      const size_t plane = RoundUp(cols, kQuantizedPadding);
      std::vector<int8_t> planes(2 * tokens * plane);
      std::vector<int32_t> offsets(tokens * plane / 4), high_sums(tokens), low_sums(tokens);
      std::vector<float> scales(tokens);
      const QuantizedRows x{planes.data(),   offsets.data(), scales.data(), high_sums.data(),
                            low_sums.data(), tokens,         cols,          plane};
      Columns columns(tokens, plane / 4);
      for (size_t t = 0; t < tokens; ++t) {
        QuantizeActivations(random_.Floats(cols).data(), x, t);
        SetTileColumns(x, t, tokens, columns.tiles);
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
      ASSERT_TRUE(y.GuardsIntact() && columns.memory.GuardsIntact());
    }
  }
}

TEST(AmxTargetTest, FollowsTheChosenTarget) {
  const std::string best = AvailableSimdTargets().front();
  ASSERT_TRUE(ForceSimdTarget(AvailableSimdTargets().back()));
  EXPECT_FALSE(AmxAvailable()) << "as if on a CPU without it";
  ASSERT_TRUE(ForceSimdTarget(best));
}

}  // namespace
}  // namespace firesteel::kernels
