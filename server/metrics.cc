#include "server/metrics.h"

#include <algorithm>
#include <cmath>

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
using Bounds = std::vector<double>;

// From half a millisecond (a step of a small model) to a minute (a long answer), about three a
// decade.
const Bounds& LatencyBounds() {
  static const auto* const bounds =
      new Bounds{0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60};
  return *bounds;
}

// Fractions; finest around the 8% that a Spark model aims at. All of them print as they stand here.
const Bounds& FractionBounds() {
  static const auto* const bounds = new Bounds{0.02, 0.04, 0.05, 0.06, 0.065, 0.075, 0.08, 0.09,
                                               0.1,  0.12, 0.15, 0.2,  0.3,   0.5,   0.75, 1};
  return *bounds;
}

// Counts of tokens, positions and sequences.
const Bounds& CountBounds() {
  static const auto* const bounds =
      new Bounds{1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192};
  return *bounds;
}

// How many rows the realised top-k is averaged over, exponentially.
constexpr double kTopKWindowRows = 1024;

Family<Counter>& MakeCounter(Registry& registry, const char* name, const char* help) {
  return BuildCounter().Name(name).Help(help).Register(registry);
}
Family<Gauge>& MakeGauge(Registry& registry, const char* name, const char* help) {
  return BuildGauge().Name(name).Help(help).Register(registry);
}
Family<Histogram>& MakeHistogram(Registry& registry, const char* name, const char* help) {
  return BuildHistogram().Name(name).Help(help).Register(registry);
}

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
  explicit Families(Registry& r)
      : requests_running(MakeGauge(r, "firesteel_requests_running",
                                   "Requests in the batch, prefilling or decoding.")),
        requests_waiting(
            MakeGauge(r, "firesteel_requests_waiting", "Requests in the queue, not yet begun.")),
        kv_usage(MakeGauge(r, "firesteel_kv_cache_usage_ratio",
                           "Used part of the KV cache, from 0 to 1.")),
        kv_capacity(MakeGauge(r, "firesteel_kv_cache_capacity_tokens",
                              "Positions that the KV cache holds, of all sequences together.")),
        build_info(MakeGauge(r, "firesteel_build_info",
                             "Always 1; its labels say what runs: version, SIMD target, weights.")),
        requests(MakeCounter(r, "firesteel_requests_total",
                             "Requests that were admitted and have ended, by finish reason.")),
        rejections(MakeCounter(r, "firesteel_admission_rejections_total",
                               "Requests refused before any work, by reason.")),
        prompt_tokens(MakeCounter(r, "firesteel_prompt_tokens_total", "Prompt tokens computed.")),
        generation_tokens(MakeCounter(r, "firesteel_generation_tokens_total", "Tokens generated.")),
        flops(MakeCounter(r, "firesteel_flops_total",
                          "FLOPs of the model: performed, and skipped thanks to sparsity.")),
        weight_bytes(
            MakeCounter(r, "firesteel_weight_bytes_total",
                        "Bytes of weights of all steps: read, and skipped thanks to sparsity.")),
        ttft(MakeHistogram(r, "firesteel_time_to_first_token_seconds",
                           "From a request's arrival to its first token.")),
        itl(MakeHistogram(r, "firesteel_inter_token_latency_seconds",
                          "From one token of a sequence to its next.")),
        tpot(MakeHistogram(r, "firesteel_time_per_output_token_seconds",
                           "Mean time between a request's tokens, the first one left out.")),
        e2e(MakeHistogram(r, "firesteel_e2e_request_latency_seconds",
                          "From a request's arrival to its end.")),
        queue_time(MakeHistogram(r, "firesteel_request_queue_time_seconds",
                                 "From a request's arrival until it joined the batch.")),
        prefill_time(MakeHistogram(r, "firesteel_request_prefill_time_seconds",
                                   "From joining the batch until the prompt was computed.")),
        decode_time(MakeHistogram(r, "firesteel_request_decode_time_seconds",
                                  "From a request's first token to its end.")),
        prompt_length(
            MakeHistogram(r, "firesteel_request_prompt_tokens", "Prompt tokens of a request.")),
        generation_length(MakeHistogram(r, "firesteel_request_generation_tokens",
                                        "Generated tokens of a request.")),
        batch_size(MakeHistogram(r, "firesteel_batch_size", "Sequences in a step.")),
        iteration_tokens(MakeHistogram(r, "firesteel_iteration_tokens",
                                       "Tokens computed in a step, prefill and decode.")),
        step_duration(
            MakeHistogram(r, "firesteel_step_duration_seconds", "Duration of a step, by phase.")),
        ffn_active(MakeHistogram(r, "firesteel_ffn_active_fraction",
                                 "Active neurons of a layer for one token, of all its neurons.")),
        ffn_union(MakeHistogram(
            r, "firesteel_ffn_batch_union_fraction",
            "Neurons of a layer that at least one token of a step needed, of all its neurons.")),
        attended_fraction(
            MakeHistogram(r, "firesteel_attention_attended_fraction",
                          "Positions that the heads of a layer attended to for one token, of those "
                          "they could see.")),
        attended_positions(MakeHistogram(
            r, "firesteel_attention_attended_positions",
            "Positions that a head of a layer attended to for one token, mean of its heads.")),
        topk_ratio(MakeGauge(r, "firesteel_ffn_topk_ratio",
                             "Active neurons of a layer over its target k, mean of about the last "
                             "1024 tokens; drifts from 1 where scores are not Gaussian.")) {}

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
  Family<Histogram>& ttft;
  Family<Histogram>& itl;
  Family<Histogram>& tpot;
  Family<Histogram>& e2e;
  Family<Histogram>& queue_time;
  Family<Histogram>& prefill_time;
  Family<Histogram>& decode_time;
  Family<Histogram>& prompt_length;
  Family<Histogram>& generation_length;
  Family<Histogram>& batch_size;
  Family<Histogram>& iteration_tokens;
  Family<Histogram>& step_duration;
  Family<Histogram>& ffn_active;
  Family<Histogram>& ffn_union;
  Family<Histogram>& attended_fraction;
  Family<Histogram>& attended_positions;
  Family<Gauge>& topk_ratio;
};

ServerMetrics::ServerMetrics()
    : registry_(std::make_shared<Registry>()), families_(std::make_unique<Families>(*registry_)) {}

ServerMetrics::~ServerMetrics() = default;

EngineMetrics* ServerMetrics::AddModel(const std::string& model_name, const ModelConfig& config) {
  models_.push_back(std::make_unique<EngineMetrics>(*families_, model_name, config));
  return models_.back().get();
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
      requests_running_(families.requests_running.Add({{"model_name", model_name}})),
      requests_waiting_(families.requests_waiting.Add({{"model_name", model_name}})),
      kv_usage_(families.kv_usage.Add({{"model_name", model_name}})),
      kv_capacity_(families.kv_capacity.Add({{"model_name", model_name}})),
      prompt_tokens_(families.prompt_tokens.Add({{"model_name", model_name}})),
      generation_tokens_(families.generation_tokens.Add({{"model_name", model_name}})),
      flops_performed_(families.flops.Add({{"model_name", model_name}, {"kind", "performed"}})),
      flops_skipped_(families.flops.Add({{"model_name", model_name}, {"kind", "skipped"}})),
      bytes_read_(families.weight_bytes.Add({{"model_name", model_name}, {"kind", "read"}})),
      bytes_skipped_(families.weight_bytes.Add({{"model_name", model_name}, {"kind", "skipped"}})),
      tpot_(families.tpot.Add({{"model_name", model_name}}, LatencyBounds())),
      e2e_(families.e2e.Add({{"model_name", model_name}}, LatencyBounds())),
      queue_time_(families.queue_time.Add({{"model_name", model_name}}, LatencyBounds())),
      prefill_time_(families.prefill_time.Add({{"model_name", model_name}}, LatencyBounds())),
      decode_time_(families.decode_time.Add({{"model_name", model_name}}, LatencyBounds())),
      prompt_length_(families.prompt_length.Add({{"model_name", model_name}}, CountBounds())),
      generation_length_(
          families.generation_length.Add({{"model_name", model_name}}, CountBounds())),
      batch_size_(families.batch_size.Add({{"model_name", model_name}}, CountBounds())),
      iteration_tokens_(families.iteration_tokens.Add({{"model_name", model_name}}, CountBounds())),
      ttft_(&families.ttft.Add({{"model_name", model_name}}, LatencyBounds()), LatencyBounds()),
      itl_(&families.itl.Add({{"model_name", model_name}}, LatencyBounds()), LatencyBounds()) {
  for (size_t i = 0; i < kNumFinishReasons; ++i) {
    requests_[i] = &families.requests.Add(
        {{"model_name", model_name}, {"finish_reason", FinishReasonName(FinishReason(i))}});
  }
  for (size_t i = 0; i < kNumRejectionReasons; ++i) {
    rejections_[i] = &families.rejections.Add(
        {{"model_name", model_name}, {"reason", RejectionReasonName(RejectionReason(i))}});
  }
  for (size_t i = 0; i < kNumStepPhases; ++i) {
    step_duration_[i] = &families.step_duration.Add(
        {{"model_name", model_name}, {"phase", StepPhaseName(StepPhase(i))}}, LatencyBounds());
  }
  for (size_t i = 0; i < config.num_layers; ++i) {
    const Labels labels = {{"model_name", model_name}, {"layer", std::to_string(i)}};
    const auto batch = [&labels](Family<Histogram>& family, const Bounds& bounds) {
      return HistogramBatch(&family.Add(labels, bounds), bounds);
    };
    layers_.push_back(std::make_unique<Layer>(
        Layer{.ffn_active = batch(families.ffn_active, FractionBounds()),
              .ffn_union = batch(families.ffn_union, FractionBounds()),
              .attended_fraction = batch(families.attended_fraction, FractionBounds()),
              .attended_positions = batch(families.attended_positions, CountBounds())}));
    if (config.spark()) layers_.back()->topk_ratio = &families.topk_ratio.Add(labels);
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
  families_.build_info
      .Add({{"model_name", model_name_},
            {"version", version},
            {"simd_target", simd_target},
            {"weights", weights}})
      .Set(1);
}

void EngineMetrics::SetKvCapacity(size_t tokens) { kv_capacity_.Set(static_cast<double>(tokens)); }

}  // namespace firesteel::server
