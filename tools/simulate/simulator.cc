#include "tools/simulate/simulator.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/model/kv_cache.h"
#include "runtime/model/synthetic.h"
#include "runtime/scheduler/engine_core.h"

namespace firesteel::simulate {
namespace {

constexpr int32_t kEos = 1;
constexpr int32_t kWord = 2;
constexpr size_t kVocabulary = 4096;  // of prompts: different ones differ soon

/// Stands still unless it is moved.
class VirtualClock final : public Clock {
 public:
  absl::Time Now() const override { return now_; }
  void Advance(double seconds) { now_ += absl::Seconds(seconds); }
  void AdvanceTo(absl::Time time) { now_ = std::max(now_, time); }

 private:
  absl::Time now_ = absl::UnixEpoch();
};

class NoTokenizer final : public Tokenizer {
 public:
  absl::StatusOr<std::vector<int32_t>> EncodePrompt(absl::string_view) const override {
    return std::vector<int32_t>{kWord};
  }
  const std::string& TokenBytes(int32_t) const override { return empty_; }

 private:
  const std::string empty_;
};

/// Takes the time that the machine would, and ends each answer where the trace says.
class CostRunner final : public ModelRunner {
 public:
  CostRunner(const Machine& machine, const CostModel& flops, const std::vector<Arrival>* trace,
             VirtualClock* clock)
      : machine_(machine), start_(clock->Now()), flops_(flops), trace_(trace), clock_(clock) {}

  absl::Status Forward(std::span<const SequenceSlice> batch) override {
    StepWork work;
    size_t logit_rows = 0;
    for (const SequenceSlice& slice : batch) {
      const size_t n = slice.tokens.size();
      (slice.prompt ? work.prefill_tokens : work.decode_rows) += static_cast<uint32_t>(n);
      work.context += n * slice.position + n * (n - 1) / 2;
      logit_rows += slice.logits == LogitRows::kAll ? n : slice.logits == LogitRows::kLast ? 1 : 0;
    }
    head_.assign(logit_rows, HeadActivity());
    clock_->Advance(machine_.Seconds(work, absl::ToDoubleSeconds(clock_->Now() - start_)));
    return absl::OkStatus();
  }
  void ReadLogits(std::span<Draw> draws, std::span<Score>) override {
    for (Draw& draw : draws) {
      const Arrival& arrival = (*trace_)[draw.request->request().sampling.seed];
      draw.token = draw.sequence->num_generated() + 1 >= arrival.answer_tokens ? kEos : kWord;
    }
  }
  std::span<const LayerActivity> activity() const override { return {}; }
  std::span<const HeadActivity> head_activity() const override { return head_; }
  const CostModel& cost() const override { return flops_; }

 private:
  const Machine& machine_;
  const absl::Time start_;
  const CostModel& flops_;
  const std::vector<Arrival>* const trace_;
  VirtualClock* const clock_;
  std::vector<HeadActivity> head_;
};

// As small as a model can be: the simulator never computes with it.
ModelConfig TinyConfig(size_t context_tokens) {
  ModelConfig config = *NamedShape("spark-stories");
  config.vocab_size = kVocabulary;
  config.hidden_size = 64;
  config.intermediate_size = 128;
  config.num_layers = 1;
  config.num_heads = 1;
  config.num_kv_heads = 1;
  config.head_dim = 16;
  config.layer_types.resize(1);
  config.ffn_predictor_dim = 32;
  config.ffn_top_k = 16;
  config.attention_predictor_dim = 8;
  config.attention_top_k = 8;
  config.max_position_embeddings = context_tokens;
  config.eos_token_ids = {kEos};
  return config;
}

}  // namespace

absl::StatusOr<Outcome> Simulate(const std::vector<Arrival>& trace, const Machine& machine,
                                 EngineOptions options, size_t kv_cache_tokens,
                                 size_t context_tokens, Intake intake, const Objectives& objectives,
                                 std::vector<StepRecord>* steps) {
  VirtualClock clock;
  const absl::Time start = clock.Now();
  options.clock = &clock;
  options.sublinear_head = false;
  const auto weights = MakeSyntheticWeights(TinyConfig(context_tokens), kernels::DType::kF32, 1);
  const CostModel flops(*weights, options.kv_dtype);
  const size_t block_bytes = KvBlockPool::BytesPerBlock(weights->config, options.kv_dtype);
  options.kv_cache_bytes = KvBlockPool::BlocksFor(kv_cache_tokens) * block_bytes;
  auto pool = KvBlockPool::Create(weights->config, options.kv_dtype, options.kv_cache_bytes);
  if (!pool.ok()) return pool.status();
  Recorder recorder(objectives, &clock, steps);
  EngineCore engine({.weights = weights,
                     .tokenizer = std::make_shared<NoTokenizer>(),
                     .compute = ComputeType::kF32,
                     .options = options,
                     .kv_pool = *std::move(pool),
                     .runner = std::make_unique<CostRunner>(machine, flops, &trace, &clock),
                     .observer = &recorder});
  // The recorder outlives the engine, which need not own it.
  const std::shared_ptr<GenerationSink> sink(&recorder, [](GenerationSink*) {});

  size_t next = 0;
  const auto submit = [&]() -> absl::Status {
    const Arrival& arrival = trace[next];
    GenerationRequest request = ToRequest(arrival, next++, kVocabulary);
    if (arrival.timeout_seconds > 0) {
      request.deadline = clock.Now() + absl::Seconds(arrival.timeout_seconds);
    }
    const absl::Status status = engine.Submit(std::move(request), sink).status();
    // A refusal is an outcome, and counted; a trace that no engine could serve is an error.
    if (status.code() != absl::StatusCode::kInvalidArgument) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("trace, request ", next, ": ", std::string(status.message())));
  };
  while (true) {
    if (intake == Intake::kOpen) {
      while (next < trace.size() && start + absl::Seconds(trace[next].seconds) <= clock.Now()) {
        if (absl::Status status = submit(); !status.ok()) return status;
      }
    }
    if (engine.RunOnce()) continue;
    if (next == trace.size()) break;
    if (intake == Intake::kOpen) {
      clock.AdvanceTo(start + absl::Seconds(trace[next].seconds));
    } else {
      for (uint32_t i = 0; i < options.max_batch_size && next < trace.size(); ++i) {
        if (absl::Status status = submit(); !status.ok()) return status;
      }
    }
  }
  const double first = intake == Intake::kOpen ? trace.front().seconds : 0;
  Outcome outcome = recorder.Finish(absl::ToDoubleSeconds(clock.Now() - start) - first);
  outcome.requests = trace.size();
  return outcome;
}

}  // namespace firesteel::simulate
