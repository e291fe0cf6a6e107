#include "tools/client/load_report.h"

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace firesteel::client {
namespace {

using ::testing::ContainsRegex;
using ::testing::HasSubstr;
using ::testing::Not;

// Due at `due`, its first token `ttft` later, then tokens every `itl` seconds, ended with the last.
LoadRecord Succeeded(double due, double ttft, double itl, uint32_t tokens) {
  LoadRecord record;
  record.due = due;
  record.first = due + ttft;
  record.inter_token.assign(tokens - 1, static_cast<float>(itl));
  record.end = record.first + itl * (tokens - 1);
  record.generated_tokens = tokens;
  record.prompt_tokens = 4;
  record.finish_reason = v1::FINISH_REASON_LENGTH;
  return record;
}

LoadRecord Failed(double due, grpc::StatusCode code, std::string message, double took = 0) {
  LoadRecord record;
  record.due = due;
  record.end = due + took;
  record.code = code;
  record.message = std::move(message);
  return record;
}

TEST(LoadReportTest, QuantilesAreNearestRanks) {
  std::vector<double> values;
  for (int i = 100; i >= 1; --i) values.push_back(i);
  const LoadDistribution d = Distribute(values);
  EXPECT_EQ(d.count, 100u);
  EXPECT_EQ(d.mean, 50.5);
  EXPECT_EQ(d.min, 1);
  EXPECT_EQ(d.p50, 50);
  EXPECT_EQ(d.p90, 90);
  EXPECT_EQ(d.p99, 99);
  EXPECT_EQ(d.max, 100);
  ASSERT_EQ(d.quantiles.size(), 101u);
  EXPECT_EQ(d.quantiles[0], 1);
  EXPECT_EQ(d.quantiles[37], 37);
  EXPECT_EQ(d.quantiles[100], 100);
}

TEST(LoadReportTest, OneValueIsEveryQuantile) {
  std::vector<double> values = {3};
  const LoadDistribution d = Distribute(values);
  EXPECT_EQ(d.p50, 3);
  EXPECT_EQ(d.p99, 3);
}

TEST(LoadReportTest, NothingMeasuredIsAllZero) {
  const LoadSummary summary = Summarize({}, {});
  EXPECT_EQ(summary.requests, 0u);
  EXPECT_EQ(summary.PerSecond(7), 0);
  EXPECT_EQ(summary.ttft.count, 0u);
  EXPECT_THAT(LoadTable({}, summary), HasSubstr("0 requests"));
}

TEST(LoadReportTest, RatesAreOverTheMeasuredTime) {
  std::vector<LoadRecord> records = {Succeeded(0, 0.1, 0.1, 10), Succeeded(2, 0.1, 0.1, 10),
                                     Succeeded(5, 0.1, 0.1, 10)};
  records[0].measured = false;
  const LoadSummary summary = Summarize(records, {});
  EXPECT_EQ(summary.warm_up, 1u);
  EXPECT_EQ(summary.requests, 2u);
  EXPECT_DOUBLE_EQ(summary.seconds, 4);  // from 2 to 6
  EXPECT_EQ(summary.generated_tokens, 20u);
  EXPECT_EQ(summary.prompt_tokens, 8u);
  EXPECT_DOUBLE_EQ(summary.PerSecond(20), 5);
  EXPECT_EQ(summary.itl.count, 18u);
  EXPECT_NEAR(summary.ttft.p50, 0.1, 1e-9);
  EXPECT_NEAR(summary.e2e.p50, 1.0, 1e-6);
  ASSERT_EQ(summary.timeline.size(), 7u);  // the warm-up, too
  EXPECT_EQ(summary.timeline[0].due, 1u);
  EXPECT_EQ(summary.timeline[1].tokens, 10u);
  EXPECT_EQ(summary.timeline[6].succeeded, 1u);
}

TEST(LoadReportTest, GoodputCountsThoseWithinAllObjectives) {
  const std::vector<LoadRecord> records = {
      Succeeded(0, 0.1, 0.01, 11), Succeeded(0, 0.3, 0.01, 11), Succeeded(0, 0.1, 0.03, 11),
      Succeeded(0, 0.1, 0.01, 100), Failed(0, grpc::StatusCode::UNAVAILABLE, "draining")};
  EXPECT_EQ(Summarize(records, {}).within_objectives, 4u);
  EXPECT_EQ(Summarize(records, {.ttft = 0.2, .itl = {}, .e2e = {}}).within_objectives, 3u);
  EXPECT_EQ(Summarize(records, {.ttft = {}, .itl = 0.02, .e2e = {}}).within_objectives, 3u);
  EXPECT_EQ(Summarize(records, {.ttft = {}, .itl = {}, .e2e = 0.5}).within_objectives, 3u);
  EXPECT_EQ(Summarize(records, {.ttft = 0.2, .itl = 0.02, .e2e = 0.5}).within_objectives, 1u);
}

TEST(LoadReportTest, FailuresAreCountedByCodeAndLeftOutOfLatencies) {
  std::vector<LoadRecord> records = {Succeeded(0, 0.1, 0.1, 2),
                                     Failed(0, grpc::StatusCode::UNAVAILABLE, "first", 0.002),
                                     Failed(1, grpc::StatusCode::UNAVAILABLE, "second", 0.006),
                                     Failed(0, grpc::StatusCode::RESOURCE_EXHAUSTED, "queue"),
                                     Failed(0, grpc::StatusCode::RESOURCE_EXHAUSTED, "open")};
  records.back().not_sent = true;
  const LoadSummary summary = Summarize(records, {});
  EXPECT_EQ(summary.succeeded, 1u);
  EXPECT_EQ(summary.e2e.count, 1u);
  ASSERT_EQ(summary.errors.size(), 3u);
  EXPECT_EQ(summary.errors.at("UNAVAILABLE").count, 2u);
  EXPECT_EQ(summary.errors.at("UNAVAILABLE").example, "first");
  EXPECT_DOUBLE_EQ(summary.errors.at("UNAVAILABLE").latency.p50, 0.002);
  EXPECT_NEAR(summary.errors.at("UNAVAILABLE").latency.max, 0.006, 1e-9);
  EXPECT_EQ(summary.errors.at("NOT_SENT").count, 1u);
  EXPECT_EQ(summary.errors.at("NOT_SENT").latency.count, 0u);
  EXPECT_THAT(LoadTable({}, summary), HasSubstr("failed with UNAVAILABLE: 2, e.g. first\n"));
  EXPECT_THAT(LoadTable({}, summary),
              ContainsRegex("\nUNAVAILABLE +4[.0]* ms +2[.0]* ms +6[.0]* ms"));
  const auto json = nlohmann::json::parse(LoadJson({}, summary));
  EXPECT_NEAR(json["errors"]["UNAVAILABLE"]["latency_seconds"]["p99"], 0.006, 1e-9);
}

TEST(LoadReportTest, SparsityIsWeightedByTokens) {
  LoadRecord small = Succeeded(0, 0.1, 0.1, 6);  // 10 tokens with its prompt
  LoadRecord large = Succeeded(0, 0.1, 0.1, 26);
  small.ffn_active_fraction = 0.5;
  large.ffn_active_fraction = 0.1;
  large.attended_positions = 8;
  const LoadSummary summary = Summarize({small, large}, {});
  EXPECT_DOUBLE_EQ(summary.ffn_active_fraction, 0.2);
  EXPECT_DOUBLE_EQ(summary.attended_positions, 6);
}

TEST(LoadReportTest, JsonHasEveryFigure) {
  const LoadSetup setup = {.target = "localhost:1",
                           .model = "m",
                           .arrivals = "closed loop, 2 at once",
                           .warm_up_seconds = 1,
                           .max_tokens = 8,
                           .objectives = {.ttft = 0.2, .itl = {}, .e2e = {}}};
  const auto json = nlohmann::json::parse(
      LoadJson(setup, Summarize({Succeeded(0, 0.1, 0.1, 11)}, setup.objectives)));
  EXPECT_EQ(json["setup"]["objectives"]["ttft_seconds"], 0.2);
  EXPECT_EQ(json["requests"]["succeeded"], 1);
  EXPECT_EQ(json["goodput"]["within_objectives"], 1);
  EXPECT_EQ(json["tokens"]["generated"], 11);
  EXPECT_NEAR(json["inter_token_latency_seconds"]["p99"], 0.1, 1e-6);
  EXPECT_EQ(json["finish_reasons"]["length"], 1);
  EXPECT_EQ(json["timeline"].size(), 2u);
}

TEST(LoadReportTest, PageHoldsTheReportWhateverServersSay) {
  const LoadSummary summary =
      Summarize({Failed(0, grpc::StatusCode::UNKNOWN, "</script><b>\xff")}, {});
  const std::string page = LoadHtml({}, summary);
  EXPECT_THAT(page, Not(HasSubstr("</script><b>")));
  EXPECT_THAT(page, HasSubstr("\\u003c/script>\\u003cb>") /* '>' alone ends nothing */);
  // Nothing is fetched from elsewhere; the SVG name space is a name, not an address.
  EXPECT_THAT(page, Not(HasSubstr("https://")));
  EXPECT_THAT(page, Not(HasSubstr("src=")));
  // What a browser's JSON parser would get is the report.
  const std::string open = "id=\"report\">";
  const size_t begin = page.find(open) + open.size();
  const auto json =
      nlohmann::json::parse(page.substr(begin, page.find("</script>", begin) - begin));
  EXPECT_EQ(json["errors"]["UNKNOWN"]["count"], 1);
}

}  // namespace
}  // namespace firesteel::client
