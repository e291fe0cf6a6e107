#include "kernels/statistical_topk.h"

#include <array>
#include <cmath>
#include <limits>
#include <numbers>

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/statistical_topk.cc"
#include "hwy/foreach_target.h"
// The rest is compiled once per target, so it has to follow foreach_target.h.
#include "hwy/highway.h"
#include "kernels/statistical_topk-inl.h"
// clang-format on

#if HWY_ONCE
namespace firesteel::kernels {

HWY_EXPORT(StatisticalThresholdImpl);
HWY_EXPORT(CompactAboveImpl);

namespace {

template <size_t N>
double Polynomial(const std::array<double, N>& coefficients, double x) {
  double y = 0.0;
  for (const double c : coefficients) y = y * x + c;
  return y;
}

// Acklam's rational approximation for 0 < p ≤ 1/2, relative error about 1e-9.
double ApproximateLowerQuantile(double p) {
  static constexpr std::array<double, 6> kCentralTop = {
      -3.969683028665376e+01, 2.209460984245205e+02,  -2.759285104469687e+02,
      1.383577518672690e+02,  -3.066479806614716e+01, 2.506628277459239e+00};
  static constexpr std::array<double, 6> kCentralBottom = {
      -5.447609879822406e+01, 1.615858368580409e+02,  -1.556989798598866e+02,
      6.680131188771972e+01,  -1.328068155288572e+01, 1.0};
  static constexpr std::array<double, 6> kTailTop = {-7.784894002430293e-03, -3.223964580411365e-01,
                                                     -2.400758277161838e+00, -2.549732539343734e+00,
                                                     4.374664141464968e+00,  2.938163982698783e+00};
  static constexpr std::array<double, 5> kTailBottom = {
      7.784695709041462e-03, 3.224671290700398e-01, 2.445134137142996e+00, 3.754408661907416e+00,
      1.0};
  constexpr double kTail = 0.02425;
  if (p < kTail) {
    const double s = std::sqrt(-2.0 * std::log(p));
    return Polynomial(kTailTop, s) / Polynomial(kTailBottom, s);
  }
  const double q = p - 0.5;
  return q * Polynomial(kCentralTop, q * q) / Polynomial(kCentralBottom, q * q);
}

}  // namespace

double NormalQuantile(double p) {
  if (!(p > 0.0 && p < 1.0)) return std::numeric_limits<double>::quiet_NaN();
  // 1 − p is exact here, and the distribution function is accurate in its lower tail only.
  if (p > 0.5) return -NormalQuantile(1.0 - p);
  double x = ApproximateLowerQuantile(p);
  for (int step = 0; step < 2; ++step) {
    const double density = std::exp(-0.5 * x * x) / std::sqrt(2.0 * std::numbers::pi);
    if (density == 0.0) break;  // p below about 1e-320
    x -= (0.5 * std::erfc(-x / std::numbers::sqrt2) - p) / density;
  }
  return x;
}

double StatisticalThreshold(const float* scores, size_t n, double quantile) {
  HWY_DASSERT(n >= 2);
  return HWY_DYNAMIC_DISPATCH(StatisticalThresholdImpl)(scores, n, quantile);
}

size_t CompactAbove(const float* scores, size_t n, double theta, uint32_t* indices, float* excess) {
  return HWY_DYNAMIC_DISPATCH(CompactAboveImpl)(scores, n, theta, indices, excess);
}

}  // namespace firesteel::kernels
#endif  // HWY_ONCE
