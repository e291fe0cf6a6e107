#include "kernels/reference.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numbers>

namespace firesteel::kernels::reference {
namespace {

double SoftCap(double x, double cap) { return cap == 0.0 ? x : cap * std::tanh(x / cap); }

// ln(1 + e^x) without overflow.
double SoftplusOf(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }

double GeluTanh(double x) {
  const double root = std::sqrt(2.0 / std::numbers::pi);
  return 0.5 * x * (1.0 + std::tanh(root * (x + 0.044715 * x * x * x)));
}

double Dot(std::span<const float> a, std::span<const float> b) {
  double sum = 0.0;
  for (size_t i = 0; i < a.size(); ++i)
    sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sum;
}

void SoftmaxInPlace(std::vector<double>& x) {
  const double largest = *std::max_element(x.begin(), x.end());
  double sum = 0.0;
  for (double& v : x) sum += v = std::exp(v - largest);
  for (double& v : x) v /= sum;
}

}  // namespace

double At(const TypedView& view, size_t row, size_t col) {
  switch (view.dtype) {
    case DType::kF32:
      return static_cast<double>(view.Row<float>(row)[col]);
    case DType::kBF16:
      return static_cast<double>(ToF32(view.Row<BF16>(row)[col]));
    case DType::kI8:
      return static_cast<double>(view.row_scales[row]) *
             static_cast<double>(view.Row<int8_t>(row)[col]);
    case DType::kI4: {
      // Groups of 128 elements in 64 bytes: the first 64 in the lower halves, the rest above.
      const size_t i = col % 128;
      const uint8_t byte = view.RowBytes(row)[col / 128 * 64 + i % 64];
      const double scale = static_cast<double>(ToF32(view.BlockScales(row)[col / 64]));
      return scale * (i < 64 ? byte % 16 - 8 : byte / 16 - 8);
    }
  }
  return 0.0;
}

std::vector<double> RmsNorm(std::span<const float> x, std::span<const float> weight, double eps) {
  const double mean = Dot(x, x) / static_cast<double>(x.size());
  std::vector<double> out(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    out[i] =
        static_cast<double>(x[i]) / std::sqrt(mean + eps) * (1.0 + static_cast<double>(weight[i]));
  }
  return out;
}

std::vector<double> RmsNormAdd(std::span<const float> x, std::span<const float> weight, double eps,
                               std::span<const float> inout) {
  std::vector<double> out = RmsNorm(x, weight, eps);
  for (size_t i = 0; i < out.size(); ++i) out[i] += static_cast<double>(inout[i]);
  return out;
}

std::vector<double> Rope(std::span<const float> cosines, std::span<const float> sines,
                         std::span<const float> x) {
  const size_t half = x.size() / 2;
  std::vector<double> out(x.size());
  for (size_t i = 0; i < half; ++i) {
    const double a = x[i], b = x[half + i], c = cosines[i], s = sines[i];
    out[i] = a * c - b * s;
    out[half + i] = b * c + a * s;
  }
  return out;
}

std::vector<double> GeluMul(std::span<const float> x, std::span<const float> factor) {
  std::vector<double> out(x.size());
  for (size_t i = 0; i < x.size(); ++i) out[i] = GeluTanh(x[i]) * static_cast<double>(factor[i]);
  return out;
}

std::vector<double> ScaleSoftCap(std::span<const float> x, double scale, double cap) {
  std::vector<double> out(x.size());
  for (size_t i = 0; i < x.size(); ++i) out[i] = SoftCap(static_cast<double>(x[i]) * scale, cap);
  return out;
}

std::vector<double> Softplus(std::span<const float> x) {
  std::vector<double> out(x.size());
  for (size_t i = 0; i < x.size(); ++i) out[i] = SoftplusOf(x[i]);
  return out;
}

std::vector<double> Softmax(std::span<const float> x) {
  std::vector<double> out(x.begin(), x.end());
  SoftmaxInPlace(out);
  return out;
}

std::vector<double> CategoricalWeights(std::span<const float> logits, double largest,
                                       double temperature) {
  std::vector<double> weights;
  weights.reserve(logits.size());
  for (const float logit : logits) {
    const double exponent = (static_cast<double>(logit) - largest) / temperature;
    weights.push_back(std::isnan(exponent) ? 0.0 : std::exp(exponent));
  }
  return weights;
}

std::vector<double> MatMul(const TypedView& x, const TypedView& w) {
  std::vector<double> y;
  y.reserve(x.rows * w.rows);
  for (size_t t = 0; t < x.rows; ++t) {
    for (size_t n = 0; n < w.rows; ++n) {
      double sum = 0.0;
      for (size_t k = 0; k < x.cols; ++k) sum += At(x, t, k) * At(w, n, k);
      y.push_back(sum);
    }
  }
  return y;
}

std::vector<double> MaskedMatVec(const TypedView& x, const TypedView& w,
                                 std::span<const uint32_t> active) {
  std::vector<double> out;
  for (const uint32_t row : active) {
    double sum = 0.0;
    for (size_t k = 0; k < x.cols; ++k) sum += At(x, 0, k) * At(w, row, k);
    out.push_back(sum);
  }
  return out;
}

std::vector<double> SparseVecMat(std::span<const float> coefficients,
                                 std::span<const uint32_t> active, const TypedView& w) {
  std::vector<double> y(w.cols, 0.0);
  for (size_t j = 0; j < active.size(); ++j) {
    for (size_t c = 0; c < w.cols; ++c) {
      y[c] += static_cast<double>(coefficients[j]) * At(w, active[j], c);
    }
  }
  return y;
}

std::vector<double> ScreenMatMul(std::span<const double> x, const I2View& w) {
  std::vector<double> y;
  for (size_t t = 0; t < x.size() / w.cols; ++t) {
    for (size_t n = 0; n < w.rows; ++n) {
      double sum = 0.0;
      for (size_t k = 0; k < w.cols; ++k) {
        const size_t group = k / 256, place = k % 256;
        const int byte = w.codes[n * BytesOfI2Row(w.cols) + group * 64 + place % 64];
        const int level = 2 * ((byte >> (2 * (place / 64))) & 3) - 3;
        sum += x[t * w.cols + k] * level;
      }
      y.push_back(sum * static_cast<double>(w.scales[n]));
    }
  }
  return y;
}

std::vector<double> RotateAtRandom(std::span<const float> signs, std::span<const float> x) {
  const size_t n = x.size();
  const size_t p = std::bit_floor(n);
  std::vector<double> values(x.begin(), x.end());
  for (size_t round = 0; round < 3; ++round) {
    for (size_t i = 0; i < n; ++i) values[i] *= static_cast<double>(signs[round * n + i]);
    const size_t first = round == 1 ? n - p : 0;
    std::vector<double> sums(p, 0.0);
    for (size_t i = 0; i < p; ++i) {
      for (size_t j = 0; j < p; ++j) {
        const double sign = std::popcount(i & j) % 2 == 0 ? 1.0 : -1.0;
        sums[i] += sign * values[first + j];
      }
    }
    for (size_t i = 0; i < p; ++i) {
      values[first + i] = sums[i] / std::sqrt(static_cast<double>(p));
    }
  }
  return values;
}

double StatisticalThreshold(std::span<const float> scores, double quantile, int ddof) {
  const double n = static_cast<double>(scores.size());
  double mean = 0.0;
  for (const float s : scores) mean += static_cast<double>(s);
  mean /= n;
  double squares = 0.0;
  for (const float s : scores)
    squares += (static_cast<double>(s) - mean) * (static_cast<double>(s) - mean);
  return mean + std::sqrt(squares / (n - ddof)) * quantile;
}

std::vector<uint32_t> CompactAbove(std::span<const float> scores, double theta, bool strict) {
  std::vector<uint32_t> indices;
  for (size_t i = 0; i < scores.size(); ++i) {
    const double s = scores[i];
    if (strict ? s > theta : s >= theta) indices.push_back(static_cast<uint32_t>(i));
  }
  return indices;
}

Attention Attend(const AttentionShape& shape, std::span<const float> query,
                 std::span<const float> keys, std::span<const float> values, double quantile) {
  const size_t dim = shape.head_dim, r = shape.predictor_dim, n = keys.size() / dim;
  Attention result;
  for (size_t p = 0; p < n; ++p) {
    const double dot = Dot(query.first(r), keys.subspan(p * dim, r));
    result.scores.push_back(SoftCap(dot * static_cast<double>(shape.scale), shape.softcap));
  }
  const bool all = shape.top_k == 0 || n <= shape.top_k;
  for (size_t p = 0; p < n && all; ++p) result.kept.push_back(static_cast<uint32_t>(p));
  if (!all) {
    const std::vector<float> scores(result.scores.begin(), result.scores.end());
    result.theta = StatisticalThreshold(scores, quantile);
    for (size_t p = 0; p < n; ++p) {
      if (result.scores[p] > result.theta) result.kept.push_back(static_cast<uint32_t>(p));
    }
    if (result.kept.empty()) {
      const auto largest = std::max_element(result.scores.begin(), result.scores.end());
      result.kept.push_back(static_cast<uint32_t>(largest - result.scores.begin()));
    }
  }
  std::vector<double> weights;
  for (const uint32_t p : result.kept) weights.push_back(result.scores[p]);
  SoftmaxInPlace(weights);
  result.out.assign(dim, 0.0);
  for (size_t j = 0; j < weights.size(); ++j) {
    const size_t p = result.kept[j];
    if (shape.spark()) {
      const double gate = Dot(query.subspan(r), keys.subspan(p * dim + r, dim - r));
      weights[j] *= SoftplusOf(gate * static_cast<double>(shape.scale));
    }
    for (size_t i = 0; i < dim; ++i)
      result.out[i] += weights[j] * static_cast<double>(values[p * dim + i]);
  }
  return result;
}

}  // namespace firesteel::kernels::reference
