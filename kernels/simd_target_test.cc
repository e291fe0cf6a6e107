#include "kernels/simd_target.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace firesteel::kernels {
namespace {

TEST(SimdTargetTest, StartsOnTheBestTarget) {
  const auto names = AvailableSimdTargets();
  ASSERT_FALSE(names.empty());
  EXPECT_EQ(SimdTargetName(), names.front());
}

TEST(SimdTargetTest, LeavesOutTargetsThatAreNotBuilt) {
  EXPECT_THAT(AvailableSimdTargets(), ::testing::Not(::testing::Contains("SSSE3")));
}

TEST(SimdTargetTest, ForcesEachAvailableTarget) {
  const auto names = AvailableSimdTargets();
  for (const auto& name : names) {
    EXPECT_TRUE(ForceSimdTarget(name));
    EXPECT_EQ(SimdTargetName(), name);
    EXPECT_EQ(AvailableSimdTargets(), names);
  }
  EXPECT_TRUE(ForceSimdTarget(names.front()));
}

TEST(SimdTargetTest, RefusesOthers) {
  const std::string before = SimdTargetName();
  for (const char* name : {"", "avx2", "AVX9000", "SSSE3"})
    EXPECT_FALSE(ForceSimdTarget(name)) << name;
  EXPECT_EQ(SimdTargetName(), before);
}

}  // namespace
}  // namespace firesteel::kernels
