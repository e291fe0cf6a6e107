#include "server/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <malloc.h>

#include <cmath>
#include <map>
#include <regex>

#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "server/fake_engine.h"
#include "server/metrics_endpoint.h"
#include "server/process_metrics.h"

namespace firesteel::server {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::Not;

class MetricsTest : public testing::Test {
 protected:
  MetricsTest() : model_(metrics_.AddModel("m", FakeModelConfig())) { model_->StartCounting(); }

  std::string Text() const { return ExpositionText({metrics_.registry()}); }
  std::vector<std::string> Lines() const { return absl::StrSplit(Text(), '\n'); }

  ServerMetrics metrics_;
  const std::unique_ptr<EngineMetrics> model_;
};

// A step of two rows in a model of two layers, F 100, two heads, top-k 8.
void ReportStep(EngineMetrics* metrics) {
  const RowActivity rows[2][2] = {{{.ffn_active = 8, .attended = 6, .visible = 6},
                                   {.ffn_active = 4, .attended = 20, .visible = 100}},
                                  {{.ffn_active = 100, .attended = 2, .visible = 1},
                                   {.ffn_active = 16, .attended = 2, .visible = 2}}};
  const LayerActivity layers[2] = {{.rows = rows[0], .ffn_union = 10},
                                   {.rows = rows[1], .ffn_union = 100}};
  const absl::Duration itl[] = {absl::Milliseconds(3)};
  const absl::Duration ttft[] = {absl::Milliseconds(30)};
  StepReport report;
  report.phase = StepPhase::kMixed;
  report.duration = absl::Milliseconds(4);
  report.sequences = 2;
  report.prefill_tokens = 1;
  report.decode_tokens = 1;
  report.prefix_cache_queries = 40;
  report.prefix_cache_hits = 32;
  report.preemptions = 3;
  report.layers = layers;
  report.inter_token_latencies = itl;
  report.times_to_first_token = ttft;
  report.flops_performed = 1000;
  report.flops_skipped = 3000;
  report.weight_bytes_read = 50;
  report.weight_bytes_skipped = 150;
  metrics->OnStep(report);
}

TEST_F(MetricsTest, LabelValuesAreThereFromTheStart) {
  const std::string text = Text();
  for (const char* reason : {"length", "eos", "stop", "cancelled", "deadline_exceeded", "error"}) {
    EXPECT_THAT(text, HasSubstr("firesteel_requests_total{finish_reason=\"" + std::string(reason) +
                                "\",model_name=\"m\"} 0\n"));
  }
  for (const char* reason : {"queue_full", "queue_tokens", "kv_cache", "draining"}) {
    EXPECT_THAT(text, HasSubstr("firesteel_admission_rejections_total{model_name=\"m\",reason=\"" +
                                std::string(reason) + "\"} 0\n"));
  }
}

TEST_F(MetricsTest, StepCounts) {
  ReportStep(model_.get());
  const auto lines = Lines();
  EXPECT_THAT(lines, Contains("firesteel_prompt_tokens_total{model_name=\"m\"} 1"));
  EXPECT_THAT(lines, Contains("firesteel_generation_tokens_total{model_name=\"m\"} 2"));
  EXPECT_THAT(lines, Contains("firesteel_prompt_tokens_cached_total{model_name=\"m\"} 32"));
  EXPECT_THAT(lines, Contains("firesteel_prefix_cache_queries_total{model_name=\"m\"} 40"));
  EXPECT_THAT(lines, Contains("firesteel_prefix_cache_hits_total{model_name=\"m\"} 32"));
  EXPECT_THAT(lines, Contains("firesteel_preemptions_total{model_name=\"m\"} 3"));
  EXPECT_THAT(lines, Contains("firesteel_flops_total{kind=\"performed\",model_name=\"m\"} 1000"));
  EXPECT_THAT(lines, Contains("firesteel_flops_total{kind=\"skipped\",model_name=\"m\"} 3000"));
  EXPECT_THAT(lines, Contains("firesteel_weight_bytes_total{kind=\"read\",model_name=\"m\"} 50"));
  EXPECT_THAT(lines,
              Contains("firesteel_weight_bytes_total{kind=\"skipped\",model_name=\"m\"} 150"));
  EXPECT_THAT(lines, Contains("firesteel_batch_size_sum{model_name=\"m\"} 2"));
  EXPECT_THAT(lines, Contains("firesteel_iteration_tokens_sum{model_name=\"m\"} 2"));
  EXPECT_THAT(
      lines, Contains("firesteel_step_duration_seconds_count{model_name=\"m\",phase=\"mixed\"} 1"));
  EXPECT_THAT(
      lines,
      Contains("firesteel_step_duration_seconds_count{model_name=\"m\",phase=\"decode\"} 0"));
  EXPECT_THAT(
      lines,
      Contains("firesteel_inter_token_latency_seconds_bucket{model_name=\"m\",le=\"0.005\"} 1"));
  EXPECT_THAT(
      lines,
      Contains("firesteel_inter_token_latency_seconds_bucket{model_name=\"m\",le=\"0.002\"} 0"));
  EXPECT_THAT(lines, Contains("firesteel_time_to_first_token_seconds_sum{model_name=\"m\"} 0.03"));
}

TEST_F(MetricsTest, SparsityIsCountedByLayer) {
  ReportStep(model_.get());
  const auto lines = Lines();
  // Layer 0: 8 and 4 of 100 neurons; an upper bound belongs to its bucket.
  EXPECT_THAT(
      lines,
      Contains("firesteel_ffn_active_fraction_bucket{layer=\"0\",model_name=\"m\",le=\"0.04\"} 1"));
  EXPECT_THAT(
      lines,
      Contains(
          "firesteel_ffn_active_fraction_bucket{layer=\"0\",model_name=\"m\",le=\"0.075\"} 1"));
  EXPECT_THAT(
      lines,
      Contains("firesteel_ffn_active_fraction_bucket{layer=\"0\",model_name=\"m\",le=\"0.08\"} 2"));
  EXPECT_THAT(lines,
              Contains("firesteel_ffn_active_fraction_sum{layer=\"0\",model_name=\"m\"} 0.12"));
  EXPECT_THAT(lines,
              Contains("firesteel_ffn_active_fraction_sum{layer=\"1\",model_name=\"m\"} 1.16"));
  EXPECT_THAT(lines,
              Contains("firesteel_ffn_batch_union_fraction_sum{layer=\"0\",model_name=\"m\"} 0.1"));
  EXPECT_THAT(lines,
              Contains("firesteel_ffn_batch_union_fraction_count{layer=\"1\",model_name=\"m\"} 1"));
  // Layer 0: 6 and 20 positions of two heads, of 6 and 100.
  EXPECT_THAT(
      lines,
      Contains("firesteel_attention_attended_positions_sum{layer=\"0\",model_name=\"m\"} 13"));
  EXPECT_THAT(
      lines,
      Contains("firesteel_attention_attended_fraction_sum{layer=\"0\",model_name=\"m\"} 0.6"));
  // Means of 6 and 58 over a target of 8.
  EXPECT_THAT(lines, Contains("firesteel_ffn_topk_ratio{layer=\"0\",model_name=\"m\"} 0.75"));
  EXPECT_THAT(lines, Contains("firesteel_ffn_topk_ratio{layer=\"1\",model_name=\"m\"} 7.25"));
}

TEST_F(MetricsTest, TopKRatioFollowsSlowly) {
  ReportStep(model_.get());
  RowActivity row{.ffn_active = 16, .attended = 2, .visible = 1};
  const std::vector<RowActivity> rows(1024, row);
  const LayerActivity layers[] = {{.rows = rows, .ffn_union = 16}};
  StepReport report;
  report.prefill_tokens = 1024;
  report.layers = layers;
  model_->OnStep(report);
  std::smatch match;
  const std::string text = Text();
  ASSERT_TRUE(std::regex_search(text, match, std::regex("topk_ratio\\{layer=\"0\".*\\} (.*)\n")));
  EXPECT_NEAR(std::stod(match[1]), 2 - 1.25 / std::exp(1.0), 1e-9) << "one time constant later";
}

TEST_F(MetricsTest, DenseModelHasNoTopKRatio) {
  ServerMetrics metrics;
  ModelConfig dense = FakeModelConfig();
  dense.architecture = Architecture::kGemma2;
  dense.ffn_top_k = 0;
  const auto model = metrics.AddModel("d", dense);
  const std::string text = ExpositionText({metrics.registry()});
  EXPECT_THAT(text, Not(HasSubstr("firesteel_ffn_topk_ratio{")));
  EXPECT_THAT(text, HasSubstr("firesteel_ffn_active_fraction_count{layer=\"1\""));
}

TEST_F(MetricsTest, FinishCounts) {
  const GenerationResult result = FakeResult(FinishReason::kStop, 5);
  model_->OnFinish({result.reason, result.usage, result.timings});
  const auto lines = Lines();
  EXPECT_THAT(lines,
              Contains("firesteel_requests_total{finish_reason=\"stop\",model_name=\"m\"} 1"));
  EXPECT_THAT(lines, Contains("firesteel_e2e_request_latency_seconds_sum{model_name=\"m\"} 0.061"));
  EXPECT_THAT(lines, Contains("firesteel_request_queue_time_seconds_sum{model_name=\"m\"} 0.001"));
  EXPECT_THAT(lines, Contains("firesteel_request_prefill_time_seconds_sum{model_name=\"m\"} 0.02"));
  EXPECT_THAT(lines, Contains("firesteel_request_decode_time_seconds_sum{model_name=\"m\"} 0.04"));
  EXPECT_THAT(lines,
              Contains("firesteel_time_per_output_token_seconds_sum{model_name=\"m\"} 0.01"));
  EXPECT_THAT(lines, Contains("firesteel_request_prompt_tokens_sum{model_name=\"m\"} 4"));
  EXPECT_THAT(lines, Contains("firesteel_request_generation_tokens_sum{model_name=\"m\"} 5"));
}

TEST_F(MetricsTest, RequestThatNeverRanHasOnlyQueueTime) {
  GenerationResult result = FakeResult(FinishReason::kCancelled, 0);
  model_->OnFinish({result.reason, result.usage, result.timings});
  const auto lines = Lines();
  EXPECT_THAT(lines, Contains("firesteel_request_queue_time_seconds_count{model_name=\"m\"} 1"));
  EXPECT_THAT(lines, Contains("firesteel_request_prefill_time_seconds_count{model_name=\"m\"} 0"));
  EXPECT_THAT(lines, Contains("firesteel_time_per_output_token_seconds_count{model_name=\"m\"} 0"));
}

TEST_F(MetricsTest, GaugesAndInfo) {
  model_->OnGauges({.requests_running = 3, .requests_waiting = 4, .kv_usage_ratio = 0.25});
  model_->OnRejected(RejectionReason::kQueueTokens);
  model_->SetKvCapacity(4096);
  model_->SetBuildInfo("1.2.3", "AVX2", "bf16");
  const auto lines = Lines();
  EXPECT_THAT(lines, Contains("firesteel_requests_running{model_name=\"m\"} 3"));
  EXPECT_THAT(lines, Contains("firesteel_requests_waiting{model_name=\"m\"} 4"));
  EXPECT_THAT(lines, Contains("firesteel_kv_cache_usage_ratio{model_name=\"m\"} 0.25"));
  EXPECT_THAT(lines, Contains("firesteel_kv_cache_capacity_tokens{model_name=\"m\"} 4096"));
  EXPECT_THAT(
      lines,
      Contains("firesteel_admission_rejections_total{model_name=\"m\",reason=\"queue_tokens\"} 1"));
  EXPECT_THAT(lines, Contains("firesteel_build_info{model_name=\"m\",simd_target=\"AVX2\",version="
                              "\"1.2.3\",weights=\"bf16\"} 1"));
}

TEST_F(MetricsTest, WarmUpIsNotCounted) {
  const auto cold = metrics_.AddModel("cold", FakeModelConfig());
  ReportStep(cold.get());
  const GenerationResult result = FakeResult(FinishReason::kLength);
  cold->OnFinish({result.reason, result.usage, result.timings});
  const auto lines = Lines();
  EXPECT_THAT(lines,
              Contains("firesteel_requests_total{finish_reason=\"length\",model_name=\"cold\"} 0"));
  EXPECT_THAT(lines, Contains("firesteel_generation_tokens_total{model_name=\"cold\"} 0"));
}

size_t NumSeries(const ServerMetrics& metrics) {
  size_t count = 0;
  for (const auto& family : metrics.registry()->Collect()) count += family.metric.size();
  return count;
}

TEST_F(MetricsTest, SeriesOfAModelGoOnWhenItIsLoadedAnew) {
  ReportStep(model_.get());
  const size_t series = NumSeries(metrics_);
  auto successor = metrics_.AddModel("m", FakeModelConfig());
  EXPECT_EQ(NumSeries(metrics_), series) << "they share them";
  successor->StartCounting();
  ReportStep(successor.get());
  EXPECT_THAT(Lines(), Contains("firesteel_generation_tokens_total{model_name=\"m\"} 4"));
  successor.reset();
  EXPECT_THAT(Lines(), Contains("firesteel_generation_tokens_total{model_name=\"m\"} 4"))
      << "who came first still counts into them";
}

TEST_F(MetricsTest, LoadsLeaveNothingBehind) {
  const size_t series = NumSeries(metrics_);
  const auto load = [this](int times) {
    for (int i = 0; i < times; ++i) {
      const auto reloaded = metrics_.AddModel("m", FakeModelConfig());
      reloaded->SetBuildInfo("1", "AVX2", i % 2 == 0 ? "bf16" : "int8");
      const auto other = metrics_.AddModel("other-" + std::to_string(i), FakeModelConfig());
      ReportStep(other.get());
    }
  };
  load(100);  // allocators keep some memory for next time
  const size_t before = mallinfo2().uordblks;
  load(1000);
  EXPECT_EQ(NumSeries(metrics_), series);
  EXPECT_LT(mallinfo2().uordblks, before + (64u << 10));
  EXPECT_THAT(Text(), Not(HasSubstr("other-")));
  EXPECT_THAT(Text(), Not(HasSubstr("firesteel_build_info{")));
}

TEST_F(MetricsTest, EveryFamilyHasPrefixHelpAndType) {
  model_->SetBuildInfo("1.2.3", "AVX2", "bf16");
  int families = 0;
  for (const auto& family : metrics_.registry()->Collect()) {
    ++families;
    EXPECT_EQ(family.name.rfind("firesteel_", 0), 0u) << family.name;
    EXPECT_GT(family.help.size(), 10u) << family.name;
  }
  EXPECT_EQ(families, 32);
}

TEST_F(MetricsTest, BucketBoundsArePlainNumbers) {
  const std::string text = Text();
  const std::regex bound("le=\"([^\"]*)\"");
  int count = 0;
  for (std::sregex_iterator it(text.begin(), text.end(), bound), end; it != end; ++it, ++count) {
    EXPECT_LE((*it)[1].length(), 6) << (*it)[1];
  }
  EXPECT_GT(count, 100);
}

TEST(HistogramBatchTest, AgreesWithOneByOne) {
  const std::vector<double> bounds = {0.1, 0.5, 1};
  prometheus::Histogram one(bounds);
  prometheus::Histogram many(bounds);
  HistogramBatch batch(&many, bounds);
  for (const double value : {0.0, 0.1, 0.1000001, 0.5, 0.7, 1.0, 7.0}) {
    one.Observe(value);
    batch.Add(value);
  }
  batch.Flush();
  batch.Flush();
  one.Observe(0.3);
  batch.Add(0.3);
  batch.Flush();
  const auto expected = one.Collect().histogram;
  const auto actual = many.Collect().histogram;
  EXPECT_EQ(actual.sample_count, expected.sample_count);
  EXPECT_DOUBLE_EQ(actual.sample_sum, expected.sample_sum);
  ASSERT_EQ(actual.bucket.size(), expected.bucket.size());
  for (size_t i = 0; i < expected.bucket.size(); ++i) {
    EXPECT_EQ(actual.bucket[i].cumulative_count, expected.bucket[i].cumulative_count) << i;
  }
}

TEST(ProcessMetricsTest, TellsOfThisProcess) {
  std::map<std::string, double> values;
  for (const auto& family : ProcessMetrics().Collect()) {
    ASSERT_EQ(family.metric.size(), 1u);
    const auto& metric = family.metric.front();
    values[family.name] =
        family.type == prometheus::MetricType::Counter ? metric.counter.value : metric.gauge.value;
  }
  EXPECT_GT(values["process_resident_memory_bytes"], 1e6);
  EXPECT_GT(values["process_virtual_memory_bytes"], values["process_resident_memory_bytes"]);
  EXPECT_GE(values["process_threads"], 1);
  EXPECT_GE(values["process_open_fds"], 3);
  EXPECT_GE(values["process_max_fds"], values["process_open_fds"]);
  EXPECT_TRUE(values.contains("process_cpu_seconds_total"));
  EXPECT_NEAR(values["process_start_time_seconds"], absl::ToUnixSeconds(absl::Now()), 86400);
}

TEST(ProcessMetricsTest, LeavesOutWhatCannotBeRead) {
  const auto families = ProcessMetrics("/nowhere").Collect();
  ASSERT_EQ(families.size(), 1u);
  EXPECT_EQ(families.front().name, "process_max_fds");
}

}  // namespace
}  // namespace firesteel::server
