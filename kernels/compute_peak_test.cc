#include "kernels/compute_peak.h"

#include "kernels/test_util.h"

namespace firesteel::kernels {
namespace {

class ComputePeakTest : public SimdTest {};
FIRESTEEL_FOR_EACH_SIMD_TARGET(ComputePeakTest);

// Each chain goes to the fixed point of s = s / 2 + 1, wherever it starts; two operations a lane
// and chain, and 2 is what each holds in the end.
TEST_P(ComputePeakTest, DoesWhatItCounts) {
  float values[3] = {0.5f, 1.0f, 7.0f};
  const double one_round = MultiplyAdds(1, values);
  EXPECT_GE(one_round, 2.0 * 12.0);
  EXPECT_EQ(MultiplyAdds(200, values), 200 * one_round);
  EXPECT_FLOAT_EQ(values[2], static_cast<float>(one_round));
}

}  // namespace
}  // namespace firesteel::kernels
