#include "server/generation_call.h"

#include <exception>
#include <utility>

#include "absl/random/random.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/logging.h"
#include "server/request_translation.h"
#include "server/status.h"

namespace firesteel::server {
namespace {

// gRPC cancels a call at its deadline too, on a clock of whole milliseconds: a cancellation so
// shortly before it is the deadline's.
constexpr absl::Duration kDeadlineSlack = absl::Milliseconds(5);

uint64_t RandomSeed() {
  thread_local absl::BitGen generator;
  return absl::Uniform<uint64_t>(generator);
}

double Milliseconds(absl::Duration duration) { return absl::ToDoubleMilliseconds(duration); }

}  // namespace

GenerationCall::GenerationCall(grpc::CallbackServerContext* context, const char* method,
                               const CallServices& services)
    : context_(context),
      method_(method),
      metadata_(ReadCallMetadata(*context)),
      services_(services),
      start_(absl::Now()) {}

void GenerationCall::Open() {
  services_.live->Enter();
  self_ = shared_from_this();
}

void GenerationCall::Close() {
  WriteLogLine();
  services_.live->Leave();
  self_.reset();
}

absl::Status GenerationCall::Admit(const v1::GenerateRequest& request) try {
  const auto model = services_.models->Find(request.model());
  if (!model.ok()) return model.status();
  model_ = *model;
  return_token_ids_ = request.output().return_token_ids();

  bool needs_seed = false;
  auto translated = TranslateRequest(request, *model_, &needs_seed);
  if (!translated.ok()) return translated.status();
  translated->request_id = metadata_.request_id;
  translated->deadline = metadata_.deadline;
  if (needs_seed) translated->sampling.seed = RandomSeed();

  const auto handle = model_->engine->Submit(*std::move(translated), shared_from_this());
  if (!handle.ok()) return handle.status();
  MutexLock lock(&mutex_);
  handle_ = *handle;
  return absl::OkStatus();
} catch (const std::exception& e) {
  Log(LogLevel::kError, "request handling threw",
      {{"request_id", metadata_.request_id}, {"error", e.what()}});
  return absl::InternalError("the request could not be handled");
}

void GenerationCall::ScheduleIfWanted() {
  if (scheduled_ || !WantsDelivery()) return;
  scheduled_ = true;
  services_.delivery->Schedule(shared_from_this());
}

void GenerationCall::OnDelta(TokenDelta delta) {
  MutexLock lock(&mutex_);
  if (abandoned_) return;
  if (delta.end.has_value()) stop_match_ = std::move(delta.end->stop_match);
  pending_.text += delta.text;
  if (return_token_ids_) {
    pending_.token_ids.insert(pending_.token_ids.end(), delta.token_ids.begin(),
                              delta.token_ids.end());
  }
  ScheduleIfWanted();
}

void GenerationCall::OnFinish(GenerationResult result) {
  MutexLock lock(&mutex_);
  result_ = result;
  pending_.result = std::move(result);
  pending_.stop_match = stop_match_;
  ScheduleIfWanted();
}

void GenerationCall::Abandon() {
  std::optional<Engine::RequestHandle> handle;
  {
    MutexLock lock(&mutex_);
    abandoned_ = true;
    pending_.text.clear();
    pending_.token_ids.clear();
    handle = handle_;
  }
  // At the deadline the engine ends the request by itself, and counts it as what it is.
  const bool deadline_passed = absl::Now() + kDeadlineSlack >= metadata_.deadline;
  if (handle.has_value() && !deadline_passed) model_->engine->Cancel(*handle);
}

absl::Status GenerationCall::StatusOf(const GenerationResult& result) const {
  switch (result.reason) {
    case FinishReason::kLength:
    case FinishReason::kEos:
    case FinishReason::kStop:
      return absl::OkStatus();
    case FinishReason::kDeadlineExceeded:
      return absl::DeadlineExceededError(
          absl::StrCat("the deadline passed after ", result.usage.generated_tokens, " tokens"));
    case FinishReason::kCancelled: {
      MutexLock lock(&mutex_);
      if (abandoned_) return absl::CancelledError("the client cancelled");
      return absl::UnavailableError("the server is shutting down");
    }
    case FinishReason::kError:
      break;
  }
  return result.status.ok() ? absl::InternalError("the generation failed") : result.status;
}

grpc::Status GenerationCall::PrepareFinish(const absl::Status& status) {
  AddTrailers(metadata_, status, context_);
  MutexLock lock(&mutex_);
  final_status_ = status;
  return ToGrpcStatus(status);
}

void GenerationCall::FillSequence(Output output, v1::Sequence* sequence) const {
  sequence->set_text(std::move(output.text));
  sequence->mutable_token_ids()->Add(output.token_ids.begin(), output.token_ids.end());
  if (!output.result.has_value()) return;
  sequence->set_finish_reason(ToProto(output.result->reason));
  sequence->set_stop_match(std::move(output.stop_match));
}

void GenerationCall::WriteLogLine() const {
  LogFields fields = {{"method", method_}, {"request_id", metadata_.request_id}};
  if (!metadata_.traceparent.empty()) fields["traceparent"] = metadata_.traceparent;
  fields["model"] = model_ == nullptr ? "" : model_->name;
  MutexLock lock(&mutex_);
  fields["status"] = absl::StatusCodeToString(final_status_.code());
  if (!final_status_.ok()) fields["error"] = std::string(final_status_.message());
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

namespace {

/// Answers once, when everything is there.
class UnaryCall final : public GenerationCall, public grpc::ServerUnaryReactor {
 public:
  UnaryCall(grpc::CallbackServerContext* context, v1::GenerateResponse* response,
            const CallServices& services)
      : GenerationCall(context, "Generate", services), response_(response) {}

  void Start(const v1::GenerateRequest& request) {
    Open();
    const absl::Status status = Admit(request);
    if (!status.ok()) Finish(PrepareFinish(status));
  }

  void Deliver() override {
    Output output;
    {
      MutexLock lock(&mutex_);
      scheduled_ = false;
      if (finished_ || !pending_.result.has_value()) return;
      finished_ = true;
      output = std::move(pending_);
    }
    const absl::Status status = StatusOf(*output.result);
    if (status.ok()) {
      context_->AddInitialMetadata(kRequestIdKey, metadata_.request_id);
      response_->set_request_id(metadata_.request_id);
      response_->set_model(model_->name);
      *response_->mutable_usage() = ToProto(output.result->usage);
      *response_->mutable_timings() = ToProto(output.result->timings);
      *response_->mutable_sparsity() = ToProto(output.result->sparsity);
      FillSequence(std::move(output), response_->add_sequences());
    }
    Finish(PrepareFinish(status));
  }

  void OnCancel() override { Abandon(); }

  void OnDone() override { Close(); }

 private:
  bool WantsDelivery() const override ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return pending_.result.has_value();
  }

  v1::GenerateResponse* const response_;  // gRPC's, valid until OnDone
};

/// Sends deltas as they come. One write is under way at a time; what comes meanwhile is put
/// together into the next one, so a slow reader costs no more memory than the text it has not read,
/// and no time of the batch's.
class StreamCall final : public GenerationCall,
                         public grpc::ServerWriteReactor<v1::GenerateStreamResponse> {
 public:
  StreamCall(grpc::CallbackServerContext* context, const CallServices& services)
      : GenerationCall(context, "GenerateStream", services) {}

  void Start(const v1::GenerateRequest& request) {
    Open();
    const absl::Status status = Admit(request);
    if (!status.ok()) {
      // Nothing was sent, so that a client or proxy may try elsewhere.
      Finish(PrepareFinish(status));
      return;
    }
    context_->AddInitialMetadata(kRequestIdKey, metadata_.request_id);
    StartSendInitialMetadata();
  }

  void OnSendInitialMetadataDone(bool ok) override { OnWriteDone(ok); }

  void OnWriteDone(bool ok) override {
    if (!ok) Abandon();
    {
      MutexLock lock(&mutex_);
      writing_ = false;
    }
    Pump();
  }

  void OnCancel() override {
    Abandon();
    Pump();
  }

  void Deliver() override {
    {
      MutexLock lock(&mutex_);
      scheduled_ = false;
    }
    Pump();
  }

  void OnDone() override { Close(); }

 private:
  bool WantsDelivery() const override ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return !writing_; }

  // Begins the next write, if none is under way and there is something to write.
  void Pump() {
    Output output;
    bool abandoned = false;
    {
      MutexLock lock(&mutex_);
      const bool last = pending_.result.has_value();
      abandoned = abandoned_;
      const bool something = last || (!abandoned && HasOutput());
      if (writing_ || finished_ || !something) return;
      writing_ = true;
      finished_ = last;
      output = std::exchange(pending_, Output());
    }
    // This thread alone is here until the write is done.
    if (!output.result.has_value()) {
      FillMessage(std::move(output));
      StartWrite(&message_);
      return;
    }
    const grpc::Status status = PrepareFinish(StatusOf(*output.result));
    if (abandoned) {
      Finish(status);
      return;
    }
    FillMessage(std::move(output));
    StartWriteAndFinish(&message_, grpc::WriteOptions(), status);
  }

  bool HasOutput() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return !pending_.text.empty() || !pending_.token_ids.empty();
  }

  void FillMessage(Output output) {
    message_.Clear();
    message_.set_request_id(metadata_.request_id);
    if (output.result.has_value()) {
      *message_.mutable_usage() = ToProto(output.result->usage);
      *message_.mutable_timings() = ToProto(output.result->timings);
      *message_.mutable_sparsity() = ToProto(output.result->sparsity);
    }
    FillSequence(std::move(output), message_.mutable_sequence());
  }

  // True from the start: the initial metadata counts as the first write.
  bool writing_ ABSL_GUARDED_BY(mutex_) = true;
  v1::GenerateStreamResponse message_;  // belongs to the write that is under way
};

}  // namespace

grpc::ServerUnaryReactor* StartGenerate(grpc::CallbackServerContext* context,
                                        const v1::GenerateRequest& request,
                                        v1::GenerateResponse* response,
                                        const CallServices& services) {
  const auto call = std::make_shared<UnaryCall>(context, response, services);
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
