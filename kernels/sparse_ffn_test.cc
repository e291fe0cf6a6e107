#include "kernels/sparse_ffn.h"

#include "kernels/matmul.h"
#include "kernels/quantized.h"
#include "kernels/reference.h"
#include "kernels/test_util.h"

namespace firesteel::kernels {
namespace {

class SparseFfnTest : public SimdTest {
 protected:
  Random random_{3};
};
FIRESTEEL_FOR_EACH_SIMD_TARGET(SparseFfnTest);

constexpr double kDensities[] = {0.0, 0.08, 0.5, 1.0};

// The same values in both types.
struct Weights {
  Weights(Random& random, size_t num_rows, size_t num_cols, size_t misalign = 0)
      : f32(num_rows * num_cols, misalign),
        bf16(num_rows * num_cols, misalign),
        rows(num_rows),
        cols(num_cols) {
    random.Fill(bf16.span());
    for (size_t i = 0; i < rows * cols; ++i) f32[i] = ToF32(bf16[i]);
  }
  TypedView view(DType dtype) const {
    const void* data = dtype == DType::kF32 ? static_cast<const void*>(f32.data()) : bf16.data();
    return {data, dtype, rows, cols, cols};
  }

  Guarded<float> f32;
  Guarded<BF16> bf16;
  const size_t rows, cols;
};

TEST_P(SparseFfnTest, MaskedMatVecHasTheBitsOfMatMul) {
  for (const size_t depth : {1, 7, 32, 33, 256, 1100}) {
    for (const double density : kDensities) {
      const size_t rows = 61;
      Weights w(random_, rows, depth, depth % 2);
      Guarded<float> x(depth, 1);
      Guarded<BF16> rounded(depth, 1);
      random_.Fill(x.span());
      RoundToBF16(x.data(), depth, rounded.data());
      const auto active = random_.Subset(rows, density);
      const TypedView x32{x.data(), DType::kF32, 1, depth, depth};
      const TypedView x16{rounded.data(), DType::kBF16, 1, depth, depth};
      const std::pair<TypedView, DType> cases[] = {
          {x32, DType::kF32}, {x32, DType::kBF16}, {x16, DType::kBF16}};
      for (const auto& [xv, dtype] : cases) {
        std::vector<float> dense(rows);
        MatMul(xv, w.view(dtype), 0, rows, {dense.data(), 1, rows, rows});
        Guarded<float> out(active.size());
        MaskedMatVec(xv, w.view(dtype), active.data(), 0, active.size(), out.data());
        std::vector<float> expected;
        for (const uint32_t row : active) expected.push_back(dense[row]);
        ASSERT_TRUE(SameBits(out.span(), expected)) << depth << " at " << density;
        ASSERT_TRUE(out.GuardsIntact());
        const auto exact = reference::MaskedMatVec(xv, w.view(dtype), active);
        const double tolerance = SumTolerance(MaxAbs(x.span()), MaxAbs(w.f32.span()), depth);
        EXPECT_LE(WorstError(out.span(), exact, [&](size_t) { return tolerance; }), 1.0);

        Guarded<float> cut(active.size());
        const size_t at = active.size() / 3;
        MaskedMatVec(xv, w.view(dtype), active.data(), at, active.size(), cut.data());
        for (size_t j = 0; j < at; ++j) ASSERT_TRUE(std::isnan(cut[j]));
        MaskedMatVec(xv, w.view(dtype), active.data(), 0, at, cut.data());
        ASSERT_TRUE(SameBits(cut.span(), out.span()));
      }
    }
  }
}

TEST_P(SparseFfnTest, SparseVecMatMatchesReference) {
  for (const size_t cols : Lengths()) {
    for (const double density : kDensities) {
      const size_t rows = 150;
      Weights w(random_, rows, cols, cols % 3);
      const auto active = random_.Subset(rows, density);
      Guarded<float> coefficients(active.size(), 1);
      random_.Fill(coefficients.span());
      const auto exact = reference::SparseVecMat(coefficients.span(), active, w.view(DType::kF32));
      const double tolerance =
          SumTolerance(MaxAbs(coefficients.span()), MaxAbs(w.f32.span()), active.size()) + kTiny;
      std::vector<float> of_f32;
      for (const DType dtype : {DType::kF32, DType::kBF16}) {
        Guarded<float> y(cols, cols % 2);
        std::fill(y.data(), y.data() + cols, 0.0f);
        AddSparseVecMat(coefficients.data(), active.data(), active.size(), w.view(dtype), y.data());
        ASSERT_LE(WorstError(y.span(), exact, [&](size_t) { return tolerance; }), 1.0) << cols;
        ASSERT_TRUE(y.GuardsIntact());
        if (of_f32.empty()) of_f32.assign(y.span().begin(), y.span().end());
        ASSERT_TRUE(SameBits(y.span(), of_f32)) << "bf16 weights are promoted exactly";
        for (const bool add : {false, true}) {  // to what stands there, which is added last
          std::vector<float> expected = of_f32;
          for (size_t c = 0; c < cols; ++c) {
            y[c] = static_cast<float>(c) - 3.5f;
            if (add) expected[c] += y[c];
          }
          SumSparseColumns(coefficients.data(), active.data(), active.size(), w.view(dtype), add,
                           y.data());
          ASSERT_TRUE(SameBits(y.span(), expected)) << cols << ", " << add;
          ASSERT_TRUE(y.GuardsIntact());
        }
      }
      if (active.size() >= 2 && cols >= 4) {
        const auto wrong = reference::SparseVecMat(coefficients.span().first(active.size() - 1),
                                                   std::span(active).first(active.size() - 1),
                                                   w.view(DType::kF32));
        EXPECT_GT(WorstError(of_f32, wrong, [&](size_t) { return tolerance; }), 1.0);
      }
    }
  }
}

// The same sums from rounded weights: what is added is what the bytes stand for.
TEST_P(SparseFfnTest, QuantizedSparseVecMatMatchesReference) {
  for (const size_t cols : {1, 63, 64, 128, 130, 300, 512}) {
    for (const DType dtype : {DType::kI8, DType::kI4}) {
      const size_t rows = 70;
      const size_t stride = (cols + 127) / 128 * 128;
      Guarded<uint8_t> bytes(BytesOf(dtype, rows * stride));
      std::vector<float> row_scales(rows);
      std::vector<BF16> block_scales(rows * stride / kI4Block);
      for (size_t r = 0; r < rows; ++r) {
        const auto values = random_.Floats(cols);
        if (dtype == DType::kI8) {
          row_scales[r] = QuantizeWeightsI8(values.data(), cols,
                                            reinterpret_cast<int8_t*>(bytes.data()) + r * stride);
        } else {
          QuantizeWeightsI4(values.data(), cols, bytes.data() + r * stride / 2,
                            &block_scales[r * stride / kI4Block]);
        }
      }
      const TypedView w{bytes.data(),       dtype, rows, cols, stride, row_scales.data(),
                        block_scales.data()};
      const auto active = random_.Subset(rows, 0.4);
      const auto coefficients = random_.Floats(active.size());
      const auto exact = reference::SparseVecMat(coefficients, active, w);
      Guarded<float> y(cols);
      std::fill(y.data(), y.data() + cols, 0.0f);
      AddSparseVecMat(coefficients.data(), active.data(), active.size(), w, y.data());
      const double tolerance = 2 * SumTolerance(MaxAbs(coefficients), 4.0, active.size()) + kTiny;
      EXPECT_LE(WorstError(y.span(), exact, [&](size_t) { return tolerance; }), 1.0) << cols;
      EXPECT_GT(
          WorstError(y.span(), std::vector<double>(cols, 0.0), [&](size_t) { return tolerance; }),
          1.0);
      EXPECT_TRUE(y.GuardsIntact());
      std::vector<float> by_columns(cols);
      SumSparseColumns(coefficients.data(), active.data(), active.size(), w, false,
                       by_columns.data());
      EXPECT_TRUE(SameBits(y.span(), by_columns)) << cols;
    }
  }
}

TEST_P(SparseFfnTest, CutsOfTheListDoNotChangeBits) {
  const size_t rows = 90, cols = 101;
  Weights w(random_, rows, cols);
  const auto active = random_.Subset(rows, 0.4);
  const auto coefficients = random_.Floats(active.size());
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    std::vector<float> whole(cols);
    AddSparseVecMat(coefficients.data(), active.data(), active.size(), w.view(dtype), whole.data());
    for (size_t at = 0; at <= active.size(); ++at) {
      std::vector<float> cut(cols);
      AddSparseVecMat(coefficients.data(), active.data(), at, w.view(dtype), cut.data());
      AddSparseVecMat(&coefficients[0] + at, active.data() + at, active.size() - at, w.view(dtype),
                      cut.data());
      ASSERT_TRUE(SameBits(cut, whole)) << at;
    }
  }
}

// At full density both sparse products are the dense ones.
TEST_P(SparseFfnTest, FullDensityIsDense) {
  const size_t neurons = 40, features = 50;
  Weights w(random_, neurons, features);
  std::vector<uint32_t> all(neurons);
  for (uint32_t i = 0; i < neurons; ++i) all[i] = i;
  const auto h = random_.Floats(neurons);
  std::vector<float> y(features);
  AddSparseVecMat(h.data(), all.data(), neurons, w.view(DType::kBF16), y.data());

  Guarded<float> transposed(features * neurons);
  for (size_t f = 0; f < neurons; ++f) {
    for (size_t c = 0; c < features; ++c) transposed[c * neurons + f] = w.f32[f * features + c];
  }
  std::vector<float> dense(features);
  MatMul({h.data(), DType::kF32, 1, neurons, neurons},
         {transposed.data(), DType::kF32, features, neurons, neurons}, 0, features,
         {dense.data(), 1, features, features});
  const double tolerance = 2 * SumTolerance(MaxAbs(h), MaxAbs(w.f32.span()), neurons);
  for (size_t c = 0; c < features; ++c) EXPECT_NEAR(y[c], dense[c], tolerance);
}

TEST_P(SparseFfnTest, NoActiveNeuronAddsNothing) {
  Weights w(random_, 4, 37);
  std::vector<float> y(37, 3.0f);
  AddSparseVecMat(nullptr, nullptr, 0, w.view(DType::kBF16), y.data());
  for (const float v : y) EXPECT_EQ(v, 3.0f);
}

TEST_P(SparseFfnTest, ValuesThatAreNotFinitePassThrough) {
  Weights w(random_, 12, 5);
  std::vector<uint32_t> active = {1, 2, 3, 4, 5, 6, 7, 8, 9};
  std::vector<float> coefficients(9, 1.0f), y(5);
  w.bf16[4 * 5 + 2] = ToBF16(kNaN);
  AddSparseVecMat(coefficients.data(), active.data(), 9, w.view(DType::kBF16), y.data());
  for (size_t c = 0; c < 5; ++c) EXPECT_EQ(std::isnan(y[c]), c == 2);
}

}  // namespace
}  // namespace firesteel::kernels
