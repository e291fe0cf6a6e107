// A model under test: its weights, one team of threads, one cache, and the two things that are
// timed.

#ifndef FIRESTEEL_TOOLS_BENCH_SUBJECT_H_
#define FIRESTEEL_TOOLS_BENCH_SUBJECT_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "runtime/checkpoint/weights.h"
#include "runtime/model/cost_model.h"
#include "runtime/model/kv_cache.h"
#include "runtime/model/transformer.h"
#include "runtime/sampling/sampler.h"
#include "runtime/threading/worker_pool.h"

namespace firesteel::bench {

/// One timed run.
struct Sample {
  double tokens_per_second = 0;
  double cpu_seconds_per_token = 0;  // of all threads together, spinning included
  double flops_per_token = 0;        // of the matrix products
  double bytes_per_token = 0;        // weights read once a step, and the KV cache
  double scattered_per_token = 0;    // of those, rows of active neurons and kept positions
  std::array<double, kNumPhases> phase_seconds{};  // a token
  double sampling_seconds = 0;                     // a token: its choice from the logits
};

/// Not thread-safe.
class Subject {
 public:
  /// Keys and values are cached in `kv_dtype`. Sequences of up to `max_tokens`, up to `max_batch`
  /// at once, prompts in chunks of `chunk` tokens. With `own_text` prompts are what the model
  /// itself writes after bos; otherwise they are random tokens (of a model with random weights
  /// nothing better is to be had). With `sublinear_head`, tokens are decoded greedily and take that
  /// head.
  Subject(std::shared_ptr<const ModelWeights> weights, ComputeType compute, kernels::DType kv_dtype,
          size_t threads, size_t chunk, size_t max_batch, size_t max_tokens, bool own_text,
          bool sublinear_head);

  /// How the FFN of prompts is computed.
  void SetFfnWay(FfnWay way) { transformer_.SetFfnWay(way); }

  /// Computes a prompt of `tokens` from an empty cache, logits of the last position included.
  Sample Prefill(size_t tokens);

  /// `batch` sequences, each with `context` positions in the cache, decode `tokens` each, at
  /// temperature 1 from the whole vocabulary, or greedily (see above). What earlier calls left in
  /// the cache is used again: of a longer context, the positions that a shorter one decoded to hold
  /// those tokens instead of the text's.
  Sample Decode(size_t batch, size_t context, size_t tokens);

  const ModelWeights& weights() const { return *weights_; }
  size_t threads() const { return pool_.num_threads(); }

 private:
  std::vector<int32_t> WriteText(size_t tokens);
  std::vector<int32_t> RandomText(size_t tokens) const;
  void FillCache(std::span<std::byte* const> blocks, size_t tokens, Sample* sample);
  Sample PerToken(Sample sum, const std::array<double, kNumPhases>& before, double tokens,
                  double seconds) const;
  void AddStepCost(Sample* sample) const;
  void DrawTokens(size_t step, std::span<int32_t> tokens);

  const std::shared_ptr<const ModelWeights> weights_;
  const size_t chunk_;
  const bool sublinear_head_;
  struct Context {
    KvLease lease;
    size_t filled = 0;  // positions
  };

  WorkerPool pool_;
  const size_t max_tokens_;
  std::unique_ptr<KvBlockPool> cache_;
  Transformer transformer_;
  const CostModel cost_;
  std::vector<Sampler> samplers_;  // one a worker
  std::vector<int32_t> text_;
  std::vector<Context> contexts_;  // of sequences that decode together
};

}  // namespace firesteel::bench

#endif  // FIRESTEEL_TOOLS_BENCH_SUBJECT_H_
