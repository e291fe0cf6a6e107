// The process_* families that dashboards expect of every exporter, read from /proc at each scrape.

#ifndef FIRESTEEL_SERVER_PROCESS_METRICS_H_
#define FIRESTEEL_SERVER_PROCESS_METRICS_H_

#include <prometheus/collectable.h>

#include <string>
#include <vector>

namespace firesteel::server {

/// CPU time, resident and virtual memory, open and allowed file descriptors, start time, threads.
/// What cannot be read is left out. Thread-safe.
class ProcessMetrics final : public prometheus::Collectable {
 public:
  /// `proc`: where /proc is, for tests.
  explicit ProcessMetrics(std::string proc = "/proc") : proc_(std::move(proc)) {}

  std::vector<prometheus::MetricFamily> Collect() const override;

 private:
  const std::string proc_;
};

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_PROCESS_METRICS_H_
