#include "runtime/scheduler/engine.h"

#include <algorithm>
#include <map>
#include <set>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "runtime/model/cost_model.h"
#include "runtime/model/kv_cache.h"
#include "runtime/model/transformer.h"
#include "runtime/sampling/sampler.h"
#include "runtime/scheduler/live_request.h"
#include "runtime/scheduler/policy.h"
#include "runtime/threading/cpu_topology.h"
#include "runtime/threading/mutex.h"

namespace firesteel {
namespace {

// Logits are held for so many rows beside one a sequence: prompts whose tokens are scored advance
// by at most that a step.
constexpr uint32_t kMaxScoredTokens = 32;

struct AdmissionOrder {
  bool operator()(const WaitingView& a, const WaitingView& b) const { return AdmittedBefore(a, b); }
};

class EngineImpl final : public Engine {
 public:
  EngineImpl(std::shared_ptr<const ModelWeights> weights,
             std::shared_ptr<const Tokenizer> tokenizer, ComputeType compute,
             const EngineOptions& options, std::unique_ptr<KvBlockPool> kv_pool, WorkerPool* pool,
             EngineObserver* observer);
  ~EngineImpl() override;

  absl::StatusOr<RequestHandle> Submit(GenerationRequest request,
                                       std::shared_ptr<GenerationSink> sink) override;
  void Cancel(RequestHandle handle) override;
  void BeginDrain() override;
  bool FinishDrain(absl::Time deadline) override;
  bool MakingProgress(absl::Duration limit) const override;

  EngineGauges gauges() const override;
  const ModelWeights& weights() const override { return *weights_; }
  const Tokenizer& tokenizer() const override { return *tokenizer_; }
  const EngineOptions& options() const override { return options_; }
  ComputeType compute_type() const override { return compute_; }
  size_t kv_capacity_tokens() const override {
    return kv_pool_->total_blocks() * kernels::kKvBlockTokens;
  }

 private:
  using Owned = std::unique_ptr<LiveRequest>;
  // A slice of the step under way.
  struct StepSlice {
    LiveRequest* request;
    uint32_t sequence;
    uint32_t tokens;
    bool decodes;
  };
  // A token to draw behind the step.
  struct Draw {
    LiveRequest* request;
    Sequence* sequence;
    size_t logit_row;
    absl::StatusOr<int32_t> token = 0;
    std::optional<TokenLogprob> logprob;
  };
  // A token of a prompt that is scored.
  struct Score {
    LiveRequest* request;
    int32_t token;
    size_t logit_row;
    TokenLogprob logprob;
  };

  struct Ending {
    uint64_t id;
    FinishReason reason;
    absl::Status status;
  };

  // Any thread.
  absl::Status Validate(const GenerationRequest& request) const;
  absl::Status Refuse(RejectionReason reason, absl::Status status);
  absl::Duration RetryAfter() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool HasWork() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool IsIdle() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return unfinished_ == 0; }

  // The engine's thread.
  void Loop();
  bool TakeInbox();
  void EndCancelledAndExpired();
  void AdmitPlanned(const std::vector<uint64_t>& ids);
  StepPlan Plan() const;
  void RunStep(const StepPlan& plan);
  void PutStep(const StepPlan& plan);
  void Fail(const absl::Status& status);
  void Advance();
  void ReadLogits();
  void DrawToken(Sampler& sampler, Draw& draw);
  void HandOutScores();
  void HandOutTokens(absl::Time now, std::vector<Ending>* ended);
  void Report(absl::Duration duration);
  void End(Owned request, FinishReason reason, absl::Status status);
  void EndRunning(Ending ending);
  void EndWaiting(const WaitingView& view, FinishReason reason);
  void EndEverything();
  void PublishGauges();

  const std::shared_ptr<const ModelWeights> weights_;
  const std::shared_ptr<const Tokenizer> tokenizer_;
  const ComputeType compute_;
  const EngineOptions options_;
  WorkerPool* const pool_;
  EngineObserver* const observer_;

  mutable Mutex mutex_;
  CondVar work_;  // something came for the engine's thread
  CondVar idle_;  // nothing is left
  std::vector<Owned> inbox_ ABSL_GUARDED_BY(mutex_);
  std::unordered_set<uint64_t> cancelled_ ABSL_GUARDED_BY(mutex_);
  uint64_t next_id_ ABSL_GUARDED_BY(mutex_) = 1;
  uint64_t unfinished_ ABSL_GUARDED_BY(mutex_) = 0;       // submitted and not yet ended
  uint32_t queued_requests_ ABSL_GUARDED_BY(mutex_) = 0;  // in the inbox or waiting
  uint64_t queued_tokens_ ABSL_GUARDED_BY(mutex_) = 0;
  double mean_service_seconds_ ABSL_GUARDED_BY(mutex_) = 0.5;  // admitted → end, exponential mean
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  bool cancel_all_ ABSL_GUARDED_BY(mutex_) = false;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Time last_progress_ ABSL_GUARDED_BY(mutex_);
  EngineGauges gauges_ ABSL_GUARDED_BY(mutex_);

  // Owned by the engine's thread.
  const std::unique_ptr<KvBlockPool> kv_pool_;
  Transformer transformer_;
  const CostModel cost_;
  ChunkBudget chunk_budget_;
  std::map<WaitingView, Owned, AdmissionOrder> waiting_;
  std::vector<Owned> running_;  // in the order of admission
  std::unordered_set<uint64_t> cancel_now_;
  bool cancel_all_now_ = false;
  std::vector<StepSlice> step_;
  std::vector<SequenceSlice> batch_;
  std::vector<Draw> draws_;
  std::vector<Score> scores_;
  std::vector<Sampler> samplers_;  // one a worker
  std::vector<absl::Duration> inter_token_latencies_;
  std::vector<absl::Duration> times_to_first_token_;

  std::thread thread_;  // last: it uses everything above
};

EngineImpl::EngineImpl(std::shared_ptr<const ModelWeights> weights,
                       std::shared_ptr<const Tokenizer> tokenizer, ComputeType compute,
                       const EngineOptions& options, std::unique_ptr<KvBlockPool> kv_pool,
                       WorkerPool* pool, EngineObserver* observer)
    : weights_(std::move(weights)),
      tokenizer_(std::move(tokenizer)),
      compute_(compute),
      options_(options),
      pool_(pool),
      observer_(observer),
      last_progress_(options.clock->Now()),
      kv_pool_(std::move(kv_pool)),
      transformer_(weights_, compute, options.kv_dtype, pool, options.max_batch_tokens,
                   std::min(options.max_batch_tokens, options.max_batch_size + kMaxScoredTokens),
                   *options.sublinear_head ? std::optional(SublinearHeadOptions()) : std::nullopt),
      cost_(*weights_, options.kv_dtype, transformer_.sublinear_head_bytes()),
      chunk_budget_(options.target_itl, options.max_batch_tokens),
      samplers_(pool->num_threads()),
      thread_([this] { Loop(); }) {}

EngineImpl::~EngineImpl() {
  {
    MutexLock lock(&mutex_);
    stopping_ = true;
    work_.NotifyAll();
  }
  thread_.join();
}

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

absl::Status EngineImpl::Validate(const GenerationRequest& request) const {
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

absl::Status EngineImpl::Refuse(RejectionReason reason, absl::Status status) {
  observer_->OnRejected(reason);
  return status;
}

// The queue drains by one request each time a place in the batch becomes free.
absl::Duration EngineImpl::RetryAfter() const {
  const double seconds = mean_service_seconds_ * (1.0 + queued_requests_) / options_.max_batch_size;
  return std::clamp(absl::Seconds(seconds), absl::Milliseconds(50), absl::Seconds(60));
}

absl::StatusOr<Engine::RequestHandle> EngineImpl::Submit(GenerationRequest request,
                                                         std::shared_ptr<GenerationSink> sink) {
  if (absl::Status status = Validate(request); !status.ok()) return status;
  const size_t blocks = KvBlockPool::BlocksFor(request.prompt.size() + request.max_tokens);
  if (blocks > kv_pool_->total_blocks()) {  // for ever: no hint when to retry
    return Refuse(RejectionReason::kKvCache,
                  absl::ResourceExhaustedError(absl::StrCat(
                      "kv_cache: ", request.prompt.size(), " prompt tokens and max_tokens ",
                      request.max_tokens, " exceed the cache's capacity of ", kv_capacity_tokens(),
                      " tokens")));
  }
  const auto exhausted = [](absl::string_view message, absl::Duration retry) {
    absl::Status status = absl::ResourceExhaustedError(message);
    const std::string milliseconds = absl::StrCat(absl::ToInt64Milliseconds(retry));
    // A view: clang and gcc disagree on the mangled name of Cord's constructor from std::string.
    status.SetPayload(kRetryAfterPayload, absl::Cord(absl::string_view(milliseconds)));
    return status;
  };
  MutexLock lock(&mutex_);
  if (draining_ || stopping_) {
    return Refuse(RejectionReason::kDraining, absl::UnavailableError("the server is draining"));
  }
  if (queued_requests_ >= options_.max_queue_requests) {
    return Refuse(RejectionReason::kQueueFull,
                  exhausted(absl::StrCat("queue: ", queued_requests_,
                                         " requests wait, the limit is max-queue-requests ",
                                         options_.max_queue_requests),
                            RetryAfter()));
  }
  if (queued_tokens_ + request.prompt.size() > options_.max_queue_tokens) {
    return Refuse(RejectionReason::kQueueTokens,
                  exhausted(absl::StrCat("queue: ", queued_tokens_, " prompt tokens wait and ",
                                         request.prompt.size(), " more exceed max-queue-tokens ",
                                         options_.max_queue_tokens),
                            RetryAfter()));
  }
  const absl::Time now = options_.clock->Now();
  if (IsIdle()) last_progress_ = now;
  ++queued_requests_;
  queued_tokens_ += request.prompt.size();
  ++unfinished_;
  ++gauges_.requests_waiting;
  const uint64_t id = next_id_++;
  inbox_.push_back(std::make_unique<LiveRequest>(id, std::move(request), std::move(sink),
                                                 weights_->config, *tokenizer_, now));
  work_.NotifyAll();
  return id;
}

void EngineImpl::Cancel(RequestHandle handle) {
  MutexLock lock(&mutex_);
  if (unfinished_ == 0) return;
  cancelled_.insert(handle);
  work_.NotifyAll();
}

void EngineImpl::BeginDrain() {
  MutexLock lock(&mutex_);
  draining_ = true;
}

bool EngineImpl::FinishDrain(absl::Time deadline) {
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

bool EngineImpl::MakingProgress(absl::Duration limit) const {
  MutexLock lock(&mutex_);
  return unfinished_ == 0 || options_.clock->Now() - last_progress_ <= limit;
}

EngineGauges EngineImpl::gauges() const {
  MutexLock lock(&mutex_);
  return gauges_;
}

bool EngineImpl::HasWork() const {
  return stopping_ || cancel_all_ || !inbox_.empty() || !cancelled_.empty();
}

void EngineImpl::Loop() {
  while (TakeInbox()) {
    EndCancelledAndExpired();
    const StepPlan plan = Plan();
    if (plan.slices.empty()) continue;  // all that was left has just ended
    AdmitPlanned(plan.admit);
    RunStep(plan);
  }
  EndEverything();
}

// Waits for something to do. False when the engine stops.
bool EngineImpl::TakeInbox() {
  MutexLock lock(&mutex_);
  if (running_.empty() && waiting_.empty()) {
    while (!HasWork()) work_.Wait(&mutex_);
  }
  for (Owned& request : inbox_) {
    const WaitingView view = request->waiting_view();
    waiting_.emplace(view, std::move(request));
  }
  inbox_.clear();
  cancel_now_.clear();
  std::swap(cancel_now_, cancelled_);
  cancel_all_now_ = std::exchange(cancel_all_, false);
  return !stopping_;
}

void EngineImpl::EndCancelledAndExpired() {
  const absl::Time now = options_.clock->Now();
  const auto verdict = [&](const LiveRequest& request) -> std::optional<FinishReason> {
    if (cancel_all_now_ || cancel_now_.contains(request.id())) return FinishReason::kCancelled;
    if (request.request().deadline <= now) return FinishReason::kDeadlineExceeded;
    return std::nullopt;
  };
  std::vector<std::pair<WaitingView, FinishReason>> ended_waiting;
  for (const auto& [view, request] : waiting_) {
    if (const auto reason = verdict(*request)) ended_waiting.emplace_back(view, *reason);
  }
  for (const auto& [view, reason] : ended_waiting) EndWaiting(view, reason);

  std::vector<Ending> ended_running;
  for (const Owned& request : running_) {
    if (const auto reason = verdict(*request)) {
      ended_running.push_back({request->id(), *reason, absl::OkStatus()});
    }
  }
  for (Ending& ending : ended_running) EndRunning(std::move(ending));
}

StepPlan EngineImpl::Plan() const {
  std::vector<RunningView> running;
  for (const Owned& request : running_) request->AppendRunningViews(&running);
  // No more can be admitted at once than the batch has places.
  std::vector<WaitingView> waiting;
  for (const auto& [view, request] : waiting_) {
    if (waiting.size() + running.size() >= options_.max_batch_size) break;
    waiting.push_back(view);
  }
  return PlanStep({.running = running,
                   .waiting = waiting,
                   .max_batch_size = options_.max_batch_size,
                   .max_batch_tokens = options_.max_batch_tokens,
                   .max_prefill_tokens = chunk_budget_.tokens(),
                   .max_scored_tokens = kMaxScoredTokens,
                   .free_kv_blocks = static_cast<uint32_t>(kv_pool_->free_blocks())});
}

// The plan admits from the front of the queue, in its order.
void EngineImpl::AdmitPlanned(const std::vector<uint64_t>& ids) {
  const absl::Time now = options_.clock->Now();
  for (size_t i = 0; i < ids.size(); ++i) {
    auto node = waiting_.extract(waiting_.begin());
    Owned& live = node.mapped();
    const GenerationRequest& request = live->request();
    // The plan counted the same blocks; a failure here is a broken invariant of this file.
    std::vector<KvLease> leases;
    for (uint32_t k = 0; k < request.n; ++k) {
      leases.push_back(kv_pool_->Lease(request.prompt.size() + request.max_tokens).value());
    }
    live->Admit(std::move(leases), now);
    {
      MutexLock lock(&mutex_);
      --queued_requests_;
      queued_tokens_ -= request.prompt.size();
    }
    running_.push_back(std::move(live));
  }
  if (!ids.empty()) PublishGauges();
}

void EngineImpl::RunStep(const StepPlan& plan) {
  const absl::Time start = options_.clock->Now();
  PutStep(plan);
  if (const absl::Status status = transformer_.Forward(batch_); !status.ok()) return Fail(status);
  Advance();
  ReadLogits();

  std::vector<Ending> ended;
  const absl::Time now = options_.clock->Now();
  HandOutScores();
  HandOutTokens(now, &ended);
  // Counted first: who sees a request's end sees it in the metrics too.
  Report(now - start);
  for (Ending& ending : ended) EndRunning(std::move(ending));
}

// What the step was for can't go on: its keys and values are undefined.
void EngineImpl::Fail(const absl::Status& status) {
  std::set<uint64_t> ids;
  for (const StepSlice& slice : step_) ids.insert(slice.request->id());
  for (const uint64_t id : ids) EndRunning({id, FinishReason::kError, status});
}

void EngineImpl::PutStep(const StepPlan& plan) {
  std::unordered_map<uint64_t, LiveRequest*> by_id;
  for (const Owned& request : running_) by_id[request->id()] = request.get();
  step_.clear();
  batch_.clear();
  for (const PlannedSlice& planned : plan.slices) {
    LiveRequest* const request = by_id.at(planned.id);
    batch_.push_back(request->NextSlice(planned.sequence, planned.tokens));
    step_.push_back({.request = request,
                     .sequence = planned.sequence,
                     .tokens = planned.tokens,
                     .decodes = request->prompt_left() == 0});
  }
}

// Behind Forward: what was computed counts, and it shows what to draw and to score.
void EngineImpl::Advance() {
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
      request.AddActivity(transformer_.activity(), row, cost_,
                          has_logits ? &transformer_.head_activity()[logit_row] : nullptr);
      const size_t next = batch_[i].position + t + 1;
      if (wanted == LogitRows::kAll && next < prompt.size()) {
        scores_.push_back({&request, prompt[next], logit_row, {}});
      }
      if (has_logits) ++logit_row;
    }
    const bool was_prompt = request.prompt_left() > 0;
    if (!request.Advance(slice.sequence, slice.tokens)) continue;
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

// Draws and scores are dealt to the workers; each depends on its own sequence only.
void EngineImpl::ReadLogits() {
  if (draws_.empty() && scores_.empty()) return;
  pool_->Run([this](Worker& worker) {
    const size_t total = draws_.size() + scores_.size();
    for (size_t i = worker.index(); i < total; i += worker.team_size()) {
      if (i < draws_.size()) {
        DrawToken(samplers_[worker.index()], draws_[i]);
        continue;
      }
      Score& score = scores_[i - draws_.size()];
      score.logprob = LogprobOf(transformer_.logits(score.logit_row), score.token,
                                score.request->request().logprobs.value_or(0));
    }
  });
}

void EngineImpl::DrawToken(Sampler& sampler, Draw& draw) {
  const GenerationRequest& request = draw.request->request();
  const Sequence& sequence = *draw.sequence;
  const uint64_t position = sequence.next_position();
  const auto forbidden = sequence.forbidden_tokens();
  if (const LogitCandidates some = transformer_.candidates(draw.logit_row); !some.ids.empty()) {
    draw.token = sampler.Sample(some.ids, some.logits, request.sampling, sequence.index(), position,
                                forbidden);
    return;
  }
  const std::span<const float> logits = transformer_.logits(draw.logit_row);
  draw.token = sampler.Sample(logits, request.sampling, sequence.index(), position, forbidden,
                              sequence.seen());
  if (draw.token.ok() && request.logprobs.has_value()) {
    draw.logprob = LogprobOf(logits, *draw.token, *request.logprobs);
  }
}

// A request's scores stand together.
void EngineImpl::HandOutScores() {
  for (size_t i = 0; i < scores_.size();) {
    LiveRequest* const request = scores_[i].request;
    std::vector<TokenLogprob> logprobs;
    for (; i < scores_.size() && scores_[i].request == request; ++i) {
      logprobs.push_back(std::move(scores_[i].logprob));
    }
    request->sink().OnPromptLogprobs(std::move(logprobs));
  }
}

void EngineImpl::HandOutTokens(absl::Time now, std::vector<Ending>* ended) {
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

void EngineImpl::Report(absl::Duration duration) {
  StepReport report;
  report.duration = duration;
  report.sequences = static_cast<uint32_t>(step_.size());
  for (const StepSlice& slice : step_) {
    (slice.decodes ? report.decode_tokens : report.prefill_tokens) += slice.tokens;
  }
  report.phase = report.prefill_tokens == 0  ? StepPhase::kDecode
                 : report.decode_tokens == 0 ? StepPhase::kPrefill
                                             : StepPhase::kMixed;
  if (report.phase == StepPhase::kMixed) chunk_budget_.Update(report.prefill_tokens, duration);
  report.layers = transformer_.activity();
  report.inter_token_latencies = inter_token_latencies_;
  report.times_to_first_token = times_to_first_token_;

  Cost flops;
  for (const HeadActivity& head : transformer_.head_activity()) {
    flops.performed += cost_.HeadFlops(head);
  }
  Cost bytes = cost_.HeadBytes(transformer_.head_activity());
  for (const LayerActivity& layer : report.layers) {
    for (const RowActivity& row : layer.rows) flops += cost_.LayerFlops(row);
    bytes += cost_.LayerBytes(layer.ffn_union);
  }
  report.flops_performed = flops.performed;
  report.flops_skipped = flops.skipped;
  report.weight_bytes_read = bytes.performed;
  report.weight_bytes_skipped = bytes.skipped;

  PublishGauges();
  const EngineGauges now = gauges();
  report.requests_running = now.requests_running;
  report.requests_waiting = now.requests_waiting;
  report.kv_usage_ratio = now.kv_usage_ratio;
  observer_->OnStep(report);
}

// Memory and counters first, then the sink: its client finds the world as it is without the
// request.
void EngineImpl::End(Owned request, FinishReason reason, absl::Status status) {
  GenerationResult result = request->Finish(reason, std::move(status), options_.clock->Now());
  const double seconds = absl::ToDoubleSeconds(result.timings.total - result.timings.queue);
  PublishGauges();
  observer_->OnFinish({reason, result.usage, result.timings});
  request->sink().OnFinish(std::move(result));
  request.reset();
  MutexLock lock(&mutex_);
  if (--unfinished_ == 0) idle_.NotifyAll();
  mean_service_seconds_ += 0.1 * (seconds - mean_service_seconds_);
}

void EngineImpl::EndRunning(Ending ending) {
  const auto it = std::find_if(running_.begin(), running_.end(),
                               [&](const Owned& request) { return request->id() == ending.id; });
  Owned request = std::move(*it);
  running_.erase(it);
  End(std::move(request), ending.reason, std::move(ending.status));
}

void EngineImpl::EndWaiting(const WaitingView& view, FinishReason reason) {
  auto node = waiting_.extract(view);
  {
    MutexLock lock(&mutex_);
    --queued_requests_;
    queued_tokens_ -= view.prompt_tokens;
  }
  End(std::move(node.mapped()), reason, absl::OkStatus());
}

void EngineImpl::EndEverything() {
  cancel_all_now_ = true;
  EndCancelledAndExpired();
}

void EngineImpl::PublishGauges() {
  EngineGauges now;
  {
    MutexLock lock(&mutex_);
    last_progress_ = options_.clock->Now();
    gauges_.requests_running = static_cast<uint32_t>(running_.size());
    gauges_.requests_waiting = queued_requests_;
    gauges_.kv_usage_ratio = kv_pool_->usage_ratio();
    now = gauges_;
  }
  observer_->OnGauges(now);
}

absl::Status CheckAtLeastOne(absl::string_view option, uint64_t value) {
  if (value >= 1) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(option, ": ", value, " is below 1"));
}

absl::Status CheckOptions(const EngineOptions& options) {
  for (const auto& [name, value] :
       {std::pair<const char*, uint64_t>{"max-batch-size", options.max_batch_size},
        {"max-batch-tokens", options.max_batch_tokens},
        {"max-queue-requests", options.max_queue_requests},
        {"max-queue-tokens", options.max_queue_tokens}}) {
    if (absl::Status status = CheckAtLeastOne(name, value); !status.ok()) return status;
  }
  if (options.max_batch_tokens < options.max_batch_size) {
    return absl::InvalidArgumentError(absl::StrCat("max-batch-tokens: ", options.max_batch_tokens,
                                                   " is below max-batch-size ",
                                                   options.max_batch_size));
  }
  return absl::OkStatus();
}

}  // namespace

size_t DefaultKvCacheBytes(const ModelConfig& config, kernels::DType kv_dtype,
                           uint32_t max_batch_size) {
  const size_t context = KvBlockPool::BlocksFor(config.max_position_embeddings) *
                         KvBlockPool::BytesPerBlock(config, kv_dtype);
  return std::max(context, std::min(context * max_batch_size, MemoryLimitBytes() / 4));
}

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(std::shared_ptr<const ModelWeights> weights,
                                                       std::shared_ptr<const Tokenizer> tokenizer,
                                                       ComputeType compute,
                                                       const EngineOptions& options,
                                                       WorkerPool* pool, EngineObserver* observer) {
  if (absl::Status status = CheckOptions(options); !status.ok()) return status;
  if (auto possible = ResolveComputeType(compute, weights->dtype); !possible.ok()) {
    return possible.status();
  }
  EngineOptions resolved = options;
  if (resolved.kv_cache_bytes == 0) {
    resolved.kv_cache_bytes =
        DefaultKvCacheBytes(weights->config, options.kv_dtype, options.max_batch_size);
  }
  if (!resolved.sublinear_head.has_value()) {
    resolved.sublinear_head = weights->embedding.bytes() > kSublinearHeadBytes;
  }
  auto kv_pool = KvBlockPool::Create(weights->config, resolved.kv_dtype, resolved.kv_cache_bytes);
  if (!kv_pool.ok()) return kv_pool.status();
  return std::make_unique<EngineImpl>(std::move(weights), std::move(tokenizer), compute, resolved,
                                      *std::move(kv_pool), pool, observer);
}

}  // namespace firesteel
