#include "server/metrics.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <unordered_map>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "runtime/threading/mutex.h"

namespace firesteel::server {
namespace {

using prometheus::BuildCounter;
using prometheus::BuildGauge;
using prometheus::BuildHistogram;
using prometheus::Counter;
using prometheus::Family;
using prometheus::Gauge;
using prometheus::Histogram;
using prometheus::Labels;
using prometheus::Registry;

// How many rows the realised top-k is averaged over, exponentially.
constexpr double kTopKWindowRows = 1024;

Family<Counter>& MakeCounter(Registry& registry, const char* name) {
  return BuildCounter().Name(name).Help(DescribeMetric(name).help).Register(registry);
}
Family<Gauge>& MakeGauge(Registry& registry, const char* name) {
  return BuildGauge().Name(name).Help(DescribeMetric(name).help).Register(registry);
}

/// A family of histograms and the bounds that all of them have.
struct Histograms {
  Histograms(Registry& registry, const MetricBuckets& buckets, const char* name)
      : family(BuildHistogram().Name(name).Help(DescribeMetric(name).help).Register(registry)),
        bounds(BoundsOf(DescribeMetric(name), buckets)) {}

  Family<Histogram>& family;
  const std::vector<double>& bounds;
};

/// How many engines count into each time series. Thread-safe.
class SeriesUsers {
 public:
  /// The series of `family` with these labels, which was there already or is made.
  template <typename T, typename... Arguments>
  T& Add(Family<T>& family, const Labels& labels, const Arguments&... arguments) {
    MutexLock lock(&mutex_);
    T& series = family.Add(labels, arguments...);
    ++users_[&series];
    return series;
  }

  /// Undoes one Add; the last one takes the series out of the family.
  template <typename T>
  void Remove(Family<T>& family, T* series) {
    MutexLock lock(&mutex_);
    const auto entry = users_.find(series);
    if (--entry->second > 0) return;
    users_.erase(entry);
    family.Remove(series);
  }

 private:
  Mutex mutex_;
  std::unordered_map<const void*, size_t> users_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

HistogramBatch::HistogramBatch(Histogram* histogram, const std::vector<double>& bounds)
    : histogram_(histogram), bounds_(bounds), counts_(bounds.size() + 1, 0.0) {}

void HistogramBatch::Add(double value) {
  // An upper bound belongs to its bucket (Prometheus' "le").
  const auto bucket = std::lower_bound(bounds_.begin(), bounds_.end(), value) - bounds_.begin();
  counts_[static_cast<size_t>(bucket)] += 1;
  sum_ += value;
  ++size_;
}

void HistogramBatch::Flush() {
  if (size_ == 0) return;
  // ObserveMultiple touches every bucket: for a single value, as in a step of one sequence, Observe
  // is cheaper.
  if (size_ == 1) {
    histogram_->Observe(sum_);
  } else {
    histogram_->ObserveMultiple(counts_, sum_);
  }
  std::fill(counts_.begin(), counts_.end(), 0.0);
  sum_ = 0;
  size_ = 0;
}

struct ServerMetrics::Families {
  Families(Registry& r, const MetricBuckets& b)
      : requests_running(MakeGauge(r, "firesteel_requests_running")),
        requests_waiting(MakeGauge(r, "firesteel_requests_waiting")),
        kv_usage(MakeGauge(r, "firesteel_kv_cache_usage_ratio")),
        kv_capacity(MakeGauge(r, "firesteel_kv_cache_capacity_tokens")),
        build_info(MakeGauge(r, "firesteel_build_info")),
        requests(MakeCounter(r, "firesteel_requests_total")),
        rejections(MakeCounter(r, "firesteel_admission_rejections_total")),
        prompt_tokens(MakeCounter(r, "firesteel_prompt_tokens_total")),
        generation_tokens(MakeCounter(r, "firesteel_generation_tokens_total")),
        flops(MakeCounter(r, "firesteel_flops_total")),
        weight_bytes(MakeCounter(r, "firesteel_weight_bytes_total")),
        ttft(r, b, "firesteel_time_to_first_token_seconds"),
        itl(r, b, "firesteel_inter_token_latency_seconds"),
        tpot(r, b, "firesteel_time_per_output_token_seconds"),
        e2e(r, b, "firesteel_e2e_request_latency_seconds"),
        queue_time(r, b, "firesteel_request_queue_time_seconds"),
        prefill_time(r, b, "firesteel_request_prefill_time_seconds"),
        decode_time(r, b, "firesteel_request_decode_time_seconds"),
        prompt_length(r, b, "firesteel_request_prompt_tokens"),
        generation_length(r, b, "firesteel_request_generation_tokens"),
        batch_size(r, b, "firesteel_batch_size"),
        iteration_tokens(r, b, "firesteel_iteration_tokens"),
        step_duration(r, b, "firesteel_step_duration_seconds"),
        ffn_active(r, b, "firesteel_ffn_active_fraction"),
        ffn_union(r, b, "firesteel_ffn_batch_union_fraction"),
        attended_fraction(r, b, "firesteel_attention_attended_fraction"),
        attended_positions(r, b, "firesteel_attention_attended_positions"),
        topk_ratio(MakeGauge(r, "firesteel_ffn_topk_ratio")),
        preemptions(MakeCounter(r, "firesteel_preemptions_total")),
        prompt_tokens_cached(MakeCounter(r, "firesteel_prompt_tokens_cached_total")),
        prefix_queries(MakeCounter(r, "firesteel_prefix_cache_queries_total")),
        prefix_hits(MakeCounter(r, "firesteel_prefix_cache_hits_total")) {}

  Family<Gauge>& requests_running;
  Family<Gauge>& requests_waiting;
  Family<Gauge>& kv_usage;
  Family<Gauge>& kv_capacity;
  Family<Gauge>& build_info;
  Family<Counter>& requests;
  Family<Counter>& rejections;
  Family<Counter>& prompt_tokens;
  Family<Counter>& generation_tokens;
  Family<Counter>& flops;
  Family<Counter>& weight_bytes;
  const Histograms ttft;
  const Histograms itl;
  const Histograms tpot;
  const Histograms e2e;
  const Histograms queue_time;
  const Histograms prefill_time;
  const Histograms decode_time;
  const Histograms prompt_length;
  const Histograms generation_length;
  const Histograms batch_size;
  const Histograms iteration_tokens;
  const Histograms step_duration;
  const Histograms ffn_active;
  const Histograms ffn_union;
  const Histograms attended_fraction;
  const Histograms attended_positions;
  Family<Gauge>& topk_ratio;
  Family<Counter>& preemptions;
  Family<Counter>& prompt_tokens_cached;
  Family<Counter>& prefix_queries;
  Family<Counter>& prefix_hits;

  SeriesUsers users;
};

/// What one engine counts into. Not thread-safe.
class EngineMetrics::OwnSeries {
 public:
  explicit OwnSeries(SeriesUsers* users) : users_(users) {}
  ~OwnSeries() {
    for (const auto& remove : removals_) remove();
  }
  OwnSeries(const OwnSeries&) = delete;
  OwnSeries& operator=(const OwnSeries&) = delete;

  template <typename T, typename... Arguments>
  T& Add(Family<T>& family, const Labels& labels, const Arguments&... arguments) {
    T& series = users_->Add(family, labels, arguments...);
    removals_.push_back([this, &family, &series] { users_->Remove(family, &series); });
    return series;
  }
  Histogram& Add(const Histograms& histograms, const Labels& labels) {
    return Add(histograms.family, labels, histograms.bounds);
  }
  HistogramBatch AddBatch(const Histograms& histograms, const Labels& labels) {
    return {&Add(histograms, labels), histograms.bounds};
  }

 private:
  SeriesUsers* const users_;
  std::vector<std::function<void()>> removals_;
};

ServerMetrics::ServerMetrics(const MetricBuckets& buckets)
    : buckets_(buckets),
      registry_(std::make_shared<Registry>()),
      families_(std::make_unique<Families>(*registry_, buckets_)) {}

ServerMetrics::~ServerMetrics() = default;

std::unique_ptr<EngineMetrics> ServerMetrics::AddModel(const std::string& model_name,
                                                       const ModelConfig& config) {
  return std::make_unique<EngineMetrics>(*families_, model_name, config);
}

struct EngineMetrics::Layer {
  HistogramBatch ffn_active;
  HistogramBatch ffn_union;
  HistogramBatch attended_fraction;
  HistogramBatch attended_positions;
  Gauge* topk_ratio = nullptr;  // Spark only
  double mean_active = -1;      // below zero: no row yet
};

EngineMetrics::EngineMetrics(ServerMetrics::Families& families, const std::string& model_name,
                             const ModelConfig& config)
    : families_(families),
      model_name_(model_name),
      neurons_(static_cast<double>(config.intermediate_size)),
      heads_(static_cast<double>(config.num_heads)),
      ffn_target_(static_cast<double>(config.ffn_top_k)),
      series_(std::make_unique<OwnSeries>(&families.users)),
      requests_running_(series_->Add(families.requests_running, {{"model_name", model_name}})),
      requests_waiting_(series_->Add(families.requests_waiting, {{"model_name", model_name}})),
      kv_usage_(series_->Add(families.kv_usage, {{"model_name", model_name}})),
      kv_capacity_(series_->Add(families.kv_capacity, {{"model_name", model_name}})),
      prompt_tokens_(series_->Add(families.prompt_tokens, {{"model_name", model_name}})),
      preemptions_(series_->Add(families.preemptions, {{"model_name", model_name}})),
      prompt_tokens_cached_(
          series_->Add(families.prompt_tokens_cached, {{"model_name", model_name}})),
      prefix_queries_(series_->Add(families.prefix_queries, {{"model_name", model_name}})),
      prefix_hits_(series_->Add(families.prefix_hits, {{"model_name", model_name}})),
      generation_tokens_(series_->Add(families.generation_tokens, {{"model_name", model_name}})),
      flops_performed_(
          series_->Add(families.flops, {{"model_name", model_name}, {"kind", "performed"}})),
      flops_skipped_(
          series_->Add(families.flops, {{"model_name", model_name}, {"kind", "skipped"}})),
      bytes_read_(
          series_->Add(families.weight_bytes, {{"model_name", model_name}, {"kind", "read"}})),
      bytes_skipped_(
          series_->Add(families.weight_bytes, {{"model_name", model_name}, {"kind", "skipped"}})),
      tpot_(series_->Add(families.tpot, {{"model_name", model_name}})),
      e2e_(series_->Add(families.e2e, {{"model_name", model_name}})),
      queue_time_(series_->Add(families.queue_time, {{"model_name", model_name}})),
      prefill_time_(series_->Add(families.prefill_time, {{"model_name", model_name}})),
      decode_time_(series_->Add(families.decode_time, {{"model_name", model_name}})),
      prompt_length_(series_->Add(families.prompt_length, {{"model_name", model_name}})),
      generation_length_(series_->Add(families.generation_length, {{"model_name", model_name}})),
      batch_size_(series_->Add(families.batch_size, {{"model_name", model_name}})),
      iteration_tokens_(series_->Add(families.iteration_tokens, {{"model_name", model_name}})),
      ttft_(series_->AddBatch(families.ttft, {{"model_name", model_name}})),
      itl_(series_->AddBatch(families.itl, {{"model_name", model_name}})) {
  for (size_t i = 0; i < kNumFinishReasons; ++i) {
    requests_[i] = &series_->Add(
        families.requests,
        {{"model_name", model_name}, {"finish_reason", FinishReasonName(FinishReason(i))}});
  }
  for (size_t i = 0; i < kNumRejectionReasons; ++i) {
    rejections_[i] = &series_->Add(
        families.rejections,
        {{"model_name", model_name}, {"reason", RejectionReasonName(RejectionReason(i))}});
  }
  for (size_t i = 0; i < kNumStepPhases; ++i) {
    step_duration_[i] =
        &series_->Add(families.step_duration,
                      {{"model_name", model_name}, {"phase", StepPhaseName(StepPhase(i))}});
  }
  for (size_t i = 0; i < config.num_layers; ++i) {
    const Labels labels = {{"model_name", model_name}, {"layer", std::to_string(i)}};
    layers_.push_back(std::make_unique<Layer>(
        Layer{.ffn_active = series_->AddBatch(families.ffn_active, labels),
              .ffn_union = series_->AddBatch(families.ffn_union, labels),
              .attended_fraction = series_->AddBatch(families.attended_fraction, labels),
              .attended_positions = series_->AddBatch(families.attended_positions, labels)}));
    if (config.spark()) layers_.back()->topk_ratio = &series_->Add(families.topk_ratio, labels);
  }
}

EngineMetrics::~EngineMetrics() = default;

void EngineMetrics::OnRejected(RejectionReason reason) {
  if (!counting_.load(std::memory_order_acquire)) return;
  rejections_[static_cast<size_t>(reason)]->Increment();
}

void EngineMetrics::OnGauges(const EngineGauges& gauges) {
  requests_running_.Set(gauges.requests_running);
  requests_waiting_.Set(gauges.requests_waiting);
  kv_usage_.Set(gauges.kv_usage_ratio);
}

void EngineMetrics::CountLayer(const LayerActivity& activity, double keep, Layer* layer) {
  double active = 0;
  for (const RowActivity& row : activity.rows) {
    active += row.ffn_active;
    layer->ffn_active.Add(row.ffn_active / neurons_);
    const double attended = row.attended / heads_;
    layer->attended_positions.Add(attended);
    if (row.visible > 0) layer->attended_fraction.Add(attended / row.visible);
  }
  if (activity.rows.empty()) return;
  layer->ffn_union.Add(activity.ffn_union / neurons_);
  layer->ffn_active.Flush();
  layer->ffn_union.Flush();
  layer->attended_fraction.Flush();
  layer->attended_positions.Flush();

  if (layer->topk_ratio == nullptr) return;
  const double mean = active / static_cast<double>(activity.rows.size());
  layer->mean_active =
      layer->mean_active < 0 ? mean : keep * layer->mean_active + (1 - keep) * mean;
  layer->topk_ratio->Set(layer->mean_active / ffn_target_);
}

void EngineMetrics::OnStep(const StepReport& report) {
  if (!counting_.load(std::memory_order_acquire)) return;
  prompt_tokens_.Increment(report.prefill_tokens);
  prompt_tokens_cached_.Increment(report.prefix_cache_hits);
  prefix_queries_.Increment(report.prefix_cache_queries);
  prefix_hits_.Increment(report.prefix_cache_hits);
  preemptions_.Increment(report.preemptions);
  // Every generated token is either a request's first or has a latency.
  generation_tokens_.Increment(static_cast<double>(report.times_to_first_token.size() +
                                                   report.inter_token_latencies.size()));
  flops_performed_.Increment(report.flops_performed);
  flops_skipped_.Increment(report.flops_skipped);
  bytes_read_.Increment(report.weight_bytes_read);
  bytes_skipped_.Increment(report.weight_bytes_skipped);
  batch_size_.Observe(report.sequences);
  iteration_tokens_.Observe(report.prefill_tokens + report.decode_tokens);
  step_duration_[static_cast<size_t>(report.phase)]->Observe(
      absl::ToDoubleSeconds(report.duration));
  for (const absl::Duration d : report.times_to_first_token) ttft_.Add(absl::ToDoubleSeconds(d));
  for (const absl::Duration d : report.inter_token_latencies) itl_.Add(absl::ToDoubleSeconds(d));
  ttft_.Flush();
  itl_.Flush();

  const double rows = report.prefill_tokens + report.decode_tokens;
  const double keep = std::exp(-rows / kTopKWindowRows);
  for (size_t i = 0; i < std::min(report.layers.size(), layers_.size()); ++i) {
    CountLayer(report.layers[i], keep, layers_[i].get());
  }
}

void EngineMetrics::OnFinish(const FinishReport& report) {
  if (!counting_.load(std::memory_order_acquire)) return;
  const Timings& t = report.timings;
  requests_[static_cast<size_t>(report.reason)]->Increment();
  e2e_.Observe(absl::ToDoubleSeconds(t.total));
  queue_time_.Observe(absl::ToDoubleSeconds(t.queue));
  prompt_length_.Observe(report.usage.prompt_tokens);
  generation_length_.Observe(report.usage.generated_tokens);
  // A request that ended earlier has nothing to say about these.
  if (report.usage.generated_tokens == 0) return;
  prefill_time_.Observe(absl::ToDoubleSeconds(t.prefill));
  decode_time_.Observe(absl::ToDoubleSeconds(t.decode));
  if (report.usage.generated_tokens > 1) {
    tpot_.Observe(absl::ToDoubleSeconds(t.decode) / (report.usage.generated_tokens - 1));
  }
}

void EngineMetrics::SetBuildInfo(const std::string& version, const std::string& simd_target,
                                 const std::string& weights) {
  series_
      ->Add(families_.build_info, {{"model_name", model_name_},
                                   {"version", version},
                                   {"simd_target", simd_target},
                                   {"weights", weights}})
      .Set(1);
}

void EngineMetrics::SetKvCapacity(size_t tokens) { kv_capacity_.Set(static_cast<double>(tokens)); }

}  // namespace firesteel::server
