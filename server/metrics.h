// What the engines report, counted for Prometheus.

#ifndef FIRESTEEL_SERVER_METRICS_H_
#define FIRESTEEL_SERVER_METRICS_H_

#include <prometheus/counter.h>
#include <prometheus/family.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "runtime/checkpoint/model_config.h"
#include "runtime/scheduler/observer.h"
#include "server/metric_table.h"

namespace firesteel::server {

/// Collects many values of one histogram and hands them over in one go: a step has thousands of
/// rows, and each prometheus::Histogram::Observe takes a lock. Not thread-safe.
class HistogramBatch {
 public:
  /// `histogram` outlives it and was made with these upper bounds, which rise.
  HistogramBatch(prometheus::Histogram* histogram, const std::vector<double>& bounds);

  void Add(double value);
  /// Hands over and starts anew; nothing where nothing was added.
  void Flush();

 private:
  prometheus::Histogram* const histogram_;
  const std::vector<double> bounds_;
  std::vector<double> counts_;  // [bounds + 1]
  double sum_ = 0;
  size_t size_ = 0;
};

class EngineMetrics;

/// Every family of the engines, in one registry. Thread-safe. The registry can be given to a
/// MetricsEndpoint.
class ServerMetrics {
 public:
  explicit ServerMetrics(const MetricBuckets& buckets = {});
  ~ServerMetrics();
  ServerMetrics(const ServerMetrics&) = delete;
  ServerMetrics& operator=(const ServerMetrics&) = delete;

  /// The observer of one model's engine; every time series that is known by now is there from now
  /// on. Engines of one name count into the same series, so those of a model that is loaded anew go
  /// on; the last one to go takes them away. This object outlives the observer.
  [[nodiscard]] std::unique_ptr<EngineMetrics> AddModel(const std::string& model_name,
                                                        const ModelConfig& config);

  const std::shared_ptr<prometheus::Registry>& registry() const { return registry_; }
  const MetricBuckets& buckets() const { return buckets_; }

 private:
  friend class EngineMetrics;
  struct Families;

  const MetricBuckets buckets_;
  const std::shared_ptr<prometheus::Registry> registry_;
  const std::unique_ptr<Families> families_;
};

/// Counts for one model. OnStep costs some microseconds a layer, and nothing that grows with time.
/// Thread-safe as EngineObserver asks: OnStep and OnFinish from one thread, OnRejected from any.
class EngineMetrics final : public EngineObserver {
 public:
  EngineMetrics(ServerMetrics::Families& families, const std::string& model_name,
                const ModelConfig& config);
  ~EngineMetrics() override;

  void OnRejected(RejectionReason reason) override;
  void OnStep(const StepReport& report) override;
  void OnFinish(const FinishReport& report) override;
  void OnGauges(const EngineGauges& gauges) override;

  /// Until then nothing is counted but gauges: the warm-up is not the clients' work.
  void StartCounting() { counting_.store(true, std::memory_order_release); }

  /// What is known only once the engine stands.
  void SetBuildInfo(const std::string& version, const std::string& simd_target,
                    const std::string& weights);
  void SetKvCapacity(size_t tokens);

 private:
  class OwnSeries;
  struct Layer;
  void CountLayer(const LayerActivity& activity, double keep, Layer* layer);

  ServerMetrics::Families& families_;
  const std::string model_name_;
  const double neurons_;     // F of a layer
  const double heads_;       // H of a layer
  const double ffn_target_;  // k of a layer; 0 in a dense model
  std::atomic<bool> counting_{false};

  const std::unique_ptr<OwnSeries> series_;  // keeps the following

  // Thread-safe themselves.
  prometheus::Gauge& requests_running_;
  prometheus::Gauge& requests_waiting_;
  prometheus::Gauge& kv_usage_;
  prometheus::Gauge& kv_capacity_;
  std::array<prometheus::Counter*, kNumFinishReasons> requests_{};
  std::array<prometheus::Counter*, kNumRejectionReasons> rejections_{};
  prometheus::Counter& prompt_tokens_;
  prometheus::Counter& preemptions_;
  prometheus::Counter& prompt_tokens_cached_;
  prometheus::Counter& prefix_queries_;
  prometheus::Counter& prefix_hits_;
  prometheus::Counter& generation_tokens_;
  prometheus::Counter& flops_performed_;
  prometheus::Counter& flops_skipped_;
  prometheus::Counter& bytes_read_;
  prometheus::Counter& bytes_skipped_;
  prometheus::Histogram& tpot_;
  prometheus::Histogram& e2e_;
  prometheus::Histogram& queue_time_;
  prometheus::Histogram& prefill_time_;
  prometheus::Histogram& decode_time_;
  prometheus::Histogram& prompt_length_;
  prometheus::Histogram& generation_length_;
  prometheus::Histogram& batch_size_;
  prometheus::Histogram& iteration_tokens_;
  std::array<prometheus::Histogram*, kNumStepPhases> step_duration_{};

  // The engine's thread only.
  HistogramBatch ttft_;
  HistogramBatch itl_;
  std::vector<std::unique_ptr<Layer>> layers_;  // [layers]
};

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_METRICS_H_
