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
/// The prompt is computed once, by the first sequence; once it is there, the others take it over.
class LiveRequest {
 public:
  /// `config` and `tokenizer` outlive it.
  LiveRequest(uint64_t id, GenerationRequest request, std::shared_ptr<GenerationSink> sink,
              const ModelConfig& config, const Tokenizer& tokenizer, absl::Time submitted);

  uint64_t id() const { return id_; }
  const GenerationRequest& request() const { return request_; }
  GenerationSink& sink() const { return *sink_; }
  WaitingView waiting_view() const;
  uint32_t prompt_left() const {
    return static_cast<uint32_t>(request_.prompt.size() - prompt_computed_);
  }
  /// In the order of their index; those that ended are among them.
  std::deque<Sequence>& sequences() { return sequences_; }
  /// Whether nothing is left to compute.
  bool done() const;

  /// What of it may compute tokens in the next step: the prompt, or each sequence that goes on.
  void AppendRunningViews(std::vector<RunningView>* views) const;

  /// The request joins the batch; each sequence owns its worst case of KV memory. The leases are as
  /// many as sequences.
  void Admit(std::vector<KvLease> leases, absl::Time now);

  /// The next `tokens` of the prompt, or of a sequence's pending ones; valid until Advance.
  SequenceSlice NextSlice(uint32_t sequence, uint32_t tokens) const;
  /// So many more positions were computed. True if a token is to be drawn now: for all sequences
  /// behind the prompt, else for that one.
  bool Advance(uint32_t sequence, uint32_t tokens);
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
  Timings MakeTimings(absl::Time now) const;
  Sparsity MakeSparsity() const;

  const uint64_t id_;
  const GenerationRequest request_;
  const std::shared_ptr<GenerationSink> sink_;
  const ModelConfig& config_;

  std::deque<Sequence> sequences_;  // [n]; a deque, for they don't move
  size_t prompt_computed_ = 0;      // positions in the KV cache of the first sequence

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
