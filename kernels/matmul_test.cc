#include "kernels/matmul.h"

#include "kernels/reference.h"
#include "kernels/test_util.h"

namespace firesteel::kernels {
namespace {

class MatMulTest : public SimdTest {
 protected:
  Random random_{2};
};
FIRESTEEL_FOR_EACH_SIMD_TARGET(MatMulTest);

// A random matrix whose rows are `stride` apart, with NaN in the padding, and a copy in each dtype.
class Matrix {
 public:
  Matrix(Random& random, DType dtype, size_t rows, size_t cols, size_t stride, size_t misalign = 0)
      : f32_(dtype == DType::kF32 ? rows * stride : 0, misalign),
        bf16_(dtype == DType::kBF16 ? rows * stride : 0, misalign),
        view_{dtype == DType::kF32 ? static_cast<const void*>(f32_.data()) : bf16_.data(), dtype,
              rows, cols, stride} {
    for (size_t r = 0; r < rows; ++r) {
      for (size_t c = 0; c < cols; ++c) {
        const float v = random.Normal();
        if (dtype == DType::kF32) {
          f32_[r * stride + c] = v;
        } else {
          bf16_[r * stride + c] = ToBF16(v);
        }
      }
    }
  }

  const TypedView& view() const { return view_; }
  TypedView Rows(size_t begin, size_t count) const {
    TypedView part = view_;
    part.data = static_cast<const char*>(view_.data) + BytesOf(view_.dtype, begin * view_.stride);
    part.rows = count;
    return part;
  }
  Guarded<float>& f32() { return f32_; }

 private:
  Guarded<float> f32_;
  Guarded<BF16> bf16_;
  TypedView view_;
};

struct Types {
  DType x;
  DType w;
};
constexpr Types kTypes[] = {
    {DType::kF32, DType::kF32}, {DType::kF32, DType::kBF16}, {DType::kBF16, DType::kBF16}};

double Tolerance(const TypedView& x, const TypedView& w) {
  double a = 0.0, b = 0.0;
  for (size_t k = 0; k < x.cols; ++k) {
    for (size_t t = 0; t < x.rows; ++t) a = std::max(a, std::abs(reference::At(x, t, k)));
    for (size_t n = 0; n < w.rows; ++n) b = std::max(b, std::abs(reference::At(w, n, k)));
  }
  return SumTolerance(a, b, x.cols) + kTiny;
}

TEST_P(MatMulTest, MatchesReference) {
  static constexpr size_t kTokens[] = {1, 2, 3, 4, 5, 7, 8, 9, 13, 64, 65, 70};
  static constexpr size_t kDepths[] = {0,  1,  2,  7,  8,   9,   15,  16,  17,  31,
                                       32, 33, 64, 65, 256, 511, 512, 513, 1100};
  static constexpr size_t kRows[] = {1, 2, 3, 4, 5, 11, 12, 13, 26};
  size_t next = 0;
  for (const Types types : kTypes) {
    for (const size_t tokens : kTokens) {
      for (const size_t depth : kDepths) {
        const size_t rows = kRows[next++ % std::size(kRows)];
        const size_t misalign = next % 3;
        Matrix x(random_, types.x, tokens, depth, depth + next % 5, misalign);
        Matrix w(random_, types.w, rows, depth, depth + next % 7, misalign);
        const size_t stride = rows + next % 2;
        Guarded<float> y(tokens * stride);
        MatMul(x.view(), w.view(), 0, rows, {y.data(), tokens, rows, stride});
        const auto expected = reference::MatMul(x.view(), w.view());
        const double tolerance = Tolerance(x.view(), w.view());
        for (size_t t = 0; t < tokens; ++t) {
          const std::span<const double> row(&expected[t * rows], rows);
          ASSERT_LE(WorstError(std::span<const float>(&y[t * stride], rows), row,
                               [&](size_t) { return tolerance; }),
                    1.0)
              << tokens << " x " << depth << " x " << rows;
          if (stride > rows) {
            ASSERT_TRUE(std::isnan(y[t * stride + rows])) << "padding written";
          }
        }
        ASSERT_TRUE(y.GuardsIntact());
      }
    }
  }
}

TEST_P(MatMulTest, ToleranceSeesAMissingElement) {
  for (const Types types : kTypes) {
    const size_t depth = 2304, rows = 7;
    Matrix x(random_, types.x, 3, depth, depth), w(random_, types.w, rows, depth, depth);
    std::vector<float> y(3 * rows);
    MatMul(x.view(), w.view(), 0, rows, {y.data(), 3, rows, rows});
    TypedView shorter = x.view();
    shorter.cols = depth - 1;
    const auto wrong = reference::MatMul(shorter, w.view());
    const double tolerance = Tolerance(x.view(), w.view());
    EXPECT_LE(
        WorstError(y, reference::MatMul(x.view(), w.view()), [&](size_t) { return tolerance; }),
        1.0);
    EXPECT_GT(WorstError(y, wrong, [&](size_t) { return tolerance; }), 1.0);
  }
}

// The promise that batching rests on.
TEST_P(MatMulTest, TokensDoNotChangeEachOthersBits) {
  for (const Types types : kTypes) {
    for (const size_t depth : {5, 33, 256, 1051}) {
      const size_t rows = 27, most = 70;
      Matrix x(random_, types.x, most, depth, depth + 3), w(random_, types.w, rows, depth, depth);
      std::vector<float> alone(most * rows), together(most * rows);
      for (size_t t = 0; t < most; ++t) {
        MatMul(x.Rows(t, 1), w.view(), 0, rows, {&alone[t * rows], 1, rows, rows});
      }
      for (size_t tokens = 1; tokens <= most; ++tokens) {
        std::fill(together.begin(), together.end(), kNaN);
        MatMul(x.Rows(0, tokens), w.view(), 0, rows, {together.data(), tokens, rows, rows});
        ASSERT_TRUE(SameBits(std::span(together).first(tokens * rows),
                             std::span(alone).first(tokens * rows)))
            << tokens << " tokens of depth " << depth;
      }
    }
  }
}

TEST_P(MatMulTest, RowRangesDoNotChangeBits) {
  for (const Types types : kTypes) {
    for (const size_t tokens : {1, 6, 8, 37}) {
      const size_t rows = 31, depth = 600;
      Matrix x(random_, types.x, tokens, depth, depth), w(random_, types.w, rows, depth, depth);
      std::vector<float> whole(tokens * rows), cut(tokens * rows);
      MatMul(x.view(), w.view(), 0, rows, {whole.data(), tokens, rows, rows});
      for (size_t at = 0; at <= rows; ++at) {
        std::fill(cut.begin(), cut.end(), kNaN);
        MatMul(x.view(), w.view(), 0, at, {cut.data(), tokens, rows, rows});
        for (size_t t = 0; t < tokens; ++t) {
          for (size_t n = at; n < rows; ++n) ASSERT_TRUE(std::isnan(cut[t * rows + n]));
        }
        MatMul(x.view(), w.view(), at, rows, {cut.data(), tokens, rows, rows});
        ASSERT_TRUE(SameBits(cut, whole)) << "cut at " << at;
      }
    }
  }
}

TEST_P(MatMulTest, AlignmentAndStrideDoNotChangeBits) {
  for (const Types types : kTypes) {
    const size_t tokens = 9, rows = 13, depth = 77;
    std::vector<float> first;
    for (const size_t shift : {0, 1, 5}) {
      Random same(7);
      Matrix x(same, types.x, tokens, depth, depth + shift, shift);
      Matrix w(same, types.w, rows, depth, depth + 2 * shift, shift);
      std::vector<float> y(tokens * rows);
      MatMul(x.view(), w.view(), 0, rows, {y.data(), tokens, rows, rows});
      if (first.empty()) first = y;
      EXPECT_TRUE(SameBits(y, first)) << shift;
    }
  }
}

TEST_P(MatMulTest, ValuesThatAreNotFiniteStayWithTheirToken) {
  const size_t tokens = 11, rows = 9, depth = 40;
  Matrix x(random_, DType::kF32, tokens, depth, depth),
      w(random_, DType::kBF16, rows, depth, depth);
  std::vector<float> clean(tokens * rows), y(tokens * rows);
  MatMul(x.view(), w.view(), 0, rows, {clean.data(), tokens, rows, rows});
  x.f32()[3 * depth + 39] = kNaN;
  x.f32()[5 * depth + 1] = kInf;
  MatMul(x.view(), w.view(), 0, rows, {y.data(), tokens, rows, rows});
  for (size_t t = 0; t < tokens; ++t) {
    for (size_t n = 0; n < rows; ++n) {
      const float v = y[t * rows + n];
      if (t == 3) {
        EXPECT_TRUE(std::isnan(v));
      } else if (t == 5) {
        EXPECT_FALSE(std::isfinite(v));
      } else {
        EXPECT_EQ(v, clean[t * rows + n]);
      }
    }
  }
}

TEST_P(MatMulTest, EmptyRangesWriteNothing) {
  Matrix x(random_, DType::kF32, 2, 8, 8), w(random_, DType::kF32, 4, 8, 8);
  Guarded<float> y(8);
  MatMul(x.view(), w.view(), 2, 2, {y.data(), 2, 4, 4});
  MatMul(x.Rows(0, 0), w.view(), 0, 4, {y.data(), 0, 4, 4});
  for (const float v : y.span()) EXPECT_TRUE(std::isnan(v));
}

// All exponents with mantissas around every rounding case, against the scalar definition in
// tensor.h.
TEST_P(MatMulTest, RoundToBF16HasTheScalarsBits) {
  std::vector<float> x;
  for (uint32_t high = 0; high < 0x10000; high += 7) {
    for (const uint32_t low : {0x0000u, 0x0001u, 0x7FFFu, 0x8000u, 0x8001u, 0xFFFFu}) {
      x.push_back(std::bit_cast<float>(high << 16 | low));
    }
  }
  for (const float special : {kNaN, -kNaN, kInf, -kInf, 3.4e38f, -0.0f}) x.push_back(special);
  x.push_back(std::bit_cast<float>(0x7F800001u));  // a NaN whose upper half alone would be infinity
  Guarded<BF16> out(x.size(), 1);
  RoundToBF16(x.data(), x.size(), out.data());
  for (size_t i = 0; i < x.size(); ++i) {
    ASSERT_EQ(out[i].bits, ToBF16(x[i]).bits) << std::hex << std::bit_cast<uint32_t>(x[i]);
  }
  for (const size_t n : Lengths()) {
    Guarded<BF16> part(n, 3);
    RoundToBF16(x.data() + 1, n, part.data());
    for (size_t i = 0; i < n; ++i) ASSERT_EQ(part[i].bits, ToBF16(x[i + 1]).bits);
    EXPECT_TRUE(part.GuardsIntact()) << n;
  }
}

}  // namespace
}  // namespace firesteel::kernels
