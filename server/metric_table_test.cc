#include "server/metric_table.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_join.h"
#include "server/fake_engine.h"
#include "server/grpc_metrics.h"
#include "server/metrics.h"
#include "server/process_metrics.h"

namespace firesteel::server {
namespace {

std::string ReadFile(const std::string& path) {
  std::ifstream file(path);
  return std::string(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

// All families as a server exposes them.
std::map<std::string, prometheus::MetricFamily> Exposed(const ServerMetrics& metrics) {
  std::map<std::string, prometheus::MetricFamily> families;
  for (auto& family : metrics.registry()->Collect()) families[family.name] = family;
  for (auto& family : ProcessMetrics().Collect()) families[family.name] = family;
  return families;
}

TEST(MetricTableTest, TheTableIsWhatIsExposed) {
  ServerMetrics metrics;
  const auto model = metrics.AddModel("m", FakeModelConfig());
  model->SetBuildInfo("1", "AVX2", "bf16");
  GrpcMetrics grpc(metrics.registry().get(), &metrics.buckets());
  grpc.AddMethod("service", "method");
  auto families = Exposed(metrics);
  for (const MetricDescription& metric : MetricTable()) {
    const auto found = families.find(metric.name);
    ASSERT_NE(found, families.end()) << metric.name;
    EXPECT_EQ(found->second.help, metric.help) << metric.name;
    EXPECT_EQ(found->second.type, metric.type) << metric.name;
    ASSERT_FALSE(found->second.metric.empty()) << metric.name;
    std::set<std::string> labels;
    for (const auto& label : found->second.metric.front().label) labels.insert(label.name);
    EXPECT_EQ(absl::StrJoin(labels, ","), metric.labels) << metric.name;
    families.erase(found);
  }
  for (const auto& [name, family] : families) ADD_FAILURE() << name << " is not in the table";
}

TEST(MetricTableTest, EveryNameIsThereOnceAndSaysItsUnit) {
  std::set<std::string> names;
  for (const MetricDescription& metric : MetricTable()) {
    const std::string name = metric.name;
    EXPECT_TRUE(names.insert(name).second) << name;
    const auto ends = [&name](const std::string& end) {
      return name.size() > end.size() && name.substr(name.size() - end.size()) == end;
    };
    EXPECT_EQ(ends("_total"), metric.type == prometheus::MetricType::Counter) << name;
    EXPECT_EQ(ends("_seconds") && metric.type == prometheus::MetricType::Histogram,
              metric.buckets == BucketKind::kLatency)
        << name;
    EXPECT_EQ(metric.buckets == BucketKind::kNone, metric.type != prometheus::MetricType::Histogram)
        << name;
    EXPECT_EQ(std::string(metric.help).back(), '.') << name;
  }
}

TEST(MetricTableTest, BucketsAreThoseThatWereAskedFor) {
  MetricBuckets buckets;
  buckets.latency = {0.25, 7};
  buckets.count = {3};
  ServerMetrics metrics(buckets);
  const auto model = metrics.AddModel("m", FakeModelConfig());
  const auto families = Exposed(metrics);
  const auto bounds = [&families](const std::string& name) {
    std::vector<double> upper;
    for (const auto& bucket : families.at(name).metric.front().histogram.bucket) {
      upper.push_back(bucket.upper_bound);
    }
    upper.pop_back();  // +Inf
    return upper;
  };
  EXPECT_EQ(bounds("firesteel_inter_token_latency_seconds"), buckets.latency);
  EXPECT_EQ(bounds("firesteel_batch_size"), buckets.count);
  EXPECT_EQ(bounds("firesteel_ffn_active_fraction"), MetricBuckets().fraction);
}

TEST(MetricTableTest, DocumentIsTheTables) {
  const std::string path = FIRESTEEL_SOURCE_DIR "/docs/metrics.md";
  if (std::getenv("FIRESTEEL_WRITE_DOCS") != nullptr) std::ofstream(path) << MetricsDocument();
  EXPECT_EQ(ReadFile(path), MetricsDocument())
      << "write it anew: FIRESTEEL_WRITE_DOCS=1 make test TESTS=MetricTableTest";
}

}  // namespace
}  // namespace firesteel::server
