#include "kernels/elementwise.h"

#include "kernels/reference.h"
#include "kernels/test_util.h"

namespace firesteel::kernels {
namespace {

class ElementwiseTest : public SimdTest {
 protected:
  Random random_{1};
};
FIRESTEEL_FOR_EACH_SIMD_TARGET(ElementwiseTest);

// Arguments on both sides of every branch of the transcendental functions, and random ones.
std::vector<float> Arguments(Random& random, size_t n) {
  static constexpr float kSpecial[] = {0.0f,   -0.0f,  1e-30f, -1e-30f, 1e-6f,  -1e-6f, 0.34f,
                                       -0.36f, 1.0f,   -1.0f,  5.0f,    -5.0f,  9.5f,   -9.5f,
                                       20.0f,  -20.0f, 88.0f,  -88.0f,  110.0f, -110.0f};
  std::vector<float> x = random.Floats(n, 3.0f);
  for (size_t i = 0; i < n; i += 3) x[i] = kSpecial[(i / 3) % std::size(kSpecial)];
  return x;
}

// Relative error of a few roundings; `amplify(i)` is how much the function magnifies that of its
// argument.
template <typename Amplify>
auto Relative(const std::vector<double>& expected, double roundings, const Amplify& amplify) {
  return [&expected, roundings, amplify](size_t i) {
    return kEps * std::abs(expected[i]) * (roundings + amplify(i)) + kTiny;
  };
}
double NoAmplification(size_t) { return 0.0; }

TEST_P(ElementwiseTest, RmsNormMatchesReference) {
  for (const size_t n : Lengths()) {
    for (const size_t misalign : {0, 1, 3}) {
      Guarded<float> x(n, misalign), weight(n, misalign), out(n, misalign), inout(n, misalign);
      random_.Fill(x.span(), 2.0f);
      random_.Fill(weight.span(), 0.5f);
      random_.Fill(inout.span());
      const auto expected = reference::RmsNorm(x.span(), weight.span(), 1e-6f);
      RmsNorm(x.data(), weight.data(), 1e-6f, n, out.data());
      EXPECT_LE(WorstError(out.span(), expected, Relative(expected, 3, NoAmplification)), 1.0) << n;

      const auto added = reference::RmsNormAdd(x.span(), weight.span(), 1e-6f, inout.span());
      const std::vector<float> before(inout.span().begin(), inout.span().end());
      RmsNormAdd(x.data(), weight.data(), 1e-6f, n, inout.data());
      EXPECT_LE(WorstError(inout.span(), added,
                           [&](size_t i) {
                             return kEps * (3 * std::abs(expected[i]) + std::abs(added[i])) + kTiny;
                           }),
                1.0)
          << n;

      RmsNorm(x.data(), weight.data(), 1e-6f, n, x.data());
      EXPECT_TRUE(SameBits(x.span(), out.span())) << "in place, n = " << n;
      EXPECT_TRUE(x.GuardsIntact() && weight.GuardsIntact() && out.GuardsIntact() &&
                  inout.GuardsIntact())
          << n;
    }
  }
}

TEST_P(ElementwiseTest, RmsNormToleranceSeesWrongDivisorAndWrongWeight) {
  const size_t n = 2304;
  const auto x = random_.Floats(n), weight = random_.Floats(n, 0.5f);
  std::vector<float> out(n);
  RmsNorm(x.data(), weight.data(), 1e-6f, n, out.data());
  const auto right = reference::RmsNorm(x, weight, 1e-6f);
  const auto error = [&](double factor, double bias) {
    std::vector<double> twin = right;
    for (size_t i = 0; i < n; ++i) {
      const double w = static_cast<double>(weight[i]);
      twin[i] *= factor * (bias + w) / (1.0 + w);
    }
    return WorstError(std::span<const float>(out), twin, Relative(twin, 3, NoAmplification));
  };
  EXPECT_LE(error(1.0, 1.0), 1.0);
  EXPECT_GT(error(std::sqrt((n - 1.0) / n), 1.0), 1.0);  // the divisor n − 1
  EXPECT_GT(error(1.0, 0.0), 1.0);                       // weight instead of 1 + weight
}

TEST_P(ElementwiseTest, RopeRotatesPairsHalfAVectorApart) {
  for (const size_t half : Lengths()) {
    const size_t dim = 2 * half;
    Guarded<float> cosines(half, 1), sines(half), x(dim, 3);
    random_.Fill(x.span());
    for (size_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(random_.Normal(10.0f));
      cosines[i] = static_cast<float>(std::cos(angle));
      sines[i] = static_cast<float>(std::sin(angle));
    }
    const auto expected = reference::Rope(cosines.span(), sines.span(), x.span());
    const std::vector<float> before(x.span().begin(), x.span().end());
    Rope(cosines.data(), sines.data(), dim, x.data());
    const auto tolerance = [&](size_t i) {
      const size_t j = i % std::max<size_t>(half, 1);
      return 2 * kEps *
                 (std::abs(static_cast<double>(before[j])) +
                  std::abs(static_cast<double>(before[half + j]))) +
             kTiny;
    };
    EXPECT_LE(WorstError(x.span(), expected, tolerance), 1.0) << dim;
    EXPECT_TRUE(x.GuardsIntact()) << dim;
    if (half >= 2) {
      std::vector<float> minus(sines.span().begin(), sines.span().end());
      for (float& s : minus) s = -s;
      const auto wrong = reference::Rope(cosines.span(), minus, before);
      EXPECT_GT(WorstError(x.span(), wrong, tolerance), 1.0) << "the other direction, " << dim;
    }
  }
}

TEST_P(ElementwiseTest, GeluMulMatchesReference) {
  for (const size_t n : Lengths()) {
    for (const size_t misalign : {0, 1}) {
      Guarded<float> x(n, misalign), factor(n, 3), out(n, misalign);
      const auto arguments = Arguments(random_, n);
      std::copy(arguments.begin(), arguments.end(), x.data());
      random_.Fill(factor.span());
      const auto expected = reference::GeluMul(x.span(), factor.span());
      // e^(−2u) magnifies the relative error of u by 2|u|; where 1 + tanh u vanishes in double, so
      // may we.
      const auto tolerance = [&](size_t i) {
        const double v = static_cast<double>(x[i]);
        const double u = 0.7978845608 * (v + 0.044715 * v * v * v);
        const double cancelled = 1.2e-16 * std::abs(v * static_cast<double>(factor[i]));
        return kEps * std::abs(expected[i]) * (4 + 4 * std::min(std::abs(u), 40.0)) + cancelled +
               kTiny;
      };
      GeluMul(x.data(), factor.data(), n, out.data());
      EXPECT_LE(WorstError(out.span(), expected, tolerance), 1.0) << n;
      EXPECT_TRUE(out.GuardsIntact()) << n;
      if (n >= 15) {
        std::vector<double> erf_form;
        for (size_t i = 0; i < n; ++i) {
          const double v = static_cast<double>(x[i]);
          erf_form.push_back(0.5 * v * std::erfc(-v / std::sqrt(2.0)) *
                             static_cast<double>(factor[i]));
        }
        EXPECT_GT(WorstError(out.span(), erf_form, tolerance), 1.0) << "the erf form, " << n;
      }
      const std::vector<float> apart(out.span().begin(), out.span().end());
      GeluMul(x.data(), factor.data(), n, x.data());
      EXPECT_TRUE(SameBits(x.span(), apart)) << "in place, n = " << n;
    }
  }
}

TEST_P(ElementwiseTest, ScaleSoftCapMatchesReference) {
  for (const size_t n : Lengths()) {
    Guarded<float> x(n, 1), out(n, 3);
    const auto arguments = Arguments(random_, n);
    std::copy(arguments.begin(), arguments.end(), x.data());
    for (const float cap : {0.0f, 50.0f, 30.0f, 0.5f}) {
      const float scale = 0.0883883f;
      const auto expected = reference::ScaleSoftCap(x.span(), scale, cap);
      ScaleSoftCap(x.data(), scale, cap, n, out.data());
      const auto tolerance = Relative(expected, cap == 0.0f ? 1 : 6, NoAmplification);
      EXPECT_LE(WorstError(out.span(), expected, tolerance), 1.0) << n << " cap " << cap;
      if (n >= 15 && cap != 0.0f) {
        const auto wrong = reference::ScaleSoftCap(x.span(), scale, 0.0);
        EXPECT_GT(WorstError(out.span(), wrong, tolerance), 1.0) << "without the cap, " << n;
      }
    }
    EXPECT_TRUE(out.GuardsIntact()) << n;
  }
}

TEST_P(ElementwiseTest, SoftplusMatchesReference) {
  for (const size_t n : Lengths()) {
    Guarded<float> x(n, 3), out(n, 1);
    const auto arguments = Arguments(random_, n);
    std::copy(arguments.begin(), arguments.end(), x.data());
    const auto expected = reference::Softplus(x.span());
    Softplus(x.data(), n, out.data());
    const auto tolerance = Relative(expected, 6, NoAmplification);
    EXPECT_LE(WorstError(out.span(), expected, tolerance), 1.0) << n;
    EXPECT_TRUE(out.GuardsIntact()) << n;
    if (n >= 15) {
      std::vector<double> relu;
      for (size_t i = 0; i < n; ++i) relu.push_back(std::max(0.0, static_cast<double>(x[i])));
      EXPECT_GT(WorstError(out.span(), relu, tolerance), 1.0) << n;
    }
  }
}

TEST_P(ElementwiseTest, SoftmaxMatchesReference) {
  for (const size_t n : Lengths()) {
    if (n == 0) continue;
    Guarded<float> x(n, 1), out(n);
    random_.Fill(x.span(), 4.0f);
    for (float& v : x.span()) v += 60.0f;  // e^x alone would lose its accuracy and at 89 overflow
    const auto expected = reference::Softmax(x.span());
    const double largest = static_cast<double>(*std::max_element(x.data(), x.data() + n));
    const auto distance = [&](size_t i) { return largest - static_cast<double>(x[i]); };
    const auto tolerance = Relative(expected, 6, distance);
    Softmax(x.data(), n, out.data());
    EXPECT_LE(WorstError(out.span(), expected, tolerance), 1.0) << n;
    EXPECT_TRUE(out.GuardsIntact()) << n;
    if (n >= 2 && expected[n - 1] > 1e-5) {
      auto wrong = reference::Softmax(x.span().first(n - 1));
      EXPECT_GT(WorstError(out.span().first(n - 1), wrong, tolerance), 1.0)
          << "without the last, " << n;
    }
    const std::vector<float> apart(out.span().begin(), out.span().end());
    Softmax(x.data(), n, x.data());
    EXPECT_TRUE(SameBits(x.span(), apart)) << "in place, n = " << n;
  }
}

// The bits of an element may not depend on where it stands: the ragged end computes like the rest.
TEST_P(ElementwiseTest, PositionDoesNotChangeBits) {
  const auto x = Arguments(random_, 301);
  const auto factor = random_.Floats(301);
  std::vector<float> whole(301), part(301);
  const auto check = [&](const char* name, const auto& run) {
    run(0, 301, whole.data());
    for (const size_t begin : {1, 5, 16, 77}) {
      for (const size_t n : {1, 3, 18, 66}) {
        run(begin, n, part.data());
        EXPECT_TRUE(SameBits(std::span(part).first(n), std::span(whole).subspan(begin, n)))
            << name << ' ' << begin << '+' << n;
      }
    }
  };
  check("GeluMul", [&](size_t b, size_t n, float* out) { GeluMul(&x[b], &factor[b], n, out); });
  check("Softplus", [&](size_t b, size_t n, float* out) { Softplus(&x[b], n, out); });
  check("SoftCap", [&](size_t b, size_t n, float* out) { ScaleSoftCap(&x[b], 0.3f, 50, n, out); });
}

TEST_P(ElementwiseTest, ValuesThatAreNotFinite) {
  const std::vector<float> x = {kNaN, kInf, -kInf, 1e38f, -1e38f, 1.0f};
  const std::vector<float> ones(6, 1.0f), zeros(6, 0.0f);
  std::vector<float> out(6);

  Softplus(x.data(), 6, out.data());
  EXPECT_TRUE(std::isnan(out[0]));
  EXPECT_EQ(out[1], kInf);
  EXPECT_EQ(out[2], 0.0f);
  EXPECT_EQ(out[3], 1e38f);
  EXPECT_EQ(out[4], 0.0f);

  ScaleSoftCap(x.data(), 1.0f, 50.0f, 6, out.data());
  EXPECT_TRUE(std::isnan(out[0]));
  EXPECT_EQ(out[1], 50.0f);
  EXPECT_EQ(out[2], -50.0f);
  EXPECT_EQ(out[4], -50.0f);

  GeluMul(x.data(), ones.data(), 6, out.data());
  EXPECT_TRUE(std::isnan(out[0]));
  EXPECT_EQ(out[1], kInf);
  EXPECT_EQ(out[3], 1e38f);
  EXPECT_EQ(out[4], 0.0f);

  RmsNorm(x.data(), zeros.data(), 1e-6f, 6, out.data());
  EXPECT_TRUE(std::all_of(out.begin(), out.end(), [](float v) { return std::isnan(v); }));
  Softmax(x.data(), 6, out.data());
  EXPECT_TRUE(std::all_of(out.begin(), out.end(), [](float v) { return std::isnan(v); }));

  const std::vector<float> masked = {-kInf, 2.0f, -kInf};
  Softmax(masked.data(), 3, out.data());
  EXPECT_EQ(out[0], 0.0f);
  EXPECT_EQ(out[1], 1.0f);
}

}  // namespace
}  // namespace firesteel::kernels
