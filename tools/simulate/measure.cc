// The real engine beside the simulated one: the same trace in real time, and what steps cost.

#include <algorithm>
#include <chrono>
#include <memory>
#include <string>
#include <utility>

#include "absl/time/clock.h"
#include "runtime/model/kv_cache.h"
#include "runtime/model/transformer.h"
#include "runtime/sampling/sampler.h"
#include "runtime/threading/mutex.h"
#include "runtime/threading/worker_pool.h"
#include "tools/simulate/simulator.h"

namespace firesteel::simulate {
namespace {

ComputeType ComputeFor(const ModelWeights& weights) {
  return ResolveComputeType(std::nullopt, weights.dtype).value_or(ComputeType::kF32);
}

class NoText final : public Tokenizer {
 public:
  absl::StatusOr<std::vector<int32_t>> EncodePrompt(absl::string_view) const override {
    return std::vector<int32_t>{2};
  }
  const std::string& TokenBytes(int32_t) const override { return empty_; }

 private:
  const std::string empty_;
};

/// Hands results on, and lets a caller wait for them.
class CountingSink final : public GenerationSink {
 public:
  explicit CountingSink(Recorder* recorder) : recorder_(recorder) {}
  void OnDelta(TokenDelta) override {}
  void OnFinish(GenerationResult result) override {
    recorder_->OnFinish(std::move(result));
    MutexLock lock(&mutex_);
    ++ended_;
    changed_.NotifyAll();
  }
  void WaitFor(uint64_t ended) {
    MutexLock lock(&mutex_);
    while (ended_ < ended) changed_.Wait(&mutex_);
  }

 private:
  Recorder* const recorder_;
  Mutex mutex_;
  CondVar changed_;
  uint64_t ended_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace

absl::StatusOr<Outcome> RunForReal(const std::vector<Arrival>& trace,
                                   const std::shared_ptr<const ModelWeights>& weights,
                                   const EngineOptions& options, size_t threads, Intake intake,
                                   const Objectives& objectives) {
  WorkerPool pool(threads);
  Recorder recorder(objectives);
  const size_t vocab = weights->config.vocab_size;
  auto engine = Engine::Create(weights, std::make_shared<NoText>(), ComputeFor(*weights), options,
                               &pool, &recorder);
  if (!engine.ok()) return engine.status();
  const auto sink = std::make_shared<CountingSink>(&recorder);
  uint64_t accepted = 0;
  const absl::Time start = absl::Now();
  for (size_t i = 0; i < trace.size(); ++i) {
    if (intake == Intake::kOpen) {
      absl::SleepFor(start + absl::Seconds(trace[i].seconds) - absl::Now());
    } else if (i % options.max_batch_size == 0) {
      sink->WaitFor(accepted);
    }
    GenerationRequest request = ToRequest(trace[i], i, vocab);
    if (trace[i].timeout_seconds > 0) {
      request.deadline = options.clock->Now() + absl::Seconds(trace[i].timeout_seconds);
    }
    const absl::Status status = (*engine)->Submit(std::move(request), sink).status();
    if (status.code() == absl::StatusCode::kInvalidArgument) return status;
    if (status.ok()) ++accepted;
  }
  (*engine)->FinishDrain(absl::InfiniteFuture());
  const double first = intake == Intake::kOpen ? trace.front().seconds : 0;
  const double seconds = absl::ToDoubleSeconds(absl::Now() - start) - first;
  engine->reset();
  Outcome outcome = recorder.Finish(seconds);
  outcome.requests = trace.size();
  return outcome;
}

StepCost MeasureCost(const std::shared_ptr<const ModelWeights>& weights,
                     const EngineOptions& options, size_t threads) {
  const ModelConfig& config = weights->config;
  const size_t context = std::min<size_t>(config.max_position_embeddings, 1024);
  const size_t batch = options.max_batch_size;
  WorkerPool pool(threads);
  auto cache = KvBlockPool::Create(config, options.kv_dtype,
                                   (batch + 1) * KvBlockPool::BlocksFor(context) *
                                       KvBlockPool::BytesPerBlock(config, options.kv_dtype));
  Transformer model(weights, ComputeFor(*weights), options.kv_dtype, &pool,
                    options.max_batch_tokens, batch);
  std::vector<KvLease> leases;
  for (size_t i = 0; i <= batch; ++i) leases.push_back(*(*cache)->Lease(context));
  std::vector<int32_t> text(context);
  for (size_t i = 0; i < context; ++i) {
    text[i] = static_cast<int32_t>(3 + i * 7919 % (config.vocab_size - 3));
  }
  StepCostFit fit;
  Sampler sampler;
  const auto step = [&](size_t rows, size_t position, size_t prefill) {
    std::vector<SequenceSlice> slices;
    StepWork work;
    const auto add = [&](size_t lease, size_t at, size_t tokens) {
      SequenceSlice slice;
      slice.tokens = std::span(text).subspan(at, tokens);
      slice.position = at;
      slice.kv_blocks = leases[lease].blocks();
      slice.logits = tokens == 1 ? LogitRows::kLast : LogitRows::kNone;
      slice.prompt = tokens > 1;
      slices.push_back(slice);
      work.context += tokens * at + tokens * (tokens - 1) / 2;
    };
    for (size_t i = 0; i < rows; ++i) add(i, position, 1);
    if (prefill > 0) add(batch, position, prefill);
    work.decode_rows = static_cast<uint32_t>(rows);
    work.prefill_tokens = static_cast<uint32_t>(prefill);
    const auto begin = std::chrono::steady_clock::now();
    if (!model.Forward(slices).ok()) return;
    for (size_t i = 0; i < rows; ++i) {
      (void)sampler.Sample(model.logits(i), {.seed = 1}, i, position);
    }
    fit.Add(work, absl::FromChrono(std::chrono::steady_clock::now() - begin));
  };
  // All positions of the caches first, so that pages are there and contents are finite.
  for (size_t lease = 0; lease <= batch; ++lease) {
    for (size_t at = 0; at < context; at += options.max_batch_tokens) {
      SequenceSlice slice;
      slice.tokens =
          std::span(text).subspan(at, std::min<size_t>(options.max_batch_tokens, context - at));
      slice.position = at;
      slice.kv_blocks = leases[lease].blocks();
      slice.logits = LogitRows::kNone;
      slice.prompt = true;
      if (!model.Forward({&slice, 1}).ok()) return {};
    }
  }
  fit = StepCostFit();
  for (int repeat = 0; repeat < 6; ++repeat) {
    for (const size_t position : {context / 16, context / 4, context / 2, context * 3 / 4}) {
      for (size_t rows = 1; rows <= batch; rows *= 2) {
        step(rows, position, 0);
        for (size_t prefill = 16; prefill + rows <= options.max_batch_tokens; prefill *= 4) {
          if (position + prefill < context) step(rows, position, prefill);
        }
      }
      for (size_t prefill = 16; prefill <= options.max_batch_tokens; prefill *= 4) {
        if (position + prefill < context) step(0, position, prefill);
      }
    }
  }
  return fit.cost();
}

}  // namespace firesteel::simulate
