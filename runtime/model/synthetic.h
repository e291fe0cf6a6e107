// Models of a given shape with random weights: for benchmarks of shapes whose weights are not at
// hand, and tests.

#ifndef FIRESTEEL_RUNTIME_MODEL_SYNTHETIC_H_
#define FIRESTEEL_RUNTIME_MODEL_SYNTHETIC_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "runtime/checkpoint/weight_source.h"
#include "runtime/checkpoint/weights.h"

namespace firesteel {

/// Names that NamedShape knows.
std::vector<std::string> ShapeNames();

/// The shape "spark-gemma2-2b" or "gemma2-2b" (arXiv 2506.06644, section 4), "spark-stories" or
/// "dense-stories" (the bundled model and its twin). NotFound for other names.
absl::StatusOr<ModelConfig> NamedShape(absl::string_view name);

/// The dense Gemma-2 shape of equal parameter count: no predictors, F two thirds as large.
ModelConfig DenseTwin(const ModelConfig& spark);

/// Weights N(0, 1 / fan_in) from `seed`, norms of 1: activations are near-Gaussian, so statistical
/// top-k finds about its target. The same seed gives the same weights.
std::shared_ptr<const ModelWeights> MakeSyntheticWeights(const ModelConfig& config,
                                                         const WeightTypes& types, uint64_t seed);

/// The same weights part by part, each made by `threads` threads when it is asked for. The bits
/// don't depend on `threads`.
std::unique_ptr<WeightSource> MakeSyntheticSource(const ModelConfig& config,
                                                  const WeightTypes& types, uint64_t seed,
                                                  size_t threads);

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_MODEL_SYNTHETIC_H_
