#include "runtime/scheduler/sequence.h"

#include <algorithm>
#include <utility>

namespace firesteel {

Sequence::Sequence(uint64_t id, GenerationRequest request, std::shared_ptr<GenerationSink> sink,
                   const ModelConfig& config, const Tokenizer& tokenizer, absl::Time submitted)
    : id_(id),
      request_(std::move(request)),
      sink_(std::move(sink)),
      config_(config),
      tokenizer_(tokenizer),
      ending_tokens_(request_.stopping.stop_token_ids),
      decoder_(request_.stopping.stop),
      submitted_(submitted) {
  if (!request_.stopping.ignore_eos) {
    ending_tokens_.insert(ending_tokens_.end(), config.eos_token_ids.begin(),
                          config.eos_token_ids.end());
  }
}

WaitingView Sequence::waiting_view() const {
  return {.id = id_,
          .priority = request_.priority,
          .prompt_tokens = static_cast<uint32_t>(request_.prompt.size()),
          .kv_blocks = static_cast<uint32_t>(
              KvBlockPool::BlocksFor(request_.prompt.size() + request_.max_tokens))};
}

void Sequence::Admit(KvLease lease, absl::Time now) {
  lease_ = std::move(lease);
  admitted_ = now;
}

SequenceSlice Sequence::NextSlice(uint32_t tokens) const {
  const bool decodes = prompt_left() == 0;
  SequenceSlice slice;
  slice.tokens = decodes ? std::span<const int32_t>(&last_token_, 1)
                         : std::span<const int32_t>(request_.prompt).subspan(computed_, tokens);
  slice.position = computed_;
  slice.kv_blocks = lease_.blocks();
  slice.logits = tokens >= prompt_left() ? LogitRows::kLast : LogitRows::kNone;
  slice.top_k = NeededLogits();
  return slice;
}

// How many of the largest logits decide the next token; 0: all of them. Forbidden tokens may be
// among the largest.
uint32_t Sequence::NeededLogits() const {
  const uint32_t drawn_from = LargestLogitsNeeded(request_.sampling);
  return drawn_from == 0 ? 0 : drawn_from + static_cast<uint32_t>(forbidden_tokens().size());
}

bool Sequence::Advance(uint32_t tokens) {
  computed_ += tokens;
  return prompt_left() == 0;
}

void Sequence::AddActivity(std::span<const LayerActivity> activity, size_t row,
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

std::span<const int32_t> Sequence::forbidden_tokens() const {
  if (generated_ >= request_.stopping.min_tokens) return {};
  return ending_tokens_;
}

bool Sequence::Ends(int32_t token) const {
  return std::find(ending_tokens_.begin(), ending_tokens_.end(), token) != ending_tokens_.end();
}

std::optional<FinishReason> Sequence::TakeToken(int32_t token, absl::Time now) {
  if (generated_ == 0) {
    first_token_ = now;
    prefilled_ = now;
  } else {
    inter_token_latency_ = now - latest_token_;
  }
  latest_token_ = now;
  last_token_ = token;
  ++generated_;

  TokenDelta delta;
  delta.token_ids.push_back(token);
  std::optional<FinishReason> reason;
  if (Ends(token)) {
    const auto& stops = request_.stopping.stop_token_ids;
    const bool stop = std::find(stops.begin(), stops.end(), token) != stops.end();
    reason = stop ? FinishReason::kStop : FinishReason::kEos;
    if (stop) stop_token_text_ = tokenizer_.TokenBytes(token);
  } else {
    delta.text =
        decoder_.Append(tokenizer_.TokenBytes(token), generated_ >= request_.stopping.min_tokens);
    if (!decoder_.matched_stop().empty()) {
      reason = FinishReason::kStop;
    } else if (generated_ >= request_.max_tokens) {
      reason = FinishReason::kLength;
    }
  }
  if (reason.has_value()) delta.text += decoder_.Finish();
  sink_->OnDelta(std::move(delta));
  return reason;
}

GenerationResult Sequence::Finish(FinishReason reason, absl::Status status, absl::Time now) {
  lease_ = KvLease();
  GenerationResult result;
  result.reason = reason;
  if (reason == FinishReason::kStop) {
    result.stop_match =
        decoder_.matched_stop().empty() ? stop_token_text_ : decoder_.matched_stop();
  }
  result.status = std::move(status);
  result.usage = {.prompt_tokens = static_cast<uint32_t>(request_.prompt.size()),
                  .cached_tokens = 0,
                  .generated_tokens = generated_};
  result.timings = MakeTimings(now);
  result.sparsity = MakeSparsity();
  return result;
}

Timings Sequence::MakeTimings(absl::Time now) const {
  Timings timings;
  timings.queue = admitted_.value_or(now) - submitted_;
  if (admitted_.has_value()) timings.prefill = prefilled_.value_or(now) - *admitted_;
  if (generated_ > 0) {
    timings.first_token = first_token_ - submitted_;
    timings.decode = now - first_token_;
  }
  timings.total = now - submitted_;
  return timings;
}

Sparsity Sequence::MakeSparsity() const {
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
