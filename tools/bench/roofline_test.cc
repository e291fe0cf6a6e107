#include "tools/bench/roofline.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace firesteel::bench {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

Report SomeReport() {
  Report report;
  report.cpu = "A <CPU> & more";
  report.threads = 2;
  report.memory = {{30, 20}};
  report.compute_speed = {400, 0};
  // 1 FLOP for each byte, 20 GFLOP/s: two thirds of what 30 GB/s allow.
  const Sample decode{.tokens_per_second = 10, .flops_per_token = 2e9, .bytes_per_token = 2e9};
  report.series.push_back({{.threads = 2, .batch = 1, .context = 32}, true, "int8", {decode}});
  return report;
}

TEST(Roofline, PutsTheDotWhereItsNumbersAre) {
  // Axes: 0.1 to 100 FLOP/byte over 530 pixels, 10 to 1000 GFLOP/s over 420.
  const std::string svg = ToRoofline(SomeReport());
  EXPECT_THAT(svg, HasSubstr("<circle cx='246.7' cy='396.8' r='4'"));
  EXPECT_THAT(svg, HasSubstr("1  Spark int8, decode, batch 1, context 32, 2 threads"));
  EXPECT_THAT(svg, HasSubstr("f32 vectors, 400 GFLOP/s"));
  EXPECT_THAT(svg, Not(HasSubstr("matrix units")));
}

TEST(Roofline, EscapesNames) {
  EXPECT_THAT(ToRoofline(SomeReport()), HasSubstr("A &lt;CPU> &amp; more"));
}

TEST(Roofline, HasTheMatrixUnitsRoofWhereThereAreSome) {
  Report report = SomeReport();
  report.compute_speed.bf16 = 2000;
  EXPECT_THAT(ToRoofline(report), HasSubstr("2000 GFLOP/s"));
}

}  // namespace
}  // namespace firesteel::bench
