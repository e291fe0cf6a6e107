#include "server/fake_engine.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace firesteel::server {

ModelConfig FakeModelConfig() {
  ModelConfig config;
  config.architecture = Architecture::kSparkGemma2;
  config.vocab_size = 300;
  config.hidden_size = 32;
  config.intermediate_size = 100;
  config.num_layers = 2;
  config.num_heads = 2;
  config.num_kv_heads = 1;
  config.head_dim = 16;
  config.sliding_window = 16;
  config.max_position_embeddings = 128;
  config.layer_types = {AttentionKind::kSliding, AttentionKind::kFull};
  config.query_pre_attn_scalar = 16;
  config.ffn_predictor_dim = 16;
  config.ffn_top_k = 8;
  config.attention_predictor_dim = 8;
  config.attention_top_k = 4;
  return config;
}

absl::StatusOr<std::vector<int32_t>> FakeTokenizer::EncodePrompt(absl::string_view text) const {
  std::vector<int32_t> ids = {2};
  for (const unsigned char c : text) ids.push_back(3 + c);
  return ids;
}

const std::string& FakeTokenizer::TokenBytes(int32_t token_id) const {
  static const auto* const bytes = [] {
    auto* const all = new std::vector<std::string>(300);
    for (int i = 0; i < 256; ++i) (*all)[3 + i] = std::string(1, static_cast<char>(i));
    return all;
  }();
  return (*bytes)[static_cast<size_t>(token_id)];
}

GenerationResult FakeResult(FinishReason reason, uint32_t generated_tokens) {
  GenerationResult result;
  result.reason = reason;
  result.usage = {.prompt_tokens = 4, .cached_tokens = 0, .generated_tokens = generated_tokens};
  result.timings = {.queue = absl::Milliseconds(1),
                    .prefill = absl::Milliseconds(20),
                    .first_token = absl::Milliseconds(21),
                    .decode = absl::Milliseconds(40),
                    .total = absl::Milliseconds(61)};
  result.sparsity = {.ffn_active_fraction = 0.08,
                     .attention_attended_positions = 12.5,
                     .attention_attended_fraction = 0.25,
                     .flops_skipped_fraction = 0.5};
  return result;
}

FakeEngine::FakeEngine(EngineObserver* observer, ModelConfig config) : observer_(observer) {
  weights_.config = std::move(config);
  thread_ = std::thread([this] { Main(); });
}

FakeEngine::~FakeEngine() {
  FinishDrain(absl::InfinitePast());
  {
    MutexLock lock(&mutex_);
    stopping_ = true;
    changed_.NotifyAll();
  }
  thread_.join();
}

// --- The engine's thread ---

absl::Time FakeEngine::NextDeadline() const {
  absl::Time next = absl::InfiniteFuture();
  for (const auto& [handle, running] : running_) next = std::min(next, running.request.deadline);
  return next;
}

void FakeEngine::PostExpired() {
  const absl::Time now = absl::Now();
  for (const auto& [handle, running] : running_) {
    if (running.request.deadline > now) continue;
    actions_.push_back([this, h = handle] { End(h, FakeResult(FinishReason::kDeadlineExceeded)); });
  }
}

void FakeEngine::Main() {
  while (true) {
    std::deque<Action> actions;
    {
      MutexLock lock(&mutex_);
      busy_ = false;
      changed_.NotifyAll();
      // A request that came meanwhile may have an earlier deadline: Submit posts an action, so this
      // wakes up.
      while (!stopping_ && actions_.empty()) {
        if (!changed_.WaitUntil(&mutex_, NextDeadline())) break;
      }
      PostExpired();
      if (stopping_ && actions_.empty()) return;
      busy_ = true;
      actions.swap(actions_);
    }
    for (const Action& action : actions) action();
  }
}

void FakeEngine::Post(Action action) {
  MutexLock lock(&mutex_);
  actions_.push_back(std::move(action));
  changed_.NotifyAll();
}

void FakeEngine::End(RequestHandle handle, GenerationResult result) {
  std::shared_ptr<GenerationSink> sink;
  {
    MutexLock lock(&mutex_);
    const auto entry = running_.find(handle);
    if (entry == running_.end()) return;
    sink = std::move(entry->second.sink);
    running_.erase(entry);
    changed_.NotifyAll();
  }
  if (observer_ != nullptr) observer_->OnFinish({result.reason, result.usage, result.timings});
  sink->OnFinish(std::move(result));
}

// --- The script ---

void FakeEngine::RefuseNext(absl::Status status, std::optional<RejectionReason> reason) {
  MutexLock lock(&mutex_);
  refusal_.emplace(std::move(status), reason);
}

void FakeEngine::AnswerAll(uint32_t tokens) {
  MutexLock lock(&mutex_);
  answer_tokens_ = tokens;
}

Engine::RequestHandle FakeEngine::WaitForRequest(size_t index) {
  MutexLock lock(&mutex_);
  while (admitted_.size() <= index) changed_.Wait(&mutex_);
  return admitted_[index];
}

Engine::RequestHandle FakeEngine::HandleOf(const std::string& request_id) {
  MutexLock lock(&mutex_);
  return std::find_if(requests_.begin(), requests_.end(),
                      [&](const auto& entry) { return entry.second.request_id == request_id; })
      ->first;
}

GenerationRequest FakeEngine::request(RequestHandle handle) {
  MutexLock lock(&mutex_);
  return requests_.at(handle);
}

void FakeEngine::Emit(RequestHandle handle, std::string text, std::vector<int32_t> token_ids) {
  TokenDelta delta;
  delta.text = std::move(text);
  delta.token_ids = std::move(token_ids);
  Emit(handle, std::move(delta));
}

std::shared_ptr<GenerationSink> FakeEngine::SinkOf(RequestHandle handle) {
  MutexLock lock(&mutex_);
  const auto entry = running_.find(handle);
  return entry == running_.end() ? nullptr : entry->second.sink;
}

void FakeEngine::Emit(RequestHandle handle, TokenDelta delta) {
  Post([this, handle, delta = std::move(delta)] {
    if (const auto sink = SinkOf(handle)) sink->OnDelta(delta);
  });
}

void FakeEngine::EmitPromptLogprobs(RequestHandle handle) {
  std::vector<TokenLogprob> logprobs;
  const std::vector<int32_t> prompt = request(handle).prompt;
  for (size_t i = 1; i < prompt.size(); ++i) {
    logprobs.push_back({.token_id = prompt[i], .logprob = -static_cast<float>(i)});
  }
  Post([this, handle, logprobs = std::move(logprobs)] {
    if (const auto sink = SinkOf(handle)) sink->OnPromptLogprobs(logprobs);
  });
}

void FakeEngine::Answer(RequestHandle handle, uint32_t tokens) {
  const GenerationRequest asked = request(handle);
  if (asked.prompt_logprobs) EmitPromptLogprobs(handle);
  const uint32_t count = std::min(tokens, asked.max_tokens);
  for (uint32_t i = 0; i < count; ++i) {
    for (uint32_t index = 0; index < asked.n; ++index) {
      TokenDelta delta;
      delta.index = index;
      delta.text = absl::StrCat("t", i, " ");
      delta.token_ids = {static_cast<int32_t>(i)};
      if (asked.logprobs.has_value()) {
        TokenLogprob entry = {.token_id = static_cast<int32_t>(i), .logprob = -0.5f};
        for (uint32_t k = 0; k < *asked.logprobs; ++k) {
          entry.alternatives.push_back({.token_id = static_cast<int32_t>(k), .logprob = -0.5f});
        }
        delta.logprobs.push_back(std::move(entry));
      }
      if (i + 1 == count) delta.end = SequenceEnd{FinishReason::kLength, ""};
      Emit(handle, std::move(delta));
    }
  }
  Finish(handle, FakeResult(FinishReason::kLength, count * asked.n));
}

void FakeEngine::Finish(RequestHandle handle, GenerationResult result) {
  Post([this, handle, result = std::move(result)] { End(handle, result); });
}

void FakeEngine::WaitUntilIdle() {
  MutexLock lock(&mutex_);
  while (!actions_.empty() || busy_) changed_.Wait(&mutex_);
}

void FakeEngine::WaitForCancel(RequestHandle handle) {
  MutexLock lock(&mutex_);
  while (std::find(cancelled_.begin(), cancelled_.end(), handle) == cancelled_.end()) {
    changed_.Wait(&mutex_);
  }
}

size_t FakeEngine::num_admitted() {
  MutexLock lock(&mutex_);
  return admitted_.size();
}

bool FakeEngine::empty() {
  MutexLock lock(&mutex_);
  return running_.empty();
}

void FakeEngine::SetMakingProgress(bool moving) {
  MutexLock lock(&mutex_);
  moving_ = moving;
}

void FakeEngine::WaitForDrain() {
  MutexLock lock(&mutex_);
  while (!draining_) changed_.Wait(&mutex_);
}

void FakeEngine::PassDrainDeadline() {
  MutexLock lock(&mutex_);
  drain_deadline_passed_ = true;
  changed_.NotifyAll();
}

// --- Engine ---

absl::StatusOr<Engine::RequestHandle> FakeEngine::Submit(GenerationRequest request,
                                                         std::shared_ptr<GenerationSink> sink) {
  RequestHandle handle = 0;
  uint32_t tokens = 0;
  {
    MutexLock lock(&mutex_);
    if (draining_) {
      if (observer_ != nullptr) observer_->OnRejected(RejectionReason::kDraining);
      return absl::UnavailableError("the model is draining");
    }
    if (refusal_.has_value()) {
      const auto [status, reason] = *std::exchange(refusal_, std::nullopt);
      if (observer_ != nullptr && reason.has_value()) observer_->OnRejected(*reason);
      return status;
    }
    handle = next_handle_++;
    tokens = answer_tokens_;
    requests_.emplace(handle, request);
    running_.emplace(handle, Running{std::move(request), std::move(sink)});
    admitted_.push_back(handle);
    actions_.push_back([] {});  // wakes the thread, for the deadline
    changed_.NotifyAll();
  }
  if (tokens > 0) Answer(handle, tokens);
  return handle;
}

void FakeEngine::Cancel(RequestHandle handle) {
  {
    MutexLock lock(&mutex_);
    cancelled_.push_back(handle);
    changed_.NotifyAll();
  }
  Finish(handle, FakeResult(FinishReason::kCancelled));
}

void FakeEngine::BeginDrain() {
  MutexLock lock(&mutex_);
  draining_ = true;
  changed_.NotifyAll();
}

bool FakeEngine::FinishDrain(absl::Time deadline) {
  std::vector<RequestHandle> left;
  {
    MutexLock lock(&mutex_);
    draining_ = true;
    while (!running_.empty() && !drain_deadline_passed_) {
      if (!changed_.WaitUntil(&mutex_, deadline)) break;
    }
    if (running_.empty()) return true;
    for (const auto& [handle, running] : running_) left.push_back(handle);
  }
  for (const RequestHandle handle : left) Finish(handle, FakeResult(FinishReason::kCancelled));
  MutexLock lock(&mutex_);
  while (!running_.empty()) changed_.Wait(&mutex_);
  return false;
}

bool FakeEngine::MakingProgress(absl::Duration) const {
  MutexLock lock(&mutex_);
  return moving_;
}

void FakeEngine::SetGauges(uint32_t requests_waiting, double kv_usage_ratio) {
  MutexLock lock(&mutex_);
  gauges_.requests_waiting = requests_waiting;
  gauges_.kv_usage_ratio = kv_usage_ratio;
}

EngineGauges FakeEngine::gauges() const {
  MutexLock lock(&mutex_);
  EngineGauges gauges = gauges_;
  gauges.requests_running = static_cast<uint32_t>(running_.size());
  return gauges;
}

}  // namespace firesteel::server
