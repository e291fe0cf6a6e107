// Every metric family of the server in one table: what it is called, what it means, how its
// histograms are cut. The families are made from it, and docs/metrics.md is written from it.

#ifndef FIRESTEEL_SERVER_METRIC_TABLE_H_
#define FIRESTEEL_SERVER_METRIC_TABLE_H_

#include <prometheus/metric_type.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace firesteel::server {

/// Upper bounds of the buckets of each kind of histogram. They rise, and are above zero.
struct MetricBuckets {
  // From half a millisecond (a step of a small model) to a minute (a long answer).
  std::vector<double> latency = {0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1,
                                 0.2,    0.5,   1,     2,     5,    10,   20,   60};
  // Finest around the 8% that a Spark model aims at.
  std::vector<double> fraction = {0.02, 0.04, 0.05, 0.06, 0.065, 0.075, 0.08, 0.09,
                                  0.1,  0.12, 0.15, 0.2,  0.3,   0.5,   0.75, 1};
  // Of tokens, positions and sequences.
  std::vector<double> count = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192};
};

/// Which of the bounds a histogram has.
enum class BucketKind : uint8_t { kNone, kLatency, kFraction, kCount };

struct MetricDescription {
  const char* name;
  prometheus::MetricType type;
  const char* labels;  // separated by commas, as the endpoint writes them: by alphabet
  BucketKind buckets;
  const char* help;
};

/// All families, in the order of the documentation.
std::span<const MetricDescription> MetricTable();

/// The family of this name. REQUIRES: it is in the table.
const MetricDescription& DescribeMetric(absl::string_view name);

/// The bounds of a histogram of the table.
const std::vector<double>& BoundsOf(const MetricDescription& metric, const MetricBuckets& buckets);

/// The text of docs/metrics.md.
std::string MetricsDocument();

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_METRIC_TABLE_H_
