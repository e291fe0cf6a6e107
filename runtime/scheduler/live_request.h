// One request on its way through the engine: what is computed, what was generated, what it cost.

#ifndef FIRESTEEL_RUNTIME_SCHEDULER_LIVE_REQUEST_H_
#define FIRESTEEL_RUNTIME_SCHEDULER_LIVE_REQUEST_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "runtime/checkpoint/model_config.h"
#include "runtime/model/cost_model.h"
#include "runtime/model/kv_cache.h"
#include "runtime/model/transformer.h"
#include "runtime/scheduler/policy.h"
#include "runtime/scheduler/request.h"
#include "runtime/scheduler/sequence.h"
#include "runtime/tokenizer/tokenizer.h"

namespace firesteel {

/// Belongs to the engine's thread from the moment it is taken from the inbox. Not thread-safe.
///
/// The prompt is computed once, by the first sequence; once it is there, the others share its
/// blocks. Only positions of the prompt are published for other requests: what was generated was
/// computed the way of decoding, and may differ in its last bits from the same tokens as a prompt.
class LiveRequest {
 public:
  /// How requests use the cache.
  struct CachePolicy {
    bool shares_prompts = true;  // takes over and publishes prompts
    bool optimistic = false;     // asks for what it takes at first, not for its worst case
  };

  /// `config` and `tokenizer` outlive it.
  LiveRequest(GenerationRequest request, std::shared_ptr<GenerationSink> sink,
              const ModelConfig& config, const Tokenizer& tokenizer, CachePolicy cache,
              absl::Time submitted);

  /// Given once it is accepted.
  void set_id(uint64_t id) { id_ = id; }
  uint64_t id() const { return id_; }
  const GenerationRequest& request() const { return request_; }
  GenerationSink& sink() const { return *sink_; }
  /// What it would need if it joined the batch now.
  WaitingView waiting_view(const KvBlockPool& pool) const;
  uint32_t prompt_left() const {
    return static_cast<uint32_t>(request_.prompt.size() - prompt_computed_);
  }
  /// In the order of their index; those that ended are among them.
  std::deque<Sequence>& sequences() { return sequences_; }
  /// Whether nothing is left to compute.
  bool done() const;

  /// What of it may compute tokens in the next step: the prompt, or each sequence that goes on.
  void AppendRunningViews(std::vector<RunningView>* views) const;

  /// Blocks that it can take in the worst case, of an empty cache.
  size_t WorstCaseBlocks() const;
  /// Blocks that it may still take, while it runs.
  size_t BlocksToCome() const;
  /// Tokens that it can cost in the worst case, of prompt and answers.
  double WorstCaseTokens() const;
  bool was_admitted() const { return admitted_.has_value(); }
  /// Prompt tokens that were found in the cache when it joined for the first time.
  uint32_t cached_tokens() const { return cached_tokens_; }
  /// Whether its prompt was looked up there.
  bool looks_up_prompt() const { return cache_.shares_prompts && !request_.prompt_logprobs; }

  /// The request joins the batch, with blocks for its prompt, as many as possible from the prefix
  /// cache. False if the pool has too few.
  bool Admit(KvBlockPool* pool, absl::Time now);
  /// The request leaves the batch and its blocks, and is to compute everything anew when it comes
  /// back. Nothing that was handed out changes.
  void Preempt();

  /// Takes the blocks that NextSlice(sequence, tokens) writes. False if the pool has too few.
  bool PrepareSlice(uint32_t sequence, uint32_t tokens);

  /// The next `tokens` of the prompt, or of a sequence's pending ones; valid until Advance.
  SequenceSlice NextSlice(uint32_t sequence, uint32_t tokens) const;
  /// So many more positions were computed. True if a token is to be drawn now: for all sequences
  /// behind the prompt, else for that one.
  bool Advance(uint32_t sequence, uint32_t tokens, KvBlockPool* pool, absl::Time now);
  /// Whether the prompt's token at `position` is to be scored: once, and not the first.
  bool ScoresToken(size_t position) const {
    return request_.prompt_logprobs && position > scored_ && position < request_.prompt.size();
  }
  /// The prompt's tokens up to `position` were scored.
  void SetScored(size_t position) { scored_ = position; }
  /// Adds what a computed row did in all layers; `activity` of the whole step, `row` its index
  /// there; `head` null where it wanted no logits.
  void AddActivity(std::span<const LayerActivity> activity, size_t row, const CostModel& cost,
                   const HeadActivity* head);

  /// Takes a token that was drawn for a sequence and tells the sink.
  void TakeToken(Sequence& sequence, int32_t token, std::optional<TokenLogprob> logprob,
                 absl::Time now);
  absl::Duration time_to_first_token() const { return *first_token_ - submitted_; }

  /// Gives the KV memory back and sums up. The caller tells the sink.
  GenerationResult Finish(FinishReason reason, absl::Status status, absl::Time now);

 private:
  uint32_t NeededLogits(const Sequence& sequence) const;
  CachedPrompt cached_prompt() const { return {owner_, request_.prompt}; }
  // Of which the last token must be computed for its logits.
  CachedPrompt reusable_prompt() const {
    return {owner_, std::span(request_.prompt).first(request_.prompt.size() - 1)};
  }
  size_t LiveSequences() const;
  Sequence& FirstLive();
  const Sequence& FirstLive() const { return const_cast<LiveRequest*>(this)->FirstLive(); }
  Timings MakeTimings(absl::Time now) const;
  Sparsity MakeSparsity() const;

  uint64_t id_ = 0;
  const GenerationRequest request_;
  const std::shared_ptr<GenerationSink> sink_;
  const ModelConfig& config_;
  const CachePolicy cache_;
  const std::string owner_;  // of the prompt in the prefix cache

  std::deque<Sequence> sequences_;  // [n]; a deque, for they don't move
  size_t prompt_computed_ = 0;      // positions in the KV cache of the first sequence
  size_t scored_ = 0;               // the last token of the prompt that was scored
  uint32_t cached_tokens_ = 0;

  const absl::Time submitted_;
  std::optional<absl::Time> admitted_;
  std::optional<absl::Time> prefilled_;
  std::optional<absl::Time> first_token_;

  // Sums over computed rows and layers.
  double layer_rows_ = 0;
  double ffn_active_ = 0;
  double attended_ = 0;  // over heads too
  double visible_ = 0;
  Cost flops_;
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_SCHEDULER_LIVE_REQUEST_H_
