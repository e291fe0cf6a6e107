#include "tools/bench/subject.h"

#include <algorithm>
#include <chrono>
#include <random>
#include <utility>

#include "runtime/sampling/sampler.h"

namespace firesteel::bench {
namespace {

double Seconds(std::chrono::steady_clock::duration d) {
  return std::chrono::duration<double>(d).count();
}

}  // namespace

Subject::Subject(std::shared_ptr<const ModelWeights> weights, ComputeType compute,
                 kernels::DType kv_dtype, size_t threads, size_t chunk, size_t max_batch,
                 size_t max_tokens, bool own_text, bool sublinear_head)
    : weights_(std::move(weights)),
      chunk_(chunk),
      sublinear_head_(sublinear_head),
      pool_(threads),
      cache_(
          std::move(KvBlockPool::Create(weights_->config, kv_dtype,
                                        max_batch * KvBlockPool::BlocksFor(max_tokens) *
                                            KvBlockPool::BytesPerBlock(weights_->config, kv_dtype)))
              .value()),
      transformer_(weights_, compute, kv_dtype, &pool_, std::max(chunk, max_batch), max_batch,
                   sublinear_head ? std::optional(SublinearHeadOptions()) : std::nullopt),
      cost_(*weights_, kv_dtype, transformer_.sublinear_head_bytes()),
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

double Subject::StepBytes() const {
  double bytes = cost_.HeadBytes(transformer_.head_activity()).performed;
  for (const LayerActivity& layer : transformer_.activity()) {
    bytes += cost_.LayerBytes(layer.ffn_union).performed;
    for (const RowActivity& row : layer.rows) bytes += cost_.KvBytes(row);
  }
  return bytes;
}

void Subject::FillCache(std::span<std::byte* const> blocks, size_t tokens, double* bytes) {
  for (size_t at = 0; at < tokens; at += chunk_) {
    const size_t n = std::min(chunk_, tokens - at);
    const SequenceSlice slice{std::span(text_).subspan(at, n), at, blocks,
                              at + n == tokens ? LogitRows::kLast : LogitRows::kNone,
                              sublinear_head_ ? 1u : 0u};
    transformer_.Forward({&slice, 1});
    if (bytes != nullptr) *bytes += StepBytes();
  }
}

Sample Subject::Prefill(size_t tokens) {
  const KvLease lease = std::move(cache_->Lease(tokens)).value();
  double bytes = 0;
  const auto start = std::chrono::steady_clock::now();
  FillCache(lease.blocks(), tokens, &bytes);
  const double seconds = Seconds(std::chrono::steady_clock::now() - start);
  return {static_cast<double>(tokens) / seconds, bytes / static_cast<double>(tokens)};
}

Sample Subject::Decode(size_t batch, size_t context, size_t tokens) {
  std::vector<KvLease> leases;
  for (size_t i = 0; i < batch; ++i) {
    leases.push_back(std::move(cache_->Lease(context + tokens)).value());
    FillCache(leases.back().blocks(), context, nullptr);
  }
  std::vector<int32_t> last(batch, text_[context - 1]);
  std::vector<SequenceSlice> slices(batch);
  std::vector<Sampler> samplers(1);
  const SamplingParams greedy{.temperature = 0.0f};
  const SamplingParams params = sublinear_head_ ? greedy : SamplingParams{.seed = 2};
  double bytes = 0;
  double seconds = 0;
  for (size_t step = 0; step < tokens; ++step) {
    for (size_t i = 0; i < batch; ++i) {
      slices[i] = {{&last[i], 1},
                   context + step,
                   leases[i].blocks(),
                   LogitRows::kLast,
                   sublinear_head_ ? 1u : 0u};
    }
    const auto start = std::chrono::steady_clock::now();
    transformer_.Forward(slices);
    seconds += Seconds(std::chrono::steady_clock::now() - start);
    bytes += StepBytes();
    for (size_t i = 0; i < batch; ++i) {
      if (const LogitCandidates some = transformer_.candidates(i); !some.ids.empty()) {
        last[i] = samplers[0].Sample(some.ids, some.logits, greedy, i, step).value_or(0);
      } else {
        last[i] = samplers[0].Sample(transformer_.logits(i), params, i, step).value_or(0);
      }
    }
  }
  const double total = static_cast<double>(batch * tokens);
  return {total / seconds, bytes / total};
}

}  // namespace firesteel::bench
