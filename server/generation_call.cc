#include "server/generation_call.h"

#include <exception>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/answer_size.h"
#include "server/logging.h"
#include "server/request_translation.h"
#include "server/status.h"

namespace firesteel::server {
namespace {

double Milliseconds(absl::Duration duration) { return absl::ToDoubleMilliseconds(duration); }

}  // namespace

// --- What all share ---

GenerationCall::GenerationCall(grpc::CallbackServerContext* context, const char* method,
                               const CallServices& services)
    : context_(context),
      method_(method),
      metadata_(ReadCallMetadata(*context)),
      services_(services),
      start_(absl::Now()) {}

absl::Status GenerationCall::Open() {
  services_.live->Enter(shared_from_this());
  return Authenticate();
}

absl::Status GenerationCall::Authenticate() {
  auto caller = services_.access->Authenticate(*context_);
  if (!caller.ok()) return caller.status();
  caller_ = *std::move(caller);
  return absl::OkStatus();
}

void GenerationCall::Close() {
  {
    MutexLock lock(&context_mutex_);
    closed_ = true;
  }
  WriteLogLine();
  services_.live->Leave(this);
}

void GenerationCall::EndIfStalled(absl::Time now) {
  std::string why;
  {
    MutexLock lock(&mutex_);
    if (!abandoned_.ok() || !writing_since_.has_value()) return;
    size_t pending = 0;
    for (const auto& entry : admitted_) {
      if (const auto generation = entry.lock()) pending += generation->pending_bytes();
    }
    const absl::Duration waited = now - *writing_since_;
    if (waited > services_.stall.write) {
      why = absl::StrCat("the reader took nothing for ", absl::FormatDuration(waited));
    } else if (pending > services_.stall.buffer_bytes) {
      why = absl::StrCat(pending, " bytes wait for the reader, more than ",
                         services_.stall.buffer_bytes);
    } else {
      return;
    }
  }
  Abandon(Refusal(kReaderStalled, why));
  TryCancel();  // the write under way ends, and with it the call
}

void GenerationCall::TryCancel() {
  MutexLock lock(&context_mutex_);
  if (!closed_) context_->TryCancel();
}

void GenerationCall::OnOutput() {
  MutexLock lock(&mutex_);
  if (scheduled_ || finished_) return;
  scheduled_ = true;
  services_.delivery->Schedule(shared_from_this());
}

void GenerationCall::Deliver() {
  {
    MutexLock lock(&mutex_);
    scheduled_ = false;
  }
  try {
    Pump();
  } catch (const std::exception& e) {
    // Nothing of the call may be lost but the call: gRPC ends it, and OnCancel sees to the rest.
    Log(LogLevel::kError, "delivery threw",
        {{"request_id", metadata_.request_id}, {"error", e.what()}});
    TryCancel();
  }
}

absl::StatusOr<std::shared_ptr<Generation>> GenerationCall::Admit(
    const std::string& model_name, const Generation::Translate& translate) try {
  auto generation = Generation::Start(*services_.models, model_name, translate, metadata_, caller_,
                                      shared_from_this());
  if (!generation.ok()) return generation.status();
  bool abandoned = false;
  {
    MutexLock lock(&mutex_);
    std::erase_if(admitted_, [](const auto& entry) { return entry.expired(); });
    admitted_.push_back(*generation);
    model_ = (*generation)->model().name;
    abandoned = !abandoned_.ok();
  }
  if (abandoned) (*generation)->Abandon();
  return generation;
} catch (const std::exception& e) {
  Log(LogLevel::kError, "request handling threw",
      {{"request_id", metadata_.request_id}, {"error", e.what()}});
  return Refusal(kInternalError, "the request could not be handled");
}

void GenerationCall::Abandon(const absl::Status& why) {
  std::vector<std::weak_ptr<Generation>> admitted;
  {
    MutexLock lock(&mutex_);
    if (abandoned_.ok()) abandoned_ = why;
    admitted = admitted_;
  }
  for (const auto& entry : admitted) {
    if (const auto generation = entry.lock()) generation->Abandon();
  }
}

void GenerationCall::AbandonByClient() {
  Abandon(CancelledByDeadline(metadata_.deadline)
              ? Refusal(kDeadlineExceeded, "the deadline passed")
              : Refusal(kCancelled, "the client cancelled"));
}

void GenerationCall::Account(const GenerationResult& result, const std::string& model) {
  model_ = model;
  Usage usage = result.usage;
  if (result_.has_value()) {
    usage.prompt_tokens += result_->usage.prompt_tokens;
    usage.cached_tokens += result_->usage.cached_tokens;
    usage.generated_tokens += result_->usage.generated_tokens;
  }
  result_ = result;
  result_->usage = usage;
}

grpc::Status GenerationCall::PrepareFinish(const absl::Status& status) {
  AddTrailers(metadata_, status, context_);
  MutexLock lock(&mutex_);
  final_status_ = status;
  writing_since_ = absl::Now();
  return ToGrpcStatus(status);
}

void GenerationCall::WriteLogLine() const {
  LogFields fields = {{"method", method_}, {"request_id", metadata_.request_id}};
  if (!metadata_.traceparent.empty()) fields["traceparent"] = metadata_.traceparent;
  MutexLock lock(&mutex_);
  if (!caller_.name.empty()) fields["client"] = caller_.name;
  fields["model"] = model_;
  // Also a call that ended well may lose its reader before its last bytes are taken.
  const absl::Status& status = final_status_.ok() ? abandoned_ : final_status_;
  fields["status"] = absl::StatusCodeToString(status.code());
  if (!status.ok()) fields["error"] = std::string(status.message());
  if (result_.has_value()) {
    fields["finish_reason"] = FinishReasonName(result_->reason);
    fields["prompt_tokens"] = result_->usage.prompt_tokens;
    fields["generated_tokens"] = result_->usage.generated_tokens;
    fields["queue_ms"] = Milliseconds(result_->timings.queue);
    fields["prefill_ms"] = Milliseconds(result_->timings.prefill);
    fields["first_token_ms"] = Milliseconds(result_->timings.first_token);
    fields["decode_ms"] = Milliseconds(result_->timings.decode);
  }
  fields["total_ms"] = Milliseconds(absl::Now() - start_);
  Log(LogLevel::kInfo, "request", fields);
}

// --- Answered once ---

void UnaryGenerationCall::Start(const std::function<absl::StatusOr<std::vector<Part>>()>& parts) {
  auto admitted = AdmitAll(parts);
  const absl::Status status = admitted.status();
  {
    MutexLock lock(&mutex_);
    finished_ = !status.ok();
    if (status.ok()) parts_ = *std::move(admitted);
  }
  if (status.ok()) {
    OnOutput();  // they may have finished already
    return;
  }
  Abandon(status);
  Finish(PrepareFinish(status));
}

absl::StatusOr<std::vector<std::shared_ptr<Generation>>> UnaryGenerationCall::AdmitAll(
    const std::function<absl::StatusOr<std::vector<Part>>()>& parts) {
  if (const absl::Status status = Open(); !status.ok()) return status;
  const auto all = parts();
  if (!all.ok()) return all.status();
  std::vector<std::shared_ptr<Generation>> admitted;
  for (const Part& part : *all) {
    auto generation = Admit(part.model, part.translate);
    if (!generation.ok()) return generation.status();
    admitted.push_back(*std::move(generation));
  }
  return admitted;
}

void UnaryGenerationCall::Pump() {
  std::vector<std::shared_ptr<Generation>> parts;
  absl::Status abandoned;
  {
    MutexLock lock(&mutex_);
    if (finished_ || parts_.empty()) return;
    for (const auto& part : parts_) {
      if (!part->finished()) return;
    }
    finished_ = true;
    abandoned = abandoned_;
    parts = std::move(parts_);
  }
  absl::Status status;
  for (const auto& part : parts) {
    const GenerationResult result = *part->result();
    if (status.ok()) status = StatusOf(result, abandoned);
    MutexLock lock(&mutex_);
    Account(result, part->model().name);
  }
  if (status.ok()) {
    try {
      Fill(parts);
    } catch (const std::exception& e) {
      Log(LogLevel::kError, "answering threw",
          {{"request_id", metadata_.request_id}, {"error", e.what()}});
      status = Refusal(kInternalError, "the answer could not be put together");
    }
  }
  if (status.ok()) context_->AddInitialMetadata(kRequestIdKey, metadata_.request_id);
  Finish(PrepareFinish(status));
}

namespace {

class GenerateCall final : public UnaryGenerationCall {
 public:
  GenerateCall(grpc::CallbackServerContext* context, v1::GenerateResponse* response,
               const CallServices& services)
      : UnaryGenerationCall(context, "Generate", services), response_(response) {}

  void Start(const v1::GenerateRequest& request) {
    UnaryGenerationCall::Start([&request]() -> absl::StatusOr<std::vector<Part>> {
      return std::vector<Part>{{request.model(), [&request](const ServedModel& model) {
                                  return WithBoundedAnswer(TranslateRequest(request, model), model,
                                                           AnswerForm::kProto);
                                }}};
    });
  }

 private:
  void Fill(const std::vector<std::shared_ptr<Generation>>& parts) override {
    Generation& generation = *parts.front();
    const GenerationResult result = *generation.result();
    response_->set_request_id(metadata_.request_id);
    response_->set_model(generation.model().name);
    *response_->mutable_usage() = ToProto(result.usage);
    *response_->mutable_timings() = ToProto(result.timings);
    *response_->mutable_sparsity() = ToProto(result.sparsity);
    uint32_t index = 0;
    for (SequenceOutput& output : generation.TakeAll()) {
      FillSequence(index++, std::move(output), generation.model().engine->tokenizer(),
                   response_->add_sequences());
    }
  }

  v1::GenerateResponse* const response_;  // gRPC's, valid until OnDone
};

class ScoreCall final : public UnaryGenerationCall {
 public:
  ScoreCall(grpc::CallbackServerContext* context, v1::ScoreResponse* response,
            const CallServices& services)
      : UnaryGenerationCall(context, "Score", services), response_(response) {}

  void Start(const v1::ScoreRequest& request) {
    UnaryGenerationCall::Start([&request]() -> absl::StatusOr<std::vector<Part>> {
      return std::vector<Part>{{request.model(), [&request](const ServedModel& model) {
                                  return WithBoundedAnswer(TranslateScore(request, model), model,
                                                           AnswerForm::kProto);
                                }}};
    });
  }

 private:
  void Fill(const std::vector<std::shared_ptr<Generation>>& parts) override {
    Generation& generation = *parts.front();
    FillScore(generation.first_token(), generation.TakePromptLogprobs(),
              generation.model().engine->tokenizer(), response_);
    *response_->mutable_usage() = ToProto(generation.result()->usage);
  }

  v1::ScoreResponse* const response_;  // gRPC's, valid until OnDone
};

// --- Streamed ---

/// Sends deltas as they come. One write is under way at a time; what comes meanwhile is put
/// together into the next one, so a slow reader costs no more memory than the text it has not read,
/// and no time of the batch's.
class StreamCall final
    : public StreamedGenerationCall<grpc::ServerWriteReactor<v1::GenerateStreamResponse>> {
 public:
  StreamCall(grpc::CallbackServerContext* context, const CallServices& services)
      : StreamedGenerationCall(context, "GenerateStream", services) {}

  void Start(const v1::GenerateRequest& request) {
    absl::Status status = Open();
    if (status.ok()) {
      {
        MutexLock lock(&mutex_);
        BeginWrite(start_);  // the initial metadata counts as the first write
      }
      auto generation = Admit(request.model(), [&request](const ServedModel& model) {
        return TranslateRequest(request, model);
      });
      status = generation.status();
      MutexLock lock(&mutex_);
      if (status.ok()) generation_ = *std::move(generation);
    }
    if (!status.ok()) {
      Refuse(status);
      return;
    }
    context_->AddInitialMetadata(kRequestIdKey, metadata_.request_id);
    StartSendInitialMetadata();
  }

  void OnSendInitialMetadataDone(bool ok) override { OnWriteDone(ok); }

 private:
  // Begins the next write, if none is under way and there is something to write.
  void Pump() override {
    std::optional<Generation::Chunk> chunk;
    std::shared_ptr<Generation> generation;
    absl::Status abandoned;
    {
      MutexLock lock(&mutex_);
      if (writing_ || finished_ || generation_ == nullptr) return;
      chunk = generation_->Take();
      if (!chunk.has_value()) return;
      BeginWrite(absl::Now());
      finished_ = chunk->result.has_value();
      abandoned = abandoned_;
      generation = generation_;
    }
    // This thread alone is here until the write is done.
    const std::optional<GenerationResult> result = chunk->result;
    absl::Status status = FillMessage(*std::move(chunk), generation->model());
    if (status.ok() && !result.has_value()) {
      if (abandoned.ok()) {
        StartWrite(&message_);
      } else {
        OnWriteDone(false);  // nobody reads: on to what is left
      }
      return;
    }
    if (result.has_value()) {
      if (status.ok()) status = StatusOf(*result, abandoned);
      MutexLock lock(&mutex_);
      Account(*result, generation->model().name);
    } else {
      Abandon(status);
      MutexLock lock(&mutex_);
      finished_ = true;
    }
    const grpc::Status wire = PrepareFinish(status);
    if (!abandoned.ok() || !result.has_value()) {
      Finish(wire);
    } else {
      StartWriteAndFinish(&message_, grpc::WriteOptions(), wire);
    }
  }

  absl::Status FillMessage(Generation::Chunk chunk, const ServedModel& model) try {
    message_.Clear();
    message_.set_request_id(metadata_.request_id);
    if (chunk.result.has_value()) {
      *message_.mutable_usage() = ToProto(chunk.result->usage);
      *message_.mutable_timings() = ToProto(chunk.result->timings);
      *message_.mutable_sparsity() = ToProto(chunk.result->sparsity);
    }
    FillSequence(chunk.index, std::move(chunk.output), model.engine->tokenizer(),
                 message_.mutable_sequence());
    return absl::OkStatus();
  } catch (const std::exception& e) {
    Log(LogLevel::kError, "streaming threw",
        {{"request_id", metadata_.request_id}, {"error", e.what()}});
    return Refusal(kInternalError, "the answer could not be put together");
  }

  std::shared_ptr<Generation> generation_ ABSL_GUARDED_BY(mutex_);
  v1::GenerateStreamResponse message_;  // belongs to the write that is under way
};

}  // namespace

grpc::ServerUnaryReactor* StartGenerate(grpc::CallbackServerContext* context,
                                        const v1::GenerateRequest& request,
                                        v1::GenerateResponse* response,
                                        const CallServices& services) {
  const auto call = std::make_shared<GenerateCall>(context, response, services);
  call->Start(request);
  return call.get();
}

grpc::ServerUnaryReactor* StartScore(grpc::CallbackServerContext* context,
                                     const v1::ScoreRequest& request, v1::ScoreResponse* response,
                                     const CallServices& services) {
  const auto call = std::make_shared<ScoreCall>(context, response, services);
  call->Start(request);
  return call.get();
}

grpc::ServerWriteReactor<v1::GenerateStreamResponse>* StartGenerateStream(
    grpc::CallbackServerContext* context, const v1::GenerateRequest& request,
    const CallServices& services) {
  const auto call = std::make_shared<StreamCall>(context, services);
  call->Start(request);
  return call.get();
}

}  // namespace firesteel::server
