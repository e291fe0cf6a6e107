#include "runtime/scheduler/engine_core.h"

#include <algorithm>
#include <optional>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"

namespace firesteel {
namespace {

// So many steps pass between two looks at what a step costs.
constexpr uint64_t kStepsPerFit = 16;

// What a request asks for, whatever the model.
absl::Status CheckCounts(const GenerationRequest& request, uint32_t max_batch_size) {
  if (request.n == 0 || request.n > kMaxSequences) {
    return absl::InvalidArgumentError(
        absl::StrCat("n: ", request.n, " is not from 1 to ", kMaxSequences));
  }
  if (request.n > max_batch_size) {
    return absl::InvalidArgumentError(
        absl::StrCat("n: ", request.n, " exceeds max-batch-size ", max_batch_size));
  }
  if (request.max_tokens == 0 && !(request.prompt_logprobs && request.n == 1)) {
    return absl::InvalidArgumentError(
        "max_tokens: 0 is below 1, and only a request that scores one prompt may have it");
  }
  if (request.logprobs.value_or(0) > kMaxLogprobs) {
    return absl::InvalidArgumentError(
        absl::StrCat("logprobs: ", *request.logprobs, " exceeds ", kMaxLogprobs));
  }
  return absl::OkStatus();
}

}  // namespace

EngineCore::EngineCore(Parts parts)
    : weights_(std::move(parts.weights)),
      tokenizer_(std::move(parts.tokenizer)),
      compute_(parts.compute),
      options_(parts.options),
      observer_(parts.observer),
      admission_(parts.options),
      last_progress_(parts.options.clock->Now()),
      kv_pool_(std::move(parts.kv_pool)),
      runner_(std::move(parts.runner)),
      queue_(parts.options.ageing) {}

absl::Status EngineCore::Validate(const GenerationRequest& request) const {
  const ModelConfig& config = weights_->config;
  if (request.prompt.empty()) return absl::InvalidArgumentError("prompt: has no token");
  if (absl::Status status = CheckCounts(request, options_.max_batch_size); !status.ok()) {
    return status;
  }
  if (request.prompt.size() + request.max_tokens > config.max_position_embeddings) {
    return absl::InvalidArgumentError(absl::StrCat(
        "prompt: ", request.prompt.size(), " tokens and max_tokens ", request.max_tokens,
        " exceed the context of ", config.max_position_embeddings));
  }
  const auto unknown = [&](const char* field, int32_t token) {
    return absl::InvalidArgumentError(
        absl::StrCat(field, ": ", token, " is not in [0, ", config.vocab_size, ")"));
  };
  const auto known = [&](int32_t token) {
    return token >= 0 && static_cast<size_t>(token) < config.vocab_size;
  };
  for (const int32_t token : request.prompt) {
    if (!known(token)) return unknown("token_ids", token);
  }
  for (const LogitBias& bias : request.sampling.logit_bias) {
    if (!known(bias.token)) return unknown("logit_bias", bias.token);
  }
  return absl::OkStatus();
}

absl::Status EngineCore::Refuse(RejectionReason reason, absl::Status status) {
  observer_->OnRejected(reason);
  return status;
}

absl::StatusOr<Engine::RequestHandle> EngineCore::Submit(GenerationRequest request,
                                                         std::shared_ptr<GenerationSink> sink) {
  if (absl::Status status = Validate(request); !status.ok()) return status;
  const absl::Time now = options_.clock->Now();
  auto live = std::make_unique<LiveRequest>(
      std::move(request), std::move(sink), weights_->config, *tokenizer_,
      LiveRequest::CachePolicy{options_.prefix_cache, options_.optimistic_admission}, now);
  const GenerationRequest& asked = live->request();
  if (live->WorstCaseBlocks() > kv_pool_->total_blocks()) {  // for ever: no hint when to retry
    return Refuse(RejectionReason::kKvCache,
                  absl::ResourceExhaustedError(absl::StrCat(
                      "kv_cache: ", asked.prompt.size(), " prompt tokens, max_tokens ",
                      asked.max_tokens, " and n ", asked.n, " exceed the cache's capacity of ",
                      kv_capacity_tokens(), " tokens")));
  }
  MutexLock lock(&mutex_);
  if (draining_ || stopping_) {
    return Refuse(RejectionReason::kDraining, absl::UnavailableError("the server is draining"));
  }
  if (auto refusal = admission_.Check(asked, now)) {
    return Refuse(refusal->reason, std::move(refusal->status));
  }
  if (IsIdle()) last_progress_ = now;
  admission_.BeginWait(asked);
  ++unfinished_;
  ++gauges_.requests_waiting;
  const uint64_t id = next_id_++;
  live->set_id(id);
  inbox_.push_back(std::move(live));
  work_.NotifyAll();
  return id;
}

void EngineCore::Cancel(RequestHandle handle) {
  MutexLock lock(&mutex_);
  if (unfinished_ == 0) return;
  cancelled_.insert(handle);
  work_.NotifyAll();
}

void EngineCore::BeginDrain() {
  MutexLock lock(&mutex_);
  draining_ = true;
}

bool EngineCore::FinishDrain(absl::Time deadline) {
  MutexLock lock(&mutex_);
  draining_ = true;
  while (!IsIdle() && idle_.WaitUntil(&mutex_, deadline)) {
  }
  if (IsIdle()) return true;
  cancel_all_ = true;
  work_.NotifyAll();
  while (!IsIdle()) idle_.Wait(&mutex_);
  return false;
}

bool EngineCore::MakingProgress(absl::Duration limit) const {
  MutexLock lock(&mutex_);
  return unfinished_ == 0 || options_.clock->Now() - last_progress_ <= limit;
}

EngineGauges EngineCore::gauges() const {
  MutexLock lock(&mutex_);
  return gauges_;
}

bool EngineCore::HasNews() const {
  return stopping_ || cancel_all_ || !inbox_.empty() || !cancelled_.empty();
}

bool EngineCore::RunOnce() {
  TakeInbox();
  EndCancelledAndExpired();
  chunk_tokens_ = ChunkBudget();
  const StepPlan plan = Plan();
  if (plan.slices.empty()) return false;  // all that was left has just ended
  PreemptPlanned(plan.preempt);
  AdmitPlanned(plan.admit);
  RunStep(plan);
  return true;
}

void EngineCore::Run() {
  while (true) {
    {
      MutexLock lock(&mutex_);
      if (running_.empty() && waiting_.empty()) {
        while (!HasNews()) work_.Wait(&mutex_);
      }
      if (stopping_) break;
    }
    RunOnce();
  }
  TakeInbox();  // what came last
  cancel_all_now_ = true;
  EndCancelledAndExpired();
}

void EngineCore::Stop() {
  MutexLock lock(&mutex_);
  stopping_ = true;
  work_.NotifyAll();
}

void EngineCore::TakeInbox() {
  MutexLock lock(&mutex_);
  const absl::Time now = options_.clock->Now();
  for (Owned& live : inbox_) {
    const GenerationRequest& request = live->request();
    const uint64_t id = live->id();
    queue_.Push(id, request.priority, request.client, live->WorstCaseTokens(), now);
    waiting_.emplace(id, std::move(live));
  }
  inbox_.clear();
  cancel_now_ = std::exchange(cancelled_, {});
  cancel_all_now_ = std::exchange(cancel_all_, false);
}

void EngineCore::EndCancelledAndExpired() {
  const absl::Time now = options_.clock->Now();
  const auto verdict = [&](const LiveRequest& request) -> std::optional<FinishReason> {
    if (cancel_all_now_ || cancel_now_.contains(request.id())) return FinishReason::kCancelled;
    if (request.request().deadline <= now) return FinishReason::kDeadlineExceeded;
    return std::nullopt;
  };
  std::vector<std::pair<uint64_t, FinishReason>> ended_waiting;
  for (const auto& [id, request] : waiting_) {
    if (const auto reason = verdict(*request)) ended_waiting.emplace_back(id, *reason);
  }
  std::sort(ended_waiting.begin(), ended_waiting.end());
  for (const auto& [id, reason] : ended_waiting) EndWaiting(id, reason);

  std::vector<Ending> ended_running;
  for (const Owned& request : running_) {
    if (const auto reason = verdict(*request)) {
      ended_running.push_back({request->id(), *reason, absl::OkStatus()});
    }
  }
  for (Ending& ending : ended_running) EndRunning(std::move(ending));
}

// Tokens of prompts in a step beside what decodes now.
uint32_t EngineCore::ChunkBudget() const {
  ChunkQuestion question = {.cost = cost_,
                            .decodes = {},
                            .prompts = static_cast<uint32_t>(waiting_.size()),
                            .target = options_.target_itl,
                            .max_tokens = options_.max_batch_tokens};
  for (const Owned& request : running_) {
    if (request->prompt_left() > 0) {
      ++question.prompts;
      continue;
    }
    for (const Sequence& sequence : request->sequences()) {
      if (sequence.ended()) continue;
      ++question.decodes.decode_rows;
      question.decodes.context += sequence.position();
    }
  }
  return ChunkTokens(question);
}

StepPlan EngineCore::Plan() const {
  std::vector<RunningView> running;
  running.reserve(running_.size());
  size_t reserved = 0;
  uint32_t places = 0;
  for (const Owned& request : running_) {
    request->AppendRunningViews(&running);
    reserved += request->BlocksToCome();
  }
  for (const RunningView& view : running) places += view.sequences;
  // No more can be admitted at once than the batch has places.
  std::vector<WaitingView> waiting;
  if (places < options_.max_batch_size && !waiting_.empty()) {
    for (const uint64_t id : queue_.Next(options_.max_batch_size - places, options_.clock->Now())) {
      waiting.push_back(waiting_.at(id)->waiting_view(*kv_pool_));
    }
  }
  return PlanStep({.running = running,
                   .waiting = waiting,
                   .max_batch_size = options_.max_batch_size,
                   .max_batch_tokens = options_.max_batch_tokens,
                   .max_prefill_tokens = chunk_tokens_,
                   .max_scored_tokens = kMaxScoredTokens,
                   .free_kv_blocks = static_cast<uint32_t>(kv_pool_->available_blocks()),
                   .reserved_kv_blocks = static_cast<uint32_t>(reserved),
                   .may_preempt = options_.optimistic_admission});
}

void EngineCore::PreemptPlanned(const std::vector<uint64_t>& ids) {
  preemptions_ = static_cast<uint32_t>(ids.size());
  for (const uint64_t id : ids) {
    const auto it = FindRunning(id);
    Owned request = std::move(*it);
    running_.erase(it);
    request->Preempt();
    queue_.PushPreempted(id);
    {
      MutexLock lock(&mutex_);
      admission_.BeginWait(request->request());
    }
    waiting_.emplace(id, std::move(request));
  }
}

// The plan admits from the front of the queue, in its order.
void EngineCore::AdmitPlanned(const std::vector<uint64_t>& ids) {
  const absl::Time now = options_.clock->Now();
  prefix_queries_ = 0;
  prefix_hits_ = 0;
  for (const uint64_t id : ids) {
    auto node = waiting_.extract(id);
    Owned& live = node.mapped();
    const bool first_time = !live->was_admitted();
    // The plan counted the same blocks: what is short here was never to be had.
    if (!live->Admit(kv_pool_.get(), now)) {
      waiting_.insert(std::move(node));
      break;
    }
    if (first_time && live->looks_up_prompt()) {
      prefix_queries_ += static_cast<uint32_t>(live->request().prompt.size());
      prefix_hits_ += live->cached_tokens();
    }
    queue_.Admit(id, now);
    {
      MutexLock lock(&mutex_);
      admission_.EndWait(live->request());
    }
    running_.push_back(std::move(live));
  }
  if (!ids.empty()) PublishGauges();
}

void EngineCore::RunStep(const StepPlan& plan) {
  const absl::Time start = options_.clock->Now();
  PutStep(plan);
  if (step_.empty()) return;
  if (const absl::Status status = runner_->Forward(batch_); !status.ok()) return Fail(status);
  Advance(options_.clock->Now());
  runner_->ReadLogits(draws_, scores_);

  std::vector<Ending> ended;
  const absl::Time now = options_.clock->Now();
  HandOutScores();
  HandOutTokens(now, &ended);
  // Counted first: who sees a request's end sees it in the metrics too.
  Report(now - start);
  for (Ending& ending : ended) EndRunning(std::move(ending));
}

// What the step was for can't go on: its keys and values are undefined.
void EngineCore::Fail(const absl::Status& status) {
  std::set<uint64_t> ids;
  for (const StepSlice& slice : step_) ids.insert(slice.request->id());
  for (const uint64_t id : ids) EndRunning({id, FinishReason::kError, status});
}

void EngineCore::PutStep(const StepPlan& plan) {
  std::unordered_map<uint64_t, LiveRequest*> by_id;
  for (const Owned& request : running_) by_id[request->id()] = request.get();
  step_.clear();
  batch_.clear();
  for (const PlannedSlice& planned : plan.slices) {
    const auto it = by_id.find(planned.id);
    if (it == by_id.end()) continue;
    LiveRequest* const request = it->second;
    const bool prompt = request->prompt_left() > 0;
    const uint32_t tokens =
        prompt ? std::min(planned.tokens, request->prompt_left()) : planned.tokens;
    if (!request->PrepareSlice(planned.sequence, tokens)) continue;
    batch_.push_back(request->NextSlice(planned.sequence, tokens));
    step_.push_back(
        {.request = request, .sequence = planned.sequence, .tokens = tokens, .decodes = !prompt});
  }
}

// Behind Forward: what was computed counts, and it shows what to draw and to score.
void EngineCore::Advance(absl::Time now) {
  draws_.clear();
  scores_.clear();
  size_t row = 0;
  size_t logit_row = 0;
  for (size_t i = 0; i < step_.size(); ++i) {
    const StepSlice& slice = step_[i];
    LiveRequest& request = *slice.request;
    const auto& prompt = request.request().prompt;
    const LogitRows wanted = batch_[i].logits;
    for (uint32_t t = 0; t < slice.tokens; ++t, ++row) {
      const bool last = t + 1 == slice.tokens;
      const bool has_logits = wanted == LogitRows::kAll || (wanted == LogitRows::kLast && last);
      request.AddActivity(runner_->activity(), row, runner_->cost(),
                          has_logits ? &runner_->head_activity()[logit_row] : nullptr);
      const size_t next = batch_[i].position + t + 1;
      if (wanted == LogitRows::kAll && request.ScoresToken(next)) {
        scores_.push_back({&request, prompt[next], logit_row, {}});
        request.SetScored(next);
      }
      if (has_logits) ++logit_row;
    }
    const bool was_prompt = request.prompt_left() > 0;
    if (!request.Advance(slice.sequence, slice.tokens, kv_pool_.get(), now)) continue;
    if (was_prompt) {
      for (Sequence& sequence : request.sequences()) {
        draws_.push_back({&request, &sequence, logit_row - 1, 0, std::nullopt});
      }
    } else {
      draws_.push_back(
          {&request, &request.sequences()[slice.sequence], logit_row - 1, 0, std::nullopt});
    }
  }
}

// A request's scores stand together.
void EngineCore::HandOutScores() {
  for (size_t i = 0; i < scores_.size();) {
    LiveRequest* const request = scores_[i].request;
    std::vector<TokenLogprob> logprobs;
    for (; i < scores_.size() && scores_[i].request == request; ++i) {
      logprobs.push_back(std::move(scores_[i].logprob));
    }
    request->sink().OnPromptLogprobs(std::move(logprobs));
  }
}

void EngineCore::HandOutTokens(absl::Time now, std::vector<Ending>* ended) {
  inter_token_latencies_.clear();
  times_to_first_token_.clear();
  std::unordered_set<uint64_t> failed;
  for (Draw& draw : draws_) {
    LiveRequest& request = *draw.request;
    if (failed.contains(request.id())) continue;
    if (!draw.token.ok()) {
      ended->push_back({request.id(), FinishReason::kError, draw.token.status()});
      failed.insert(request.id());
      continue;
    }
    const bool first = draw.sequence->index() == 0 && draw.sequence->num_generated() == 0;
    request.TakeToken(*draw.sequence, *draw.token, std::move(draw.logprob), now);
    if (first) times_to_first_token_.push_back(request.time_to_first_token());
    if (const auto latency = draw.sequence->inter_token_latency()) {
      inter_token_latencies_.push_back(*latency);
    }
  }
  for (const Owned& request : running_) {
    if (!request->done() || failed.contains(request->id())) continue;
    const auto& end = request->sequences().front().end();
    ended->push_back(
        {request->id(), end.has_value() ? end->reason : FinishReason::kLength, absl::OkStatus()});
  }
}

void EngineCore::Report(absl::Duration duration) {
  StepReport report;
  report.duration = duration;
  report.sequences = static_cast<uint32_t>(step_.size());
  for (const StepSlice& slice : step_) {
    (slice.decodes ? report.decode_tokens : report.prefill_tokens) += slice.tokens;
  }
  for (const SequenceSlice& slice : batch_) {
    const uint64_t n = slice.tokens.size();
    report.context += n * slice.position + n * (n - 1) / 2;
  }
  report.phase = report.prefill_tokens == 0  ? StepPhase::kDecode
                 : report.decode_tokens == 0 ? StepPhase::kPrefill
                                             : StepPhase::kMixed;
  report.prefix_cache_queries = prefix_queries_;
  report.prefix_cache_hits = prefix_hits_;
  report.preemptions = preemptions_;
  LearnCost(report);
  report.layers = runner_->activity();
  report.inter_token_latencies = inter_token_latencies_;
  report.times_to_first_token = times_to_first_token_;

  Cost flops;
  for (const HeadActivity& head : runner_->head_activity()) {
    flops.performed += runner_->cost().HeadFlops(head);
  }
  Cost bytes = runner_->cost().HeadBytes(runner_->head_activity());
  for (const LayerActivity& layer : report.layers) {
    for (const RowActivity& row : layer.rows) flops += runner_->cost().LayerFlops(row);
    bytes += runner_->cost().LayerBytes(layer.ffn_read);
  }
  report.flops_performed = flops.performed;
  report.flops_skipped = flops.skipped;
  report.weight_bytes_read = bytes.performed;
  report.weight_bytes_skipped = bytes.skipped;

  PublishGauges();
  PublishLoad();
  const EngineGauges now = gauges();
  report.requests_running = now.requests_running;
  report.requests_waiting = now.requests_waiting;
  report.kv_usage_ratio = now.kv_usage_ratio;
  observer_->OnStep(report);
}

void EngineCore::LearnCost(const StepReport& report) {
  cost_fit_.Add({.prefill_tokens = report.prefill_tokens,
                 .decode_rows = report.decode_tokens,
                 .context = report.context},
                report.duration);
  if (++steps_ % kStepsPerFit != 0 || !cost_fit_.known()) return;
  cost_ = cost_fit_.cost();
  MutexLock lock(&mutex_);
  admission_.SetCost(*cost_);
}

void EngineCore::PublishLoad() {
  Load load;
  double context = 0;
  double answer_tokens = 0;
  for (const Owned& request : running_) {
    load.prompt_tokens += request->prompt_left();
    for (const Sequence& sequence : request->sequences()) {
      if (sequence.ended()) continue;
      ++load.sequences;
      answer_tokens += request->request().max_tokens;
      context += static_cast<double>(sequence.position());
    }
  }
  load.mean_context = context / std::max(1u, load.sequences);
  load.chunk_tokens = chunk_tokens_;
  MutexLock lock(&mutex_);
  admission_.SetRunning(load, answer_tokens);
}

// Memory and counters first, then the sink: its client finds the world as it is without the
// request.
void EngineCore::End(Owned request, FinishReason reason, absl::Status status) {
  const absl::Time now = options_.clock->Now();
  const GenerationRequest& asked = request->request();
  GenerationResult result = request->Finish(reason, std::move(status), now);
  const double generated = result.usage.generated_tokens;
  if (request->was_admitted()) {
    queue_.End(request->id(), request->WorstCaseTokens() - generated -
                                  (result.usage.prompt_tokens - result.usage.cached_tokens));
  } else {
    queue_.Remove(request->id(), now);
  }
  PublishGauges();
  observer_->OnFinish({reason, result.usage, result.timings});
  {
    MutexLock lock(&mutex_);
    admission_.LearnEnd(asked, result);
  }
  request->sink().OnFinish(std::move(result));
  request.reset();
  MutexLock lock(&mutex_);
  if (--unfinished_ == 0) idle_.NotifyAll();
}

std::vector<EngineCore::Owned>::iterator EngineCore::FindRunning(uint64_t id) {
  return std::find_if(running_.begin(), running_.end(),
                      [&](const Owned& request) { return request->id() == id; });
}

void EngineCore::EndRunning(Ending ending) {
  const auto it = FindRunning(ending.id);
  Owned request = std::move(*it);
  running_.erase(it);
  End(std::move(request), ending.reason, std::move(ending.status));
}

void EngineCore::EndWaiting(uint64_t id, FinishReason reason) {
  auto node = waiting_.extract(id);
  {
    MutexLock lock(&mutex_);
    admission_.EndWait(node.mapped()->request());
  }
  End(std::move(node.mapped()), reason, absl::OkStatus());
}

void EngineCore::PublishGauges() {
  EngineGauges now;
  {
    MutexLock lock(&mutex_);
    last_progress_ = options_.clock->Now();
    gauges_.requests_running = static_cast<uint32_t>(running_.size());
    gauges_.requests_waiting = admission_.waiting_requests();
    gauges_.kv_usage_ratio = kv_pool_->usage_ratio();
    now = gauges_;
  }
  observer_->OnGauges(now);
}

}  // namespace firesteel
