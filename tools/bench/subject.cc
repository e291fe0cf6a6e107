#include "tools/bench/subject.h"

#include <time.h>

#include <algorithm>
#include <chrono>
#include <random>
#include <utility>

namespace firesteel::bench {
namespace {

double Seconds(std::chrono::steady_clock::duration d) {
  return std::chrono::duration<double>(d).count();
}

/// Wall time and the process's CPU time since its making.
class Stopwatch {
 public:
  double seconds() const { return Seconds(std::chrono::steady_clock::now() - start_); }
  double cpu_seconds() const { return CpuNow() - cpu_start_; }

 private:
  static double CpuNow() {
    timespec now{};
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
  }

  const double cpu_start_ = CpuNow();
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace

Subject::Subject(std::shared_ptr<const ModelWeights> weights, ComputeType compute,
                 kernels::DType kv_dtype, size_t threads, size_t chunk, size_t max_batch,
                 size_t max_tokens, bool own_text, bool sublinear_head)
    : weights_(std::move(weights)),
      chunk_(chunk),
      sublinear_head_(sublinear_head),
      pool_(threads),
      max_tokens_(max_tokens),
      cache_(
          std::move(KvBlockPool::Create(weights_->config, kv_dtype,
                                        (max_batch + 1) * KvBlockPool::BlocksFor(max_tokens) *
                                            KvBlockPool::BytesPerBlock(weights_->config, kv_dtype)))
              .value()),
      transformer_(weights_, compute, kv_dtype, &pool_, std::max(chunk, max_batch), max_batch,
                   sublinear_head ? std::optional(SublinearHeadOptions()) : std::nullopt),
      cost_(*weights_, kv_dtype, transformer_.sublinear_head_bytes()),
      samplers_(threads),
      text_(own_text ? WriteText(max_tokens) : RandomText(max_tokens)) {}

std::vector<int32_t> Subject::RandomText(size_t tokens) const {
  std::mt19937 random(1);
  std::vector<int32_t> text(tokens);
  for (int32_t& t : text) t = static_cast<int32_t>(random() % weights_->config.vocab_size);
  return text;
}

std::vector<int32_t> Subject::WriteText(size_t tokens) {
  const KvLease lease = std::move(cache_->Lease(tokens)).value();
  Sampler sampler;
  std::vector<int32_t> text = {weights_->config.bos_token_id};
  while (text.size() < tokens) {
    const SequenceSlice slice{{&text.back(), 1}, text.size() - 1, lease.blocks(), LogitRows::kLast};
    transformer_.Forward({&slice, 1});
    const auto next = sampler.Sample(transformer_.logits(0), {.seed = 1}, 0, text.size(),
                                     weights_->config.eos_token_ids);
    text.push_back(next.value_or(0));
  }
  return text;
}

void Subject::AddStepCost(Sample* sample) const {
  sample->bytes_per_token += cost_.HeadBytes(transformer_.head_activity()).performed;
  for (const HeadActivity& head : transformer_.head_activity()) {
    sample->flops_per_token += cost_.HeadFlops(head);
  }
  for (const LayerActivity& layer : transformer_.activity()) {
    sample->bytes_per_token += cost_.LayerBytes(layer.ffn_read).performed;
    sample->scattered_per_token += cost_.ScatteredBytes(layer.ffn_union);
    for (const RowActivity& row : layer.rows) {
      sample->flops_per_token += cost_.LayerFlops(row).performed;
      sample->bytes_per_token += cost_.KvBytes(row);
      sample->scattered_per_token += cost_.ScatteredKvBytes(row);
    }
  }
}

void Subject::FillCache(std::span<std::byte* const> blocks, size_t tokens, Sample* sample) {
  for (size_t at = 0; at < tokens; at += chunk_) {
    const size_t n = std::min(chunk_, tokens - at);
    const SequenceSlice slice{std::span(text_).subspan(at, n),
                              at,
                              blocks,
                              at + n == tokens ? LogitRows::kLast : LogitRows::kNone,
                              sublinear_head_ ? 1u : 0u,
                              /*prompt=*/true};
    transformer_.Forward({&slice, 1});
    if (sample != nullptr) AddStepCost(sample);
  }
}

// What was summed over `tokens` tokens in `seconds`, for one of them.
Sample Subject::PerToken(Sample sum, const std::array<double, kNumPhases>& before, double tokens,
                         double seconds) const {
  sum.tokens_per_second = tokens / seconds;
  sum.cpu_seconds_per_token /= tokens;
  sum.sampling_seconds /= tokens;
  sum.flops_per_token /= tokens;
  sum.bytes_per_token /= tokens;
  sum.scattered_per_token /= tokens;
  for (size_t i = 0; i < kNumPhases; ++i) {
    sum.phase_seconds[i] = (transformer_.phase_seconds()[i] - before[i]) / tokens;
  }
  return sum;
}

Sample Subject::Prefill(size_t tokens) {
  const KvLease lease = std::move(cache_->Lease(tokens)).value();
  Sample sum;
  const auto before = transformer_.phase_seconds();
  const Stopwatch watch;
  FillCache(lease.blocks(), tokens, &sum);
  const double seconds = watch.seconds();
  sum.cpu_seconds_per_token = watch.cpu_seconds();
  return PerToken(sum, before, static_cast<double>(tokens), seconds);
}

Sample Subject::Decode(size_t batch, size_t context, size_t tokens) {
  while (contexts_.size() < batch) {
    contexts_.push_back({std::move(cache_->Lease(max_tokens_)).value(), 0});
  }
  for (size_t i = 0; i < batch; ++i) {
    Context& c = contexts_[i];
    if (c.filled < context) FillCache(c.lease.blocks(), context, nullptr);
    c.filled = std::max(c.filled, context + tokens);
  }
  // They go on from one text, but for its last token: greedy ones would stay the same.
  std::vector<int32_t> last(batch);
  for (size_t i = 0; i < batch; ++i) last[i] = text_[context - 1 - i % context];
  std::vector<SequenceSlice> slices(batch);
  Sample sum;
  const auto before = transformer_.phase_seconds();
  double seconds = 0;
  for (size_t step = 0; step < tokens; ++step) {
    for (size_t i = 0; i < batch; ++i) {
      slices[i] = {{&last[i], 1},
                   context + step,
                   contexts_[i].lease.blocks(),
                   LogitRows::kLast,
                   sublinear_head_ ? 1u : 0u};
    }
    const Stopwatch watch;
    transformer_.Forward(slices);
    const double computed = watch.seconds();
    DrawTokens(step, last);
    seconds += watch.seconds();
    sum.sampling_seconds += watch.seconds() - computed;
    sum.cpu_seconds_per_token += watch.cpu_seconds();
    AddStepCost(&sum);
  }
  return PerToken(sum, before, static_cast<double>(batch * tokens), seconds);
}

// Dealt to the workers, as in the engine.
void Subject::DrawTokens(size_t step, std::span<int32_t> tokens) {
  const SamplingParams params =
      sublinear_head_ ? SamplingParams{.temperature = 0.0f} : SamplingParams{.seed = 2};
  pool_.Run([&](Worker& worker) {
    Sampler& sampler = samplers_[worker.index()];
    for (size_t i = worker.index(); i < tokens.size(); i += worker.team_size()) {
      const LogitCandidates some = transformer_.candidates(i);
      tokens[i] = (some.ids.empty() ? sampler.Sample(transformer_.logits(i), params, i, step)
                                    : sampler.Sample(some.ids, some.logits, params, i, step))
                      .value_or(0);
    }
  });
}

}  // namespace firesteel::bench
