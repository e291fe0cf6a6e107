// One request on its way through the engine: what is computed, what was generated, what it cost.

#ifndef FIRESTEEL_RUNTIME_SCHEDULER_SEQUENCE_H_
#define FIRESTEEL_RUNTIME_SCHEDULER_SEQUENCE_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
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
#include "runtime/scheduler/observer.h"
#include "runtime/scheduler/policy.h"
#include "runtime/scheduler/request.h"
#include "runtime/tokenizer/stream_decoder.h"
#include "runtime/tokenizer/tokenizer.h"

namespace firesteel {

/// Belongs to the engine's thread from the moment it is taken from the inbox. Not thread-safe.
class Sequence {
 public:
  /// `config` and `tokenizer` outlive the sequence.
  Sequence(uint64_t id, GenerationRequest request, std::shared_ptr<GenerationSink> sink,
           const ModelConfig& config, const Tokenizer& tokenizer, absl::Time submitted);

  uint64_t id() const { return id_; }
  const GenerationRequest& request() const { return request_; }
  GenerationSink& sink() const { return *sink_; }
  WaitingView waiting_view() const;
  uint32_t prompt_left() const {
    return static_cast<uint32_t>(request_.prompt.size() -
                                 std::min(computed_, request_.prompt.size()));
  }

  /// The request joins the batch and owns its worst case of KV memory.
  void Admit(KvLease lease, absl::Time now);

  /// The next `tokens` of the prompt, or the last generated token; valid until Advance.
  SequenceSlice NextSlice(uint32_t tokens) const;
  /// `tokens` more positions were computed. True if a token is to be sampled now.
  bool Advance(uint32_t tokens);
  /// Adds what a computed row did in all layers; `activity` of the whole step, `row` its index
  /// there; `head` null where it wanted no logits.
  void AddActivity(std::span<const LayerActivity> activity, size_t row, const CostModel& cost,
                   const HeadActivity* head);

  /// Tokens that must not be sampled next: what would end the sequence before min_tokens.
  std::span<const int32_t> forbidden_tokens() const;
  /// The position in the sequence that the next token gets: a part of the random number's key.
  uint64_t next_position() const { return request_.prompt.size() + generated_; }

  /// Takes a sampled token, shows its text to the sink. Returns why the sequence ends, if it does.
  std::optional<FinishReason> TakeToken(int32_t token, absl::Time now);
  /// From the token before the last one to the last; nothing where the last was the first.
  std::optional<absl::Duration> inter_token_latency() const { return inter_token_latency_; }
  absl::Duration time_to_first_token() const { return first_token_ - submitted_; }

  /// Gives the KV memory back and sums up. The caller tells the sink.
  GenerationResult Finish(FinishReason reason, absl::Status status, absl::Time now);

 private:
  bool Ends(int32_t token) const;
  uint32_t NeededLogits() const;
  Timings MakeTimings(absl::Time now) const;
  Sparsity MakeSparsity() const;

  const uint64_t id_;
  const GenerationRequest request_;
  const std::shared_ptr<GenerationSink> sink_;
  const ModelConfig& config_;
  const Tokenizer& tokenizer_;
  std::vector<int32_t> ending_tokens_;  // eos and stop tokens

  KvLease lease_;
  StreamDecoder decoder_;
  size_t computed_ = 0;  // positions in the KV cache
  uint32_t generated_ = 0;
  int32_t last_token_ = 0;
  std::string stop_token_text_;  // of the stop token that ended the sequence

  const absl::Time submitted_;
  std::optional<absl::Time> admitted_;
  std::optional<absl::Time> prefilled_;
  absl::Time first_token_ = absl::InfinitePast();
  absl::Time latest_token_ = absl::InfinitePast();
  std::optional<absl::Duration> inter_token_latency_;

  // Sums over computed rows and layers.
  double layer_rows_ = 0;
  double ffn_active_ = 0;
  double attended_ = 0;  // over heads too
  double visible_ = 0;
  Cost flops_;
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_SCHEDULER_SEQUENCE_H_
