// One continuation of a prompt: its tokens, its text, its part of the KV cache.

#ifndef FIRESTEEL_RUNTIME_SCHEDULER_SEQUENCE_H_
#define FIRESTEEL_RUNTIME_SCHEDULER_SEQUENCE_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "runtime/checkpoint/model_config.h"
#include "runtime/model/kv_cache.h"
#include "runtime/sampling/sampler.h"
#include "runtime/scheduler/request.h"
#include "runtime/tokenizer/stream_decoder.h"
#include "runtime/tokenizer/tokenizer.h"

namespace firesteel {

/// Belongs to a LiveRequest. Not thread-safe.
class Sequence {
 public:
  /// `request` and `tokenizer` outlive the sequence.
  Sequence(uint32_t index, const GenerationRequest& request, const ModelConfig& config,
           const Tokenizer& tokenizer);

  uint32_t index() const { return index_; }
  bool ended() const { return end_.has_value(); }
  const std::optional<SequenceEnd>& end() const { return end_; }
  uint32_t num_generated() const { return static_cast<uint32_t>(generated_.size()); }

  /// The sequence's part of the cache: prompt and generated tokens.
  KvLease& kv() { return kv_; }
  const KvLease& kv() const { return kv_; }
  /// Generated tokens that are not in the cache yet: the last one, or more after a preemption.
  std::span<const int32_t> pending() const { return std::span(generated_).subspan(cached_); }
  /// Where the first of pending() belongs.
  size_t position() const { return request_.prompt.size() + cached_; }
  /// The first `tokens` of pending() went to the cache.
  void Advance(size_t tokens) { cached_ += tokens; }
  /// Gives its part of the cache up: all that was generated is pending again.
  void Preempt() {
    kv_ = KvLease();
    cached_ = 0;
  }

  /// The position that the next token gets: a part of the random number's key.
  uint64_t next_position() const { return request_.prompt.size() + generated_.size(); }
  /// Tokens that must not be drawn next: what would end the sequence before min_tokens.
  std::span<const int32_t> forbidden_tokens() const;
  /// What penalties look at; null where there are none.
  const TokenCounts* seen() const { return seen_.has_value() ? &*seen_ : nullptr; }

  /// Takes the next token. What the sink is to see of it, without log-probabilities. With the last
  /// token the sequence ends and gives its part of the cache back.
  TokenDelta TakeToken(int32_t token, absl::Time now);
  /// From the token before the last one to the last; nothing where the last was the first.
  std::optional<absl::Duration> inter_token_latency() const { return inter_token_latency_; }

 private:
  bool Stops(int32_t token) const;

  const uint32_t index_;
  const GenerationRequest& request_;
  const Tokenizer& tokenizer_;
  std::vector<int32_t> ending_tokens_;  // eos and stop tokens

  KvLease kv_;
  StreamDecoder decoder_;
  std::optional<TokenCounts> seen_;
  std::vector<int32_t> generated_;
  size_t cached_ = 0;  // how many of generated_ are in the cache
  std::optional<SequenceEnd> end_;

  absl::Time latest_token_ = absl::InfinitePast();
  std::optional<absl::Duration> inter_token_latency_;
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_SCHEDULER_SEQUENCE_H_
