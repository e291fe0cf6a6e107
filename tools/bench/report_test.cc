#include "tools/bench/report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

namespace firesteel::bench {
namespace {

// A run that had half of the machine's memory to itself is no worse for it.
TEST(Report, SpeedsAreComparedWithTheMemoryBesideThem) {
  Report report;
  report.threads = 2;
  report.memory = {{30, 20}, {15, 10}};
  // 2 GB a token, a quarter of it row by row: 62.5 ms at 30 and 20 GB/s.
  Sample run{.bytes_per_token = 2e9, .scattered_per_token = 0.5e9};
  Series series{{.threads = 2, .batch = 1, .context = 32}, true, "int8", {}};
  for (const double speed : {10, 5}) {
    run.tokens_per_second = speed;
    run.cpu_seconds_per_token = 1 / speed;
    series.runs.push_back(run);
  }
  report.series.push_back(series);
  const auto json = nlohmann::json::parse(ToJson(report));
  EXPECT_NEAR(json["results"][0]["bandwidth_fraction"].get<double>(), 2.0 / 3, 1e-9);
  EXPECT_NEAR(json["results"][0]["floor_fraction"].get<double>(), 0.75, 1e-9);
  EXPECT_NEAR(json["machine"]["read_bandwidth_gbps"].get<double>(), 22.5, 1e-9);
  const auto& runs = json["results"][0]["runs"];  // in their order, for who measures in turns
  ASSERT_EQ(runs.size(), 2u);
  EXPECT_EQ(runs[0]["tokens_per_second"], 10);
  EXPECT_EQ(runs[1]["tokens_per_second"], 5);
  EXPECT_EQ(runs[0]["cpu_seconds_per_token"], 0.1);
  EXPECT_EQ(runs[1]["cpu_seconds_per_token"], 0.2);
}

TEST(Report, SamplingStandsBesideThePhasesOfTheModel) {
  Report report;
  report.memory = {{30, 20}};
  Sample run{.tokens_per_second = 10, .sampling_seconds = 0.25e-3};
  run.phase_seconds[static_cast<size_t>(Phase::kHead)] = 2e-3;
  report.series.push_back({{.batch = 1, .context = 32}, true, "int8", {run}});
  const auto json = nlohmann::json::parse(ToJson(report));
  const auto& phases = json["results"][0]["phase_milliseconds_per_token"];
  EXPECT_EQ(phases.size(), kNumPhases + 1);
  EXPECT_NEAR(phases["head"].get<double>(), 2.0, 1e-9);
  EXPECT_NEAR(phases["sampling"].get<double>(), 0.25, 1e-9);
  const std::string table = ToTable(report);
  EXPECT_THAT(table, ::testing::HasSubstr("| rest | head | sampling |\n|---|"));
  EXPECT_THAT(table, ::testing::HasSubstr(" 2.000 | 0.250 |\n"));
}

}  // namespace
}  // namespace firesteel::bench
