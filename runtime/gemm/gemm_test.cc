#include "runtime/gemm/gemm.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "runtime/threading/worker_pool.h"

namespace firesteel::gemm {
namespace {

using kernels::ToBF16;
using kernels::ToF32;
using ::testing::HasSubstr;

template <typename T>
using SumOf = std::conditional_t<sizeof(T) == 1, int32_t, float>;

// A matrix that owns its memory, with some elements after each row that nobody may touch.
template <typename T>
struct Matrix {
  Matrix(size_t num_rows, size_t num_cols, size_t padding = 0)
      : rows(num_rows), cols(num_cols), stride(num_cols + padding), data(num_rows * stride) {}
  T& At(size_t row, size_t col) { return data[row * stride + col]; }
  const T& At(size_t row, size_t col) const { return data[row * stride + col]; }
  View<const T> Const() const { return {data.data(), rows, cols, stride}; }
  View<T> Mutable() { return {data.data(), rows, cols, stride}; }

  size_t rows, cols, stride;
  std::vector<T> data;
};

void Random(std::mt19937& engine, int8_t& value) {
  value = static_cast<int8_t>(std::uniform_int_distribution<int>(-128, 127)(engine));
}
void Random(std::mt19937& engine, kernels::BF16& value) {
  value = ToBF16(std::normal_distribution<float>()(engine));
}

template <typename T>
Matrix<T> RandomMatrix(size_t rows, size_t cols, size_t padding = 0, uint32_t seed = 1) {
  std::mt19937 engine(seed);
  Matrix<T> out(rows, cols, padding);
  for (T& v : out.data) Random(engine, v);
  return out;
}

template <typename T>
Matrix<T> Transposed(const Matrix<T>& m, size_t padding) {
  Matrix<T> out(m.cols, m.rows, padding);
  for (size_t r = 0; r < m.rows; ++r) {
    for (size_t c = 0; c < m.cols; ++c) out.At(c, r) = m.At(r, c);
  }
  return out;
}

absl::Status Multiply(Gemm& gemm, const View<const int8_t>& x, const View<const int8_t>& w,
                      WeightLayout layout, size_t begin, size_t end, const View<int32_t>& c) {
  return gemm.Int8(x, w, layout, begin, end, c);
}
absl::Status Multiply(Gemm& gemm, const View<const kernels::BF16>& x,
                      const View<const kernels::BF16>& w, WeightLayout layout, size_t begin,
                      size_t end, const View<float>& c) {
  return gemm.BF16(x, w, layout, begin, end, c);
}

std::unique_ptr<Gemm> NewGemm() {
  auto gemm = Gemm::Create();
  EXPECT_TRUE(gemm.ok()) << gemm.status();
  return gemm.ok() ? *std::move(gemm) : nullptr;
}

// x · wᵀ for all outputs, c dense.
template <typename T>
Matrix<SumOf<T>> Product(Gemm& gemm, const Matrix<T>& x, const Matrix<T>& w) {
  Matrix<SumOf<T>> c(x.rows, w.rows);
  const absl::Status status =
      Multiply(gemm, x.Const(), w.Const(), WeightLayout::kOutIn, 0, w.rows, c.Mutable());
  EXPECT_TRUE(status.ok()) << status;
  return c;
}

// The number of threads that the process has.
ptrdiff_t Threads() {
  return std::distance(std::filesystem::directory_iterator("/proc/self/task"),
                       std::filesystem::directory_iterator());
}

class GemmTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!Available()) GTEST_SKIP() << Description();
    gemm_ = NewGemm();
  }
  std::unique_ptr<Gemm> gemm_;
};

TEST(GemmAvailabilityTest, CreateAgreesWithAvailable) {
  const auto gemm = Gemm::Create();
  EXPECT_EQ(gemm.ok(), Available());
  if (Available()) {
    EXPECT_THAT(Description(), HasSubstr("amx"));
  } else {
    EXPECT_EQ(gemm.status().code(), absl::StatusCode::kUnavailable);
    EXPECT_THAT(Description(), HasSubstr("none"));
  }
}

struct Case {
  size_t tokens, outputs, inputs, begin, end;
};
// Around the tiles (16, 64), the blocks (64, 256 outputs; 2304 inputs) and the groups of 2 and 4.
constexpr Case kCases[] = {
    {1, 1, 1, 0, 1},         {1, 64, 64, 0, 64},        {2, 3, 5, 1, 3},
    {7, 65, 63, 0, 65},      {64, 256, 64, 0, 256},     {65, 257, 66, 0, 257},
    {63, 300, 127, 17, 299}, {130, 200, 1024, 64, 192}, {5, 100, 2305, 3, 90},
    {70, 33, 4610, 0, 33},   {3, 640, 100, 63, 577},    {1, 5, 7001, 4, 5},
    {16, 16, 2, 5, 5},
};

constexpr int32_t kUntouched = 0x7BADBEEF;  // a number of either type

template <typename T, class Check>
void ForEachCase(Gemm& gemm, const Check& check) {
  for (const Case& s : kCases) {
    for (const size_t padding : {0, 32, 7}) {
      const auto x = RandomMatrix<T>(s.tokens, s.inputs, padding, 1);
      const auto w = RandomMatrix<T>(s.outputs, s.inputs, padding, 2);
      const auto wt = Transposed(w, padding);
      for (const WeightLayout layout : {WeightLayout::kOutIn, WeightLayout::kInOut}) {
        SCOPED_TRACE(testing::Message()
                     << s.tokens << " tokens, " << s.outputs << " outputs, " << s.inputs
                     << " inputs, outputs " << s.begin << " to " << s.end << ", padding " << padding
                     << ", transposed " << (layout == WeightLayout::kInOut));
        Matrix<SumOf<T>> c(s.tokens, s.outputs, padding);
        for (auto& v : c.data) std::memcpy(&v, &kUntouched, sizeof(v));
        const auto& weights = layout == WeightLayout::kOutIn ? w : wt;
        ASSERT_TRUE(
            Multiply(gemm, x.Const(), weights.Const(), layout, s.begin, s.end, c.Mutable()).ok());
        for (size_t m = 0; m < c.rows; ++m) {
          for (size_t n = 0; n < c.stride; ++n) {
            if (n >= s.begin && n < s.end) {
              check(x, w, m, n, c.At(m, n));
            } else {
              ASSERT_EQ(std::memcmp(&c.At(m, n), &kUntouched, sizeof(kUntouched)), 0)
                  << "touched " << m << ", " << n;
            }
          }
        }
        if (testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

TEST_F(GemmTest, Int8IsExact) {
  ForEachCase<int8_t>(*gemm_, [](const auto& x, const auto& w, size_t m, size_t n, int32_t c) {
    int32_t sum = 0;
    for (size_t k = 0; k < x.cols; ++k) sum += int32_t{x.At(m, k)} * w.At(n, k);
    ASSERT_EQ(c, sum) << m << ", " << n;
  });
}

TEST_F(GemmTest, BF16IsNear) {
  ForEachCase<kernels::BF16>(*gemm_, [](const auto& x, const auto& w, size_t m, size_t n, float c) {
    double sum = 0;
    double magnitude = 0;
    for (size_t k = 0; k < x.cols; ++k) {
      const double product = double{ToF32(x.At(m, k))} * ToF32(w.At(n, k));
      sum += product;
      magnitude += std::abs(product);
    }
    // Products are exact in f32; each of the K additions rounds by at most half an ulp of a
    // partial sum, which the magnitude bounds.
    const double tolerance = static_cast<double>(x.cols + 1) * 0x1p-24 * magnitude + 1e-30;
    ASSERT_NEAR(c, sum, tolerance) << m << ", " << n;
  });
}

TEST_F(GemmTest, Int8IsExactAtTheEndsOfItsRange) {
  for (const auto& [x_value, w_value] : {std::pair{-128, -128}, std::pair{-128, 127}}) {
    Matrix<int8_t> x(2, 16384);
    Matrix<int8_t> w(3, 16384);
    for (auto& v : x.data) v = static_cast<int8_t>(x_value);
    for (auto& v : w.data) v = static_cast<int8_t>(w_value);
    for (const int32_t c : Product(*gemm_, x, w).data) EXPECT_EQ(c, 16384 * x_value * w_value);
  }
}

TEST_F(GemmTest, NoInputsMakeZeros) {
  Matrix<int8_t> x(3, 0);
  Matrix<int8_t> w(5, 0);
  for (const int32_t c : Product(*gemm_, x, w).data) EXPECT_EQ(c, 0);
}

// A token's bits may not tell with which others it was multiplied.
TEST_F(GemmTest, BF16RowsDependOnNothingElse) {
  for (const size_t inputs : {size_t{100}, size_t{1024}, size_t{2304}, size_t{5000}}) {
    const auto x = RandomMatrix<kernels::BF16>(200, inputs);
    const auto w = RandomMatrix<kernels::BF16>(320, inputs, 0, 2);
    const Matrix<float> all = Product(*gemm_, x, w);
    for (const size_t tokens : {1, 7, 64, 200}) {
      for (const size_t first : {0, 1, 15, 63, 64, 130, 199}) {
        if (first + tokens > x.rows) continue;
        Matrix<float> c(tokens, w.rows);
        const View<const kernels::BF16> part{&x.At(first, 0), tokens, inputs, x.stride};
        ASSERT_TRUE(
            gemm_->BF16(part, w.Const(), WeightLayout::kOutIn, 0, w.rows, c.Mutable()).ok());
        EXPECT_EQ(std::memcmp(c.data.data(), &all.At(first, 0), c.data.size() * sizeof(float)), 0)
            << tokens << " tokens from " << first << " on, " << inputs << " inputs";
      }
    }
  }
}

TEST_F(GemmTest, BF16BitsDependOnNeitherRangeNorLayoutNorStride) {
  for (const size_t inputs : {size_t{1024}, size_t{2304}, size_t{5000}}) {
    const auto x = RandomMatrix<kernels::BF16>(70, inputs);
    const auto w = RandomMatrix<kernels::BF16>(520, inputs, 0, 2);
    const auto wt = Transposed(w, 3);
    Matrix<kernels::BF16> x_padded(x.rows, inputs, 9);
    for (size_t r = 0; r < x.rows; ++r) {
      std::memcpy(&x_padded.At(r, 0), &x.At(r, 0), inputs * sizeof(kernels::BF16));
    }
    const Matrix<float> all = Product(*gemm_, x, w);
    const size_t cuts[] = {0, 1, 70, 200, 263, 264, 392, 520};
    for (const bool transposed : {false, true}) {
      Matrix<float> c(x.rows, w.rows);
      for (size_t i = 0; i + 1 < std::size(cuts); ++i) {
        ASSERT_TRUE(gemm_
                        ->BF16(x_padded.Const(), transposed ? wt.Const() : w.Const(),
                               transposed ? WeightLayout::kInOut : WeightLayout::kOutIn, cuts[i],
                               cuts[i + 1], c.Mutable())
                        .ok());
      }
      EXPECT_EQ(std::memcmp(c.data.data(), all.data.data(), c.data.size() * sizeof(float)), 0)
          << inputs << " inputs, transposed " << transposed;
    }
  }
}

TEST_F(GemmTest, ThreadsShareAProductAndStartNoOthers) {
  constexpr size_t kThreads = 2;
  const auto x = RandomMatrix<kernels::BF16>(100, 2304);
  const auto w = RandomMatrix<kernels::BF16>(1000, 2304, 0, 2);
  const auto x8 = RandomMatrix<int8_t>(100, 2304);
  const auto w8 = RandomMatrix<int8_t>(1000, 2304, 0, 2);
  const Matrix<float> alone = Product(*gemm_, x, w);
  const Matrix<int32_t> alone8 = Product(*gemm_, x8, w8);
  std::unique_ptr<Gemm> gemms[kThreads] = {NewGemm(), NewGemm()};
  WorkerPool pool(kThreads);
  const ptrdiff_t threads = Threads();
  for (int round = 0; round < 3; ++round) {
    Matrix<float> c(x.rows, w.rows);
    Matrix<int32_t> c8(x.rows, w.rows);
    bool ok[kThreads] = {};
    pool.Run([&](Worker& worker) {
      const IndexRange share = worker.Share(w.rows);
      Gemm& gemm = *gemms[worker.index()];
      ok[worker.index()] =
          gemm.BF16(x.Const(), w.Const(), WeightLayout::kOutIn, share.begin, share.end, c.Mutable())
              .ok() &&
          gemm.Int8(x8.Const(), w8.Const(), WeightLayout::kOutIn, share.begin, share.end,
                    c8.Mutable())
              .ok();
    });
    EXPECT_TRUE(ok[0] && ok[1]);
    EXPECT_EQ(std::memcmp(c.data.data(), alone.data.data(), c.data.size() * sizeof(float)), 0);
    EXPECT_EQ(c8.data, alone8.data);
    EXPECT_EQ(Threads(), threads) << "the library started threads of its own";
  }
}

TEST_F(GemmTest, NamesShapesThatDoNotFit) {
  Matrix<int8_t> x(2, 64), w(3, 65);
  Matrix<int32_t> c(2, 3);
  const auto multiply = [&](size_t begin, size_t end) {
    return gemm_->Int8(x.Const(), w.Const(), WeightLayout::kOutIn, begin, end, c.Mutable());
  };
  EXPECT_EQ(multiply(0, 3).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(multiply(0, 3).message(), HasSubstr("65"));
  w = Matrix<int8_t>(3, 64);
  EXPECT_TRUE(multiply(0, 3).ok());
  EXPECT_FALSE(multiply(0, 4).ok());
  EXPECT_FALSE(multiply(2, 1).ok());
  c = Matrix<int32_t>(1, 3);
  EXPECT_FALSE(multiply(0, 3).ok());
  const Matrix<int8_t> deep(1, kMaxInt8Depth + 1);
  EXPECT_EQ(gemm_->Int8(deep.Const(), deep.Const(), WeightLayout::kOutIn, 0, 1, c.Mutable()).code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace firesteel::gemm
