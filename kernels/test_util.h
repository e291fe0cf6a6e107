// What the kernel tests share: one case per SIMD target, buffers that catch stray accesses,
// tolerances.

#ifndef FIRESTEEL_KERNELS_TEST_UTIL_H_
#define FIRESTEEL_KERNELS_TEST_UTIL_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <new>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "hwy/targets.h"
#include "kernels/simd_target.h"
#include "kernels/tensor.h"

#if defined(__SANITIZE_ADDRESS__)
#define FIRESTEEL_TEST_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FIRESTEEL_TEST_ASAN 1
#endif
#endif
#ifdef FIRESTEEL_TEST_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace firesteel::kernels {

/// The targets to test. Highway offers AVX3_ZEN4 on AMD only, but it runs wherever AVX3_SPR does.
inline std::vector<std::string> TestedTargets() {
  auto names = AvailableSimdTargets();
  if (names.front() == "AVX3_SPR") names.emplace_back("AVX3_ZEN4");
  return names;
}

/// Runs each of its cases once per SIMD target that the machine has; the case is named after the
/// target.
class SimdTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    if (!ForceSimdTarget(GetParam())) {
      ASSERT_EQ(GetParam(), "AVX3_ZEN4");
      hwy::SetSupportedTargetsForTest(HWY_AVX3_ZEN4);
      hwy::GetChosenTarget().Update(HWY_AVX3_ZEN4);
    }
    ASSERT_EQ(SimdTargetName(), GetParam());
  }
  void TearDown() override { ASSERT_TRUE(ForceSimdTarget(AvailableSimdTargets().front())); }
};

#define FIRESTEEL_FOR_EACH_SIMD_TARGET(suite)                                 \
  INSTANTIATE_TEST_SUITE_P(Simd, suite, ::testing::ValuesIn(TestedTargets()), \
                           [](const auto& case_info) { return case_info.param; })

inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
inline constexpr float kInf = std::numeric_limits<float>::infinity();
inline constexpr double kEps = std::numeric_limits<float>::epsilon();
/// Below this, results may be denormal or flushed: no relative accuracy is asked for.
inline constexpr double kTiny = std::numeric_limits<float>::min();

/// Lengths around the numbers of lanes of all targets, odd ones and large ones.
inline const std::vector<size_t>& Lengths() {
  static const std::vector<size_t> lengths = {0,   1,   2,   3,   4,   5,   7,   8,   9,    15,
                                              16,  17,  31,  32,  33,  47,  63,  64,  65,   127,
                                              128, 129, 255, 256, 257, 511, 512, 513, 1000, 2304};
  return lengths;
}

/// n elements that start `misalign` elements past a 64-byte boundary, between guards that hold NaN
/// (all bits set): a read that strays spoils the result, a write is seen by GuardsIntact, and under
/// AddressSanitizer either stops the test.
template <typename T>
class Guarded {
 public:
  static constexpr size_t kGuard = 64;

  explicit Guarded(size_t n, size_t misalign = 0)
      : size_(n),
        total_(2 * kGuard + misalign + n),
        begin_(kGuard + misalign),
        memory_(static_cast<T*>(::operator new(total_ * sizeof(T), std::align_val_t(64)))) {
    std::memset(static_cast<void*>(memory_.get()), 0xFF, total_ * sizeof(T));
    SetGuards(true);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { SetGuards(false); }

  T* data() { return memory_.get() + begin_; }
  const T* data() const { return memory_.get() + begin_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data()[i]; }
  const T& operator[](size_t i) const { return data()[i]; }
  std::span<T> span() { return {data(), size_}; }
  std::span<const T> span() const { return {data(), size_}; }

  bool GuardsIntact() {
    SetGuards(false);
    const auto* bytes = reinterpret_cast<const unsigned char*>(memory_.get());
    const auto intact = [&](size_t from, size_t to) {
      return std::all_of(bytes + from * sizeof(T), bytes + to * sizeof(T),
                         [](unsigned char b) { return b == 0xFF; });
    };
    const bool result = intact(0, begin_) && intact(begin_ + size_, total_);
    SetGuards(true);
    return result;
  }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); }
  };

  void SetGuards([[maybe_unused]] bool on) {
#ifdef FIRESTEEL_TEST_ASAN
    T* p = memory_.get();
    const size_t tail = total_ - begin_ - size_;
    if (on) {
      __asan_poison_memory_region(p + begin_ + size_, tail * sizeof(T));
    } else {
      __asan_unpoison_memory_region(p + begin_ + size_, tail * sizeof(T));
    }
#endif
  }

  const size_t size_;
  const size_t total_;
  const size_t begin_;
  const std::unique_ptr<T, Free> memory_;
};

/// Reproducible inputs.
class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}

  float Normal(float std = 1.0f) { return std::normal_distribution<float>(0.0f, std)(engine_); }
  size_t Below(size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(engine_); }

  void Fill(std::span<float> out, float std = 1.0f) {
    for (float& v : out) v = Normal(std);
  }
  void Fill(std::span<BF16> out, float std = 1.0f) {
    for (BF16& v : out) v = ToBF16(Normal(std));
  }
  std::vector<float> Floats(size_t n, float std = 1.0f) {
    std::vector<float> out(n);
    Fill(std::span<float>(out), std);
    return out;
  }
  /// Rising indices below n, each present with the given probability; 0 and 1 are exact.
  std::vector<uint32_t> Subset(size_t n, double density) {
    std::vector<uint32_t> out;
    std::bernoulli_distribution keep(density);
    for (size_t i = 0; i < n; ++i) {
      if (keep(engine_)) out.push_back(static_cast<uint32_t>(i));
    }
    return out;
  }

 private:
  std::mt19937 engine_;
};

/// Error of a sum of `length` products whose factors are at most a and b: the rounding of each
/// addition is relative to a partial sum, which grows like sqrt(length), and roundings add up like
/// a random walk.
inline double SumTolerance(double a, double b, size_t length) {
  return 2 * kEps * a * b * std::sqrt(static_cast<double>(std::max<size_t>(length, 1)));
}

template <typename T>
double MaxAbs(const T& values) {
  double result = 0.0;
  for (const auto v : values) result = std::max(result, std::abs(static_cast<double>(v)));
  return result;
}

/// Same bits, element by element: −0 differs from 0, and equal NaNs are equal.
inline bool SameBits(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size_bytes()) == 0);
}

/// Largest |actual − expected| / tolerance(i); a correct kernel stays ≤ 1, a wrong one must not.
template <typename Tolerance>
double WorstError(std::span<const float> actual, std::span<const double> expected,
                  const Tolerance& tolerance) {
  EXPECT_EQ(actual.size(), expected.size());
  double worst = 0.0;
  for (size_t i = 0; i < actual.size(); ++i) {
    const double error = std::abs(static_cast<double>(actual[i]) - expected[i]) / tolerance(i);
    if (!(error <= worst)) worst = error;  // a NaN is kept
  }
  return worst;
}

}  // namespace firesteel::kernels

#endif  // FIRESTEEL_KERNELS_TEST_UTIL_H_
