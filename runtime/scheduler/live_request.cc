#include "runtime/scheduler/live_request.h"

#include <utility>

namespace firesteel {

LiveRequest::LiveRequest(uint64_t id, GenerationRequest request,
                         std::shared_ptr<GenerationSink> sink, const ModelConfig& config,
                         const Tokenizer& tokenizer, absl::Time submitted)
    : id_(id),
      request_(std::move(request)),
      sink_(std::move(sink)),
      config_(config),
      submitted_(submitted) {
  for (uint32_t i = 0; i < request_.n; ++i) sequences_.emplace_back(i, request_, config, tokenizer);
}

WaitingView LiveRequest::waiting_view() const {
  const size_t tokens = request_.prompt.size() + request_.max_tokens;
  return {.id = id_,
          .priority = request_.priority,
          .prompt_tokens = static_cast<uint32_t>(request_.prompt.size()),
          .kv_blocks = static_cast<uint32_t>(KvBlockPool::BlocksFor(tokens) * request_.n),
          .sequences = request_.n,
          .scored = request_.prompt_logprobs};
}

bool LiveRequest::done() const {
  if (prompt_left() > 0) return false;
  return request_.max_tokens == 0 ||
         std::all_of(sequences_.begin(), sequences_.end(),
                     [](const Sequence& sequence) { return sequence.ended(); });
}

void LiveRequest::AppendRunningViews(std::vector<RunningView>* views) const {
  if (prompt_left() > 0) {
    views->push_back({.id = id_,
                      .tokens_left = prompt_left(),
                      .sequences = request_.n,
                      .scored = request_.prompt_logprobs});
    return;
  }
  for (const Sequence& sequence : sequences_) {
    if (sequence.ended()) continue;
    views->push_back({.id = id_, .sequence = sequence.index()});
  }
}

void LiveRequest::Admit(std::vector<KvLease> leases, absl::Time now) {
  for (Sequence& sequence : sequences_) sequence.kv() = std::move(leases[sequence.index()]);
  admitted_ = now;
}

SequenceSlice LiveRequest::NextSlice(uint32_t index, uint32_t tokens) const {
  SequenceSlice slice;
  const Sequence& sequence = sequences_[index];
  slice.kv_blocks = sequence.kv().blocks();
  slice.top_k = NeededLogits(sequence);
  if (prompt_left() > 0) {
    slice.tokens = std::span(request_.prompt).subspan(prompt_computed_, tokens);
    slice.position = prompt_computed_;
    slice.prompt = true;
    slice.logits = request_.prompt_logprobs  ? LogitRows::kAll
                   : tokens == prompt_left() ? LogitRows::kLast
                                             : LogitRows::kNone;
  } else {
    const std::span<const int32_t> pending = sequence.pending();
    slice.tokens = pending.first(tokens);
    slice.position = sequence.position();
    slice.logits = tokens == pending.size() ? LogitRows::kLast : LogitRows::kNone;
  }
  return slice;
}

// How many of the largest logits decide the next token; 0: all of them. Forbidden tokens may be
// among the largest.
uint32_t LiveRequest::NeededLogits(const Sequence& sequence) const {
  const bool scores = request_.prompt_logprobs && prompt_left() > 0;
  if (scores || request_.logprobs.has_value()) return 0;
  const uint32_t drawn_from = LargestLogitsNeeded(request_.sampling);
  return drawn_from == 0 ? 0
                         : drawn_from + static_cast<uint32_t>(sequence.forbidden_tokens().size());
}

bool LiveRequest::Advance(uint32_t index, uint32_t tokens) {
  if (prompt_left() == 0) {
    sequences_[index].Advance(tokens);
    return sequences_[index].pending().empty();
  }
  prompt_computed_ += tokens;
  if (prompt_left() > 0) return false;
  for (size_t i = 1; i < sequences_.size(); ++i) {
    sequences_[i].kv().CopyFrom(sequences_[0].kv(), request_.prompt.size());
  }
  return request_.max_tokens > 0;
}

void LiveRequest::AddActivity(std::span<const LayerActivity> activity, size_t row,
                              const CostModel& cost, const HeadActivity* head) {
  for (const LayerActivity& layer : activity) {
    const RowActivity& a = layer.rows[row];
    ffn_active_ += a.ffn_active;
    attended_ += a.attended;
    visible_ += a.visible;
    flops_ += cost.LayerFlops(a);
  }
  layer_rows_ += static_cast<double>(activity.size());
  if (head != nullptr) flops_.performed += cost.HeadFlops(*head);
}

void LiveRequest::TakeToken(Sequence& sequence, int32_t token, std::optional<TokenLogprob> logprob,
                            absl::Time now) {
  if (!first_token_.has_value()) {
    first_token_ = now;
    prefilled_ = now;
  }
  TokenDelta delta = sequence.TakeToken(token, now);
  if (logprob.has_value()) delta.logprobs.push_back(*std::move(logprob));
  sink_->OnDelta(std::move(delta));
}

GenerationResult LiveRequest::Finish(FinishReason reason, absl::Status status, absl::Time now) {
  GenerationResult result;
  result.reason = reason;
  result.status = std::move(status);
  result.usage.prompt_tokens = static_cast<uint32_t>(request_.prompt.size());
  for (Sequence& sequence : sequences_) {
    sequence.kv() = KvLease();
    result.usage.generated_tokens += sequence.num_generated();
  }
  result.timings = MakeTimings(now);
  result.sparsity = MakeSparsity();
  return result;
}

Timings LiveRequest::MakeTimings(absl::Time now) const {
  Timings timings;
  timings.queue = admitted_.value_or(now) - submitted_;
  if (admitted_.has_value()) timings.prefill = prefilled_.value_or(now) - *admitted_;
  if (first_token_.has_value()) {
    timings.first_token = *first_token_ - submitted_;
    timings.decode = now - *first_token_;
  }
  timings.total = now - submitted_;
  return timings;
}

Sparsity LiveRequest::MakeSparsity() const {
  Sparsity sparsity;
  if (layer_rows_ == 0) return sparsity;  // nothing was computed
  const double heads = static_cast<double>(config_.num_heads);
  sparsity.ffn_active_fraction =
      ffn_active_ / (layer_rows_ * static_cast<double>(config_.intermediate_size));
  sparsity.attention_attended_positions = attended_ / (layer_rows_ * heads);
  sparsity.attention_attended_fraction = attended_ / (visible_ * heads);
  sparsity.flops_skipped_fraction = flops_.skipped / (flops_.performed + flops_.skipped);
  return sparsity;
}

}  // namespace firesteel
