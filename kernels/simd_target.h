// Which SIMD target the kernels run on.

#ifndef FIRESTEEL_KERNELS_SIMD_TARGET_H_
#define FIRESTEEL_KERNELS_SIMD_TARGET_H_

#include <string>
#include <vector>

namespace firesteel::kernels {

/// Name of the target that kernels run on, e.g. "AVX3_SPR", "AVX2", "NEON".
std::string SimdTargetName();

/// Names of the targets that this CPU and this build have, best first.
std::vector<std::string> AvailableSimdTargets();

/// Restricts the kernels to one available target; false if `name` is not available. Call it before
/// any kernel runs (environment variable FIRESTEEL_SIMD_TARGET of the programs). Not thread-safe.
bool ForceSimdTarget(const std::string& name);

}  // namespace firesteel::kernels

#endif  // FIRESTEEL_KERNELS_SIMD_TARGET_H_
