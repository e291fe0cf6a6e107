// The element-wise and normalising steps of a Gemma-2 layer, on one vector at a time.
//
// In-place use (out == x) is allowed everywhere. Bits depend on the values, n and the SIMD target
// only.

#ifndef FIRESTEEL_KERNELS_ELEMENTWISE_H_
#define FIRESTEEL_KERNELS_ELEMENTWISE_H_

#include <cstddef>

namespace firesteel::kernels {

/// out[i] = x[i] / sqrt(mean(x²) + eps) · (1 + weight[i]).
void RmsNorm(const float* x, const float* weight, float eps, size_t n, float* out);

/// inout[i] += RmsNorm(x)[i]: the residual connection behind a sandwich norm.
void RmsNormAdd(const float* x, const float* weight, float eps, size_t n, float* inout);

/// inout[i] += x[i].
void Add(const float* x, size_t n, float* inout);

/// Rotates the pairs (x[i], x[i + dim/2]) by the angles whose cosines and sines are given, [dim/2]
/// each.
void Rope(const float* cosines, const float* sines, size_t dim, float* x);

/// out[i] = gelu_tanh(x[i]) · factor[i]: the gated product of an FFN. gelu_tanh(x) = x/2 · (1 +
/// tanh(√(2/π)(x + 0.044715x³))).
void GeluMul(const float* x, const float* factor, size_t n, float* out);

/// out[i] = cap · tanh(scale · x[i] / cap); out = scale · x where cap is 0.
void ScaleSoftCap(const float* x, float scale, float cap, size_t n, float* out);

/// out[i] = ln(1 + e^x[i]), without overflow.
void Softplus(const float* x, size_t n, float* out);

/// out = e^(x − max x) / Σ e^(x − max x); n ≥ 1.
void Softmax(const float* x, size_t n, float* out);

}  // namespace firesteel::kernels

#endif  // FIRESTEEL_KERNELS_ELEMENTWISE_H_
