#include "kernels/simd_target.h"

#include <cstdint>

#include "hwy/highway.h"
#include "hwy/targets.h"

namespace firesteel::kernels {
namespace {

std::vector<int64_t> AvailableTargets() {
  static const std::vector<int64_t> targets = hwy::SupportedAndGeneratedTargets();
  return targets;
}

}  // namespace

std::string SimdTargetName() {
  // Best first: a lower bit is a better target.
  return hwy::TargetName(hwy::SupportedAndGeneratedTargets().front());
}

std::vector<std::string> AvailableSimdTargets() {
  std::vector<std::string> names;
  for (const int64_t target : AvailableTargets()) names.emplace_back(hwy::TargetName(target));
  return names;
}

bool ForceSimdTarget(const std::string& name) {
  for (const int64_t target : AvailableTargets()) {
    if (name != hwy::TargetName(target)) continue;
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    return true;
  }
  return false;
}

}  // namespace firesteel::kernels
