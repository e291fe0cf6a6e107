// Statistical top-k (arXiv 2506.06644, section 3): about k of n near-Gaussian scores exceed
// θ = mean + std · Q(1 − k/n), found in one pass and without a sort.

#ifndef FIRESTEEL_KERNELS_STATISTICAL_TOPK_H_
#define FIRESTEEL_KERNELS_STATISTICAL_TOPK_H_

#include <cstddef>
#include <cstdint>

namespace firesteel::kernels {

/// Quantile of the standard normal, 0 < p < 1 (NaN outside), to about 1e-15.
double NormalQuantile(double p);

/// θ of n ≥ 2 scores for a precomputed quantile = NormalQuantile(1 − k/n): mean + std · quantile,
/// std with divisor n − 1. Moments are accumulated in double about scores[0], so that equal scores
/// give a std of exactly 0. NaN if a score is not finite.
double StatisticalThreshold(const float* scores, size_t n, double quantile);

/// Writes the indices i of scores[i] > theta (strictly, compared as reals) in rising order, and
/// excess[j] = scores[indices[j]] − theta > 0 (the soft threshold). Both outputs need room for
/// n + kCompactionSlack elements; excess may be null. Returns how many survived; 0 for a NaN theta.
size_t CompactAbove(const float* scores, size_t n, double theta, uint32_t* indices, float* excess);

/// Elements past the last survivor that CompactAbove may overwrite.
inline constexpr size_t kCompactionSlack = 64;

}  // namespace firesteel::kernels

#endif  // FIRESTEEL_KERNELS_STATISTICAL_TOPK_H_
