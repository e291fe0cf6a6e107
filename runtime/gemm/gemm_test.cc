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
#include <utility>
#include <vector>

#include "runtime/threading/worker_pool.h"

namespace firesteel::gemm {
namespace {

using kernels::BF16;
using kernels::ToBF16;
using kernels::ToF32;
using ::testing::HasSubstr;

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

Matrix<BF16> RandomMatrix(size_t rows, size_t cols, size_t padding = 0, uint32_t seed = 1) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  Matrix<BF16> out(rows, cols, padding);
  for (BF16& v : out.data) v = ToBF16(normal(engine));
  return out;
}

std::unique_ptr<Gemm> NewGemm() {
  auto gemm = Gemm::Create();
  EXPECT_TRUE(gemm.ok()) << gemm.status();
  return gemm.ok() ? *std::move(gemm) : nullptr;
}

// x · wᵀ for all outputs, c dense.
Matrix<float> Product(Gemm& gemm, const Matrix<BF16>& x, const Matrix<BF16>& w) {
  Matrix<float> c(x.rows, w.rows);
  const absl::Status status = gemm.Multiply(x.Const(), w.Const(), 0, w.rows, c.Mutable());
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

constexpr float kUntouched = 12345.678f;

TEST_F(GemmTest, IsNearTheExactSumAndTouchesNothingElse) {
  for (const Case& s : kCases) {
    for (const size_t padding : {0, 32, 7}) {
      const auto x = RandomMatrix(s.tokens, s.inputs, padding, 1);
      const auto w = RandomMatrix(s.outputs, s.inputs, padding, 2);
      SCOPED_TRACE(testing::Message()
                   << s.tokens << " tokens, " << s.outputs << " outputs, " << s.inputs
                   << " inputs, outputs " << s.begin << " to " << s.end << ", padding " << padding);
      Matrix<float> c(s.tokens, s.outputs, padding);
      for (float& v : c.data) v = kUntouched;
      ASSERT_TRUE(gemm_->Multiply(x.Const(), w.Const(), s.begin, s.end, c.Mutable()).ok());
      for (size_t m = 0; m < c.rows; ++m) {
        for (size_t n = 0; n < c.stride; ++n) {
          if (n < s.begin || n >= s.end) {
            ASSERT_EQ(c.At(m, n), kUntouched) << "touched " << m << ", " << n;
            continue;
          }
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
          ASSERT_NEAR(c.At(m, n), sum, tolerance) << m << ", " << n;
        }
      }
    }
  }
}

TEST_F(GemmTest, NoInputsMakeZeros) {
  const Matrix<BF16> x(3, 0), w(5, 0);
  for (const float c : Product(*gemm_, x, w).data) EXPECT_EQ(c, 0);
}

// A token's bits may not tell with which others it was multiplied.
TEST_F(GemmTest, RowsDependOnNothingElse) {
  for (const size_t inputs : {size_t{100}, size_t{1024}, size_t{2304}, size_t{5000}}) {
    const auto x = RandomMatrix(200, inputs);
    const auto w = RandomMatrix(320, inputs, 0, 2);
    const Matrix<float> all = Product(*gemm_, x, w);
    for (const size_t tokens : {1, 7, 64, 200}) {
      for (const size_t first : {0, 1, 15, 63, 64, 130, 199}) {
        if (first + tokens > x.rows) continue;
        Matrix<float> c(tokens, w.rows);
        const View<const BF16> part{&x.At(first, 0), tokens, inputs, x.stride};
        ASSERT_TRUE(gemm_->Multiply(part, w.Const(), 0, w.rows, c.Mutable()).ok());
        EXPECT_EQ(std::memcmp(c.data.data(), &all.At(first, 0), c.data.size() * sizeof(float)), 0)
            << tokens << " tokens from " << first << " on, " << inputs << " inputs";
      }
    }
  }
}

TEST_F(GemmTest, BitsDependOnNeitherRangeNorStride) {
  for (const size_t inputs : {size_t{1024}, size_t{2304}, size_t{5000}}) {
    const auto x = RandomMatrix(70, inputs);
    const auto w = RandomMatrix(520, inputs, 0, 2);
    Matrix<BF16> x_padded(x.rows, inputs, 9);
    for (size_t r = 0; r < x.rows; ++r) {
      std::memcpy(&x_padded.At(r, 0), &x.At(r, 0), inputs * sizeof(BF16));
    }
    const Matrix<float> all = Product(*gemm_, x, w);
    const size_t cuts[] = {0, 1, 70, 200, 263, 264, 392, 520};
    Matrix<float> c(x.rows, w.rows);
    for (size_t i = 0; i + 1 < std::size(cuts); ++i) {
      ASSERT_TRUE(
          gemm_->Multiply(x_padded.Const(), w.Const(), cuts[i], cuts[i + 1], c.Mutable()).ok());
    }
    EXPECT_EQ(std::memcmp(c.data.data(), all.data.data(), c.data.size() * sizeof(float)), 0)
        << inputs << " inputs";
  }
}

TEST_F(GemmTest, ThreadsShareAProductAndStartNoOthers) {
  constexpr size_t kThreads = 2;
  const auto x = RandomMatrix(100, 2304);
  const auto w = RandomMatrix(1000, 2304, 0, 2);
  const Matrix<float> alone = Product(*gemm_, x, w);
  std::unique_ptr<Gemm> gemms[kThreads] = {NewGemm(), NewGemm()};
  WorkerPool pool(kThreads);
  const ptrdiff_t threads = Threads();
  for (int round = 0; round < 3; ++round) {
    Matrix<float> c(x.rows, w.rows);
    bool ok[kThreads] = {};
    pool.Run([&](Worker& worker) {
      const IndexRange share = worker.Share(w.rows);
      Gemm& gemm = *gemms[worker.index()];
      ok[worker.index()] =
          gemm.Multiply(x.Const(), w.Const(), share.begin, share.end, c.Mutable()).ok();
    });
    EXPECT_TRUE(ok[0] && ok[1]);
    EXPECT_EQ(std::memcmp(c.data.data(), alone.data.data(), c.data.size() * sizeof(float)), 0);
    EXPECT_EQ(Threads(), threads) << "the library started threads of its own";
  }
}

TEST_F(GemmTest, NamesShapesThatDoNotFit) {
  Matrix<BF16> x(2, 64), w(3, 65);
  Matrix<float> c(2, 3);
  const auto multiply = [&](size_t begin, size_t end) {
    return gemm_->Multiply(x.Const(), w.Const(), begin, end, c.Mutable());
  };
  EXPECT_EQ(multiply(0, 3).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(multiply(0, 3).message(), HasSubstr("65"));
  w = Matrix<BF16>(3, 64);
  EXPECT_TRUE(multiply(0, 3).ok());
  EXPECT_FALSE(multiply(0, 4).ok());
  EXPECT_FALSE(multiply(2, 1).ok());
  c = Matrix<float>(1, 3);
  EXPECT_FALSE(multiply(0, 3).ok());
}

}  // namespace
}  // namespace firesteel::gemm
