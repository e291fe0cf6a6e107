#include "runtime/scheduler/live_request.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace firesteel {

LiveRequest::LiveRequest(GenerationRequest request, std::shared_ptr<GenerationSink> sink,
                         const ModelConfig& config, const Tokenizer& tokenizer, CachePolicy cache,
                         absl::Time submitted)
    : request_(std::move(request)),
      sink_(std::move(sink)),
      config_(config),
      cache_(cache),
      owner_(absl::StrCat(request_.client.size(), ":", request_.client, request_.cache_salt)),
      submitted_(submitted) {
  for (uint32_t i = 0; i < request_.n; ++i) sequences_.emplace_back(i, request_, config, tokenizer);
}

Sequence& LiveRequest::FirstLive() {
  return *std::find_if(sequences_.begin(), sequences_.end(),
                       [](const Sequence& s) { return !s.ended(); });
}

size_t LiveRequest::LiveSequences() const {
  return static_cast<size_t>(std::count_if(sequences_.begin(), sequences_.end(),
                                           [](const Sequence& s) { return !s.ended(); }));
}

// Whole blocks of the prompt are shared, all others each sequence's own.
size_t LiveRequest::WorstCaseBlocks() const {
  const size_t shared = request_.prompt.size() / kernels::kKvBlockTokens;
  const size_t all = KvBlockPool::BlocksFor(request_.prompt.size() + request_.max_tokens);
  return shared + request_.n * (all - shared);
}

size_t LiveRequest::BlocksToCome() const {
  if (cache_.optimistic) return 0;
  if (prompt_left() > 0) {
    const size_t held = sequences_.front().kv().blocks().size();
    return WorstCaseBlocks() - held;
  }
  size_t blocks = 0;
  const size_t end = request_.prompt.size() + request_.max_tokens;
  for (const Sequence& sequence : sequences_) {
    if (!sequence.ended()) blocks += sequence.kv().BlocksToWrite(sequence.position(), end);
  }
  return blocks;
}

double LiveRequest::WorstCaseTokens() const {
  return static_cast<double>(request_.prompt.size()) +
         static_cast<double>(request_.n) * request_.max_tokens;
}

WaitingView LiveRequest::waiting_view(const KvBlockPool& pool) const {
  const size_t prompt = request_.prompt.size();
  size_t blocks = WorstCaseBlocks();
  if (cache_.optimistic) {
    // The prompt, and what each sequence has generated with room for one token more.
    const size_t shared = prompt / kernels::kKvBlockTokens;
    size_t first = shared;
    for (const Sequence& sequence : sequences_) {
      if (sequence.ended()) continue;
      first += KvBlockPool::BlocksFor(prompt + sequence.num_generated() + 1) - shared;
    }
    blocks = std::min(blocks, first);
  }
  const PublishedPrefix published =
      looks_up_prompt() ? pool.FindPublished(reusable_prompt()) : PublishedPrefix();
  return {
      .id = id_,
      .prompt_tokens = static_cast<uint32_t>(prompt - published.blocks * kernels::kKvBlockTokens),
      .kv_blocks = static_cast<uint32_t>(blocks - std::min(blocks, published.in_use)),
      .sequences = static_cast<uint32_t>(LiveSequences()),
      .scored = request_.prompt_logprobs};
}

bool LiveRequest::done() const {
  if (prompt_left() > 0) return false;
  return request_.max_tokens == 0 ||
         std::all_of(sequences_.begin(), sequences_.end(),
                     [](const Sequence& sequence) { return sequence.ended(); });
}

void LiveRequest::AppendRunningViews(std::vector<RunningView>* views) const {
  const uint32_t live = static_cast<uint32_t>(LiveSequences());
  if (prompt_left() > 0) {
    // It took the prompt's blocks when it was admitted.
    views->push_back(
        {.id = id_,
         .tokens_left = prompt_left(),
         .sequences = live,
         .scored = request_.prompt_logprobs,
         .private_kv_blocks = static_cast<uint32_t>(sequences_.front().kv().NumHeldBy(1))});
    return;
  }
  uint32_t shared = 0;  // blocks that only the sequences of this request hold, all of them
  for (const Sequence& sequence : sequences_) {
    if (sequence.ended()) continue;
    const size_t position = sequence.position();
    const size_t pending = sequence.pending().size();
    const size_t in_block = position % kernels::kKvBlockTokens;
    const bool has_room = sequence.kv().BlocksToWrite(position, position + 1) == 0;
    RunningView view = {.id = id_,
                        .tokens_left = pending > 1 ? static_cast<uint32_t>(pending) : 0,
                        .sequence = sequence.index()};
    view.room = has_room ? static_cast<uint32_t>(sequence.kv().capacity_tokens() - position) : 0;
    view.next_block_room =
        static_cast<uint32_t>(kernels::kKvBlockTokens - (has_room ? 0 : in_block));
    if (cache_.optimistic) {
      if (live > 1 && shared == 0) shared = static_cast<uint32_t>(sequence.kv().NumHeldBy(live));
      view.private_kv_blocks =
          static_cast<uint32_t>(sequence.kv().NumHeldBy(1)) + std::exchange(shared, 0);
    }
    views->push_back(view);
  }
}

bool LiveRequest::Admit(KvBlockPool* pool, absl::Time now) {
  KvLease lease = pool->LeasePublished(looks_up_prompt() ? reusable_prompt() : CachedPrompt());
  const size_t cached = lease.capacity_tokens();
  if (!lease.PrepareWrite(cached, request_.prompt.size())) return false;
  Sequence& first = FirstLive();
  first.kv() = std::move(lease);
  prompt_computed_ = cached;
  if (!admitted_.has_value()) {
    admitted_ = now;
    cached_tokens_ = static_cast<uint32_t>(cached);
  }
  return true;
}

void LiveRequest::Preempt() {
  for (Sequence& sequence : sequences_) sequence.Preempt();
  prompt_computed_ = 0;
}

bool LiveRequest::PrepareSlice(uint32_t index, uint32_t tokens) {
  if (prompt_left() > 0) return true;
  Sequence& sequence = sequences_[index];
  return sequence.kv().PrepareWrite(sequence.position(), sequence.position() + tokens);
}

SequenceSlice LiveRequest::NextSlice(uint32_t index, uint32_t tokens) const {
  SequenceSlice slice;
  if (prompt_left() > 0) {
    const Sequence& first = FirstLive();
    slice.tokens = std::span(request_.prompt).subspan(prompt_computed_, tokens);
    slice.position = prompt_computed_;
    slice.prompt = true;
    slice.kv_blocks = first.kv().blocks();
    slice.top_k = NeededLogits(first);
    const bool draws = tokens == prompt_left() && first.num_generated() == 0;
    const size_t last_scored = std::min(prompt_computed_ + tokens, request_.prompt.size() - 1);
    const bool scores = last_scored > prompt_computed_ && ScoresToken(last_scored);
    slice.logits = scores ? LogitRows::kAll : draws ? LogitRows::kLast : LogitRows::kNone;
    return slice;
  }
  const Sequence& sequence = sequences_[index];
  const std::span<const int32_t> pending = sequence.pending();
  slice.tokens = pending.first(tokens);
  slice.position = sequence.position();
  slice.kv_blocks = sequence.kv().blocks();
  slice.top_k = NeededLogits(sequence);
  slice.logits = tokens == pending.size() ? LogitRows::kLast : LogitRows::kNone;
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

bool LiveRequest::Advance(uint32_t index, uint32_t tokens, KvBlockPool* pool, absl::Time now) {
  if (prompt_left() == 0) {
    sequences_[index].Advance(tokens);
    return sequences_[index].pending().empty();
  }
  Sequence& first = FirstLive();
  prompt_computed_ += tokens;
  if (cache_.shares_prompts) pool->Publish(cached_prompt(), prompt_computed_, &first.kv());
  if (prompt_left() > 0) return false;
  if (!prefilled_.has_value()) prefilled_ = now;
  for (Sequence& sequence : sequences_) {
    if (!sequence.ended() && &sequence != &first) sequence.kv() = first.kv().Share();
  }
  return request_.max_tokens > 0 && first.num_generated() == 0;
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
  if (!first_token_.has_value()) first_token_ = now;
  TokenDelta delta = sequence.TakeToken(token, now);
  if (logprob.has_value()) delta.logprobs.push_back(*std::move(logprob));
  sink_->OnDelta(std::move(delta));
}

GenerationResult LiveRequest::Finish(FinishReason reason, absl::Status status, absl::Time now) {
  GenerationResult result;
  result.reason = reason;
  result.status = std::move(status);
  result.usage.prompt_tokens = static_cast<uint32_t>(request_.prompt.size());
  result.usage.cached_tokens = cached_tokens_;
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
