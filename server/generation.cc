#include "server/generation.h"

#include <algorithm>
#include <utility>

#include "absl/random/random.h"
#include "absl/strings/str_cat.h"
#include "server/answer_size.h"
#include "server/status.h"

namespace firesteel::server {
namespace {

// A model that was replaced while a request was on its way to it refuses the request; its successor
// takes it. More often than this no model is replaced in that time.
constexpr int kMaxAttempts = 3;

uint64_t RandomSeed() {
  thread_local absl::BitGen generator;
  return absl::Uniform<uint64_t>(generator);
}

size_t BytesOf(const std::vector<TokenLogprob>& logprobs) {
  size_t bytes = 0;
  for (const TokenLogprob& entry : logprobs) {
    bytes += sizeof(entry) + entry.alternatives.size() * sizeof(TokenAlternative);
  }
  return bytes;
}

size_t BytesOf(const SequenceOutput& output) {
  return output.text.size() + BytesOf(output.logprobs);
}

template <typename T>
void Append(std::vector<T> from, std::vector<T>* to) {
  to->insert(to->end(), std::make_move_iterator(from.begin()), std::make_move_iterator(from.end()));
}

}  // namespace

absl::StatusOr<std::shared_ptr<Generation>> Generation::Start(
    const ModelRegistry& models, const std::string& model_name, const Translate& translate,
    const CallMetadata& metadata, const Caller& caller,
    const std::shared_ptr<OutputListener>& listener) {
  for (int attempt = 1;; ++attempt) {
    auto model = models.Find(model_name);
    if (!model.ok()) return model.status();
    auto translated = translate(**model);
    if (!translated.ok()) return translated.status();
    GenerationRequest& request = translated->request;
    request.request_id = metadata.request_id;
    request.deadline = std::min(request.deadline, metadata.deadline);
    request.client = caller.name;
    if (translated->needs_seed) request.sampling.seed = RandomSeed();
    std::unique_ptr<Quota::Lease> quota;
    if (caller.quota != nullptr) {
      auto lease = caller.quota->Admit();
      if (!lease.ok()) return lease.status();
      quota = *std::move(lease);
    }
    const uint64_t prompt_tokens = request.prompt.size();
    const auto generation =
        std::make_shared<Generation>(*model, *translated, std::move(quota), listener);
    const auto handle = (*model)->engine->Submit(std::move(request), generation);
    if (handle.ok()) {
      generation->Submitted(*handle, prompt_tokens);
      return generation;
    }
    if (!absl::IsUnavailable(handle.status()) || attempt == kMaxAttempts) return handle.status();
    const auto now = models.Find(model_name);
    if (!now.ok()) return now.status();  // it was unloaded
    if (*now == *model) return handle.status();
  }
}

Generation::Generation(std::shared_ptr<const ServedModel> model, const TranslatedRequest& request,
                       std::unique_ptr<Quota::Lease> quota,
                       std::shared_ptr<OutputListener> listener)
    : model_(std::move(model)),
      return_token_ids_(request.return_token_ids),
      score_(request.request.max_tokens == 0),
      first_token_(request.request.prompt.front()),
      deadline_(request.request.deadline),
      quota_(std::move(quota)),
      listener_(std::move(listener)),
      sequences_(request.request.n),
      ended_(request.request.n) {
  if (!request.echo) return;
  MutexLock lock(&mutex_);
  Echo(request);
}

void Generation::Echo(const TranslatedRequest& request) {
  for (SequenceOutput& sequence : sequences_) {
    sequence.text = request.prompt_text;
    if (return_token_ids_) sequence.token_ids = request.request.prompt;
    if (request.request.prompt_logprobs) {
      sequence.starts_prompt = true;
      sequence.logprobs.push_back({.token_id = first_token_});
    }
    pending_bytes_ += sequence.text.size();
  }
}

void Generation::Submitted(Engine::RequestHandle handle, uint64_t prompt_tokens) {
  MutexLock lock(&mutex_);
  handle_ = handle;
  if (quota_ != nullptr) quota_->Charge(prompt_tokens);
}

void Generation::OnPromptLogprobs(std::vector<TokenLogprob> logprobs) {
  std::shared_ptr<OutputListener> listener;
  {
    MutexLock lock(&mutex_);
    if (abandoned_) return;
    if (score_) {
      Append(std::move(logprobs), &prompt_logprobs_);
      return;
    }
    pending_bytes_ += BytesOf(logprobs) * sequences_.size();
    for (SequenceOutput& sequence : sequences_) Append(logprobs, &sequence.logprobs);
    listener = listener_;
  }
  listener->OnOutput();
}

void Generation::OnDelta(TokenDelta delta) {
  std::shared_ptr<OutputListener> listener;
  {
    MutexLock lock(&mutex_);
    if (abandoned_) return;
    SequenceOutput& sequence = sequences_[delta.index];
    pending_bytes_ += delta.text.size() + BytesOf(delta.logprobs);
    sequence.text += delta.text;
    Append(std::move(delta.logprobs), &sequence.logprobs);
    if (return_token_ids_) Append(std::move(delta.token_ids), &sequence.token_ids);
    if (delta.end.has_value()) {
      sequence.end = std::move(delta.end);
      ended_[delta.index] = true;
      ++num_ended_;
    }
    listener = listener_;
  }
  listener->OnOutput();
}

void Generation::OnFinish(GenerationResult result) {
  std::shared_ptr<OutputListener> listener;
  {
    MutexLock lock(&mutex_);
    for (size_t i = 0; i < sequences_.size(); ++i) {
      if (ended_[i]) continue;
      sequences_[i].end = SequenceEnd{result.reason, ""};
      ended_[i] = true;
      ++num_ended_;
    }
    if (quota_ != nullptr) quota_->Charge(result.usage.generated_tokens);
    quota_.reset();
    result_ = std::move(result);
    listener = std::move(listener_);
  }
  listener->OnOutput();
}

std::optional<Generation::Chunk> Generation::Take() {
  MutexLock lock(&mutex_);
  const size_t n = sequences_.size();
  std::optional<size_t> found;
  size_t others = 0;
  for (size_t i = 0; i < n; ++i) {
    const size_t index = (next_ + i) % n;
    if (sequences_[index].empty()) continue;
    if (found.has_value()) {
      ++others;
    } else {
      found = index;
    }
  }
  // The last one's end waits for the result, which the engine is about to hand out.
  if (!found.has_value() || (num_ended_ == n && others == 0 && !result_.has_value())) {
    return std::nullopt;
  }
  Chunk chunk;
  chunk.index = static_cast<uint32_t>(*found);
  chunk.output = TakeFront(*model_, &sequences_[*found]);
  pending_bytes_ -= std::min(pending_bytes_, BytesOf(chunk.output));
  if (others == 0 && sequences_[*found].empty()) chunk.result = result_;
  next_ = *found + 1;
  return chunk;
}

bool Generation::finished() const {
  MutexLock lock(&mutex_);
  return result_.has_value();
}

std::vector<SequenceOutput> Generation::TakeAll() {
  MutexLock lock(&mutex_);
  pending_bytes_ = 0;
  return std::move(sequences_);
}

std::vector<TokenLogprob> Generation::TakePromptLogprobs() {
  MutexLock lock(&mutex_);
  return std::move(prompt_logprobs_);
}

std::optional<GenerationResult> Generation::result() const {
  MutexLock lock(&mutex_);
  return result_;
}

void Generation::Abandon() {
  std::optional<Engine::RequestHandle> handle;
  {
    MutexLock lock(&mutex_);
    if (std::exchange(abandoned_, true)) return;
    for (SequenceOutput& sequence : sequences_) {
      // What ended must still be seen to have ended.
      const auto end = std::move(sequence.end);
      sequence = SequenceOutput();
      sequence.end = end;
    }
    pending_bytes_ = 0;
    if (!result_.has_value()) handle = handle_;
  }
  if (handle.has_value() && !CancelledByDeadline(deadline_)) model_->engine->Cancel(*handle);
}

bool Generation::abandoned() const {
  MutexLock lock(&mutex_);
  return abandoned_;
}

size_t Generation::pending_bytes() const {
  MutexLock lock(&mutex_);
  return pending_bytes_;
}

absl::Status StatusOf(const GenerationResult& result, const absl::Status& abandoned) {
  switch (result.reason) {
    case FinishReason::kLength:
    case FinishReason::kEos:
    case FinishReason::kStop:
      return absl::OkStatus();
    case FinishReason::kDeadlineExceeded:
      return Refusal(kDeadlineExceeded, absl::StrCat("the deadline passed after ",
                                                     result.usage.generated_tokens, " tokens"));
    case FinishReason::kCancelled:
      return abandoned.ok()
                 ? Refusal(kDraining, "the server is shutting down, or has taken out the model")
                 : abandoned;
    case FinishReason::kError:
      break;
  }
  return result.status.ok() ? Refusal(kInternalError, "the generation failed") : result.status;
}

}  // namespace firesteel::server
