#include "server/infer_call.h"

#include <grpcpp/impl/codegen/proto_utils.h>

#include <algorithm>
#include <deque>
#include <exception>
#include <list>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/answer_size.h"
#include "server/kserve_translation.h"
#include "server/logging.h"
#include "server/status.h"

namespace firesteel::server {
namespace {

// As Triton's clients look for it.
constexpr char kFinalResponse[] = "triton_final_response";

// One text of a request, which lives until it is admitted.
absl::StatusOr<TranslatedRequest> TranslateText(const v1::GenerateRequest& text,
                                                absl::Duration timeout, const ServedModel& model) {
  auto translated = TranslateRequest(text, model);
  if (translated.ok()) translated->request.deadline = absl::Now() + timeout;
  return translated;
}

/// A batch of texts, answered once all of them have finished.
class ModelInferCall final : public UnaryGenerationCall {
 public:
  ModelInferCall(grpc::CallbackServerContext* context, inference::ModelInferResponse* response,
                 const CallServices& services)
      : UnaryGenerationCall(context, "ModelInfer", services), response_(response) {}

  void Start(const inference::ModelInferRequest& request) {
    UnaryGenerationCall::Start([this, &request]() -> absl::StatusOr<std::vector<Part>> {
      auto translated = TranslateInfer(request);
      if (!translated.ok()) return translated.status();
      request_ = *std::move(translated);
      std::vector<Part> parts;
      parts.reserve(request_.requests.size());
      for (const v1::GenerateRequest& one : request_.requests) {
        parts.push_back({one.model(), [this, &one](const ServedModel& model) {
                           return WithBoundedAnswer(TranslateText(one, request_.timeout, model),
                                                    model, AnswerForm::kJson,
                                                    request_.requests.size());
                         }});
      }
      return parts;
    });
  }

 private:
  void Fill(const std::vector<std::shared_ptr<Generation>>& parts) override {
    std::vector<InferOutput> outputs;
    outputs.reserve(parts.size());
    for (const auto& part : parts) {
      InferOutput& output = outputs.emplace_back();
      FillSequence(0, std::move(part->TakeAll().front()), part->model().engine->tokenizer(),
                   &output.sequence);
      output.usage = part->result()->usage;
    }
    FillInfer(request_, parts.front()->model().name, outputs, response_);
  }

  InferRequest request_;                           // set by Start
  inference::ModelInferResponse* const response_;  // gRPC's, valid until OnDone
};

/// Any number of requests, answered as their text comes. What is wrong with one is a message of the
/// stream; the others go on. Messages are bytes here: gRPC would not tell one that cannot be parsed
/// from the end of the client's.
class ModelStreamInferCall final
    : public StreamedGenerationCall<grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>> {
 public:
  ModelStreamInferCall(grpc::CallbackServerContext* context, const CallServices& services)
      : StreamedGenerationCall(context, "ModelStreamInfer", services) {}

  void Start() {
    if (const absl::Status status = Open(); !status.ok()) {
      Refuse(status);
      return;
    }
    StartRead(&incoming_);
    {
      MutexLock lock(&mutex_);
      started_ = true;
    }
    Pump();
  }

  void OnReadDone(bool ok) override {
    {
      MutexLock lock(&mutex_);
      taking_ = ok;
    }
    if (ok) TakeIncoming();
    {
      MutexLock lock(&mutex_);
      reads_done_ = !ok;
      reading_ = false;
      taking_ = false;
    }
    Pump();
  }

  // Clients keep such a stream open between their requests: a drain need not wait for them.
  void EndOnceIdle() override {
    {
      MutexLock lock(&mutex_);
      closing_ = true;
      if (!started_) return;
    }
    Pump();
  }

 private:
  using Response = inference::ModelStreamInferResponse;

  struct Item {
    InferRequest request;
    std::shared_ptr<Generation> generation;
  };

  // Admits a request of the stream, or queues the message that refuses it.
  void TakeIncoming() {
    inference::ModelInferRequest request;
    absl::Status status = MalformedRequest();
    if (grpc::SerializationTraits<inference::ModelInferRequest>::Deserialize(&incoming_, &request)
            .ok()) {
      status = TryTake(request);
    } else {
      request.Clear();  // what was read of it may be no UTF-8
    }
    if (status.ok()) return;
    MutexLock lock(&mutex_);
    refusals_.push_back(ErrorMessage(request.id(), status));
  }

  absl::Status TryTake(const inference::ModelInferRequest& request) try {
    // A stream may stay open for days: what its caller may do can have changed since.
    if (absl::Status status = Authenticate(); !status.ok()) return status;
    auto translated = TranslateInfer(request);
    if (!translated.ok()) return translated.status();
    if (translated->requests.size() != 1) {
      return InvalidField("inputs[0].shape", absl::StrCat("has ", translated->requests.size(),
                                                          " texts; a stream takes one a request"));
    }
    const v1::GenerateRequest one = std::move(translated->requests.front());
    auto generation = Admit(one.model(), [&one, &translated](const ServedModel& model) {
      return TranslateText(one, translated->timeout, model);
    });
    if (!generation.ok()) return generation.status();
    MutexLock lock(&mutex_);
    items_.push_back({*std::move(translated), *std::move(generation)});
    return absl::OkStatus();
  } catch (const std::exception& e) {
    Log(LogLevel::kError, "request handling threw",
        {{"request_id", metadata_.request_id}, {"error", e.what()}});
    return Refusal(kInternalError, "the request could not be handled");
  }

  static Response ErrorMessage(const std::string& id, const absl::Status& status) {
    const grpc::Status wire = ToGrpcStatus(status);
    Response message;
    message.set_error_message(wire.error_message());
    if (id.size() <= kMaxInferIdBytes) message.mutable_infer_response()->set_id(id);
    auto& parameters = *message.mutable_infer_response()->mutable_parameters();
    parameters["error_code"].set_string_param(absl::StatusCodeToString(status.code()));
    parameters["error_reason"].set_string_param(ReasonOf(status));
    parameters[kFinalResponse].set_bool_param(true);
    return message;
  }

  // Reads the next request, where there is room for it. Pump goes on behind it.
  void ReadOn() {
    {
      MutexLock lock(&mutex_);
      if (reading_ || reads_done_ || closing_ || finished_ || !abandoned_.ok() ||
          items_.size() + refusals_.size() >= kMaxStreamedInfers) {
        return;
      }
      reading_ = true;
      ++starting_reads_;
    }
    StartRead(&incoming_);
    MutexLock lock(&mutex_);
    --starting_reads_;
  }

  void Pump() override {
    ReadOn();
    enum class Step { kNothing, kWrite, kFinish };
    Step step = Step::kNothing;
    absl::Status end;
    {
      MutexLock lock(&mutex_);
      if (writing_ || finished_ || starting_reads_ > 0) return;
      end = abandoned_;
      if (end.ok() && NextMessage()) {
        BeginWrite(absl::Now());
        step = Step::kWrite;
      } else if (!end.ok() || ((reads_done_ || closing_) && items_.empty() && !taking_)) {
        finished_ = true;
        step = Step::kFinish;
        if (end.ok() && !reads_done_) end = Refusal(kDraining, "the server is shutting down");
      }
    }
    if (step == Step::kWrite) {
      if (!std::exchange(metadata_sent_, true)) {
        context_->AddInitialMetadata(kRequestIdKey, metadata_.request_id);
      }
      bool own_buffer = false;
      outgoing_bytes_.Clear();
      grpc::SerializationTraits<Response>::Serialize(outgoing_, &outgoing_bytes_, &own_buffer);
      StartWrite(&outgoing_bytes_);
    } else if (step == Step::kFinish) {
      Finish(PrepareFinish(end));
    }
  }

  // Fills outgoing_ with what is to be sent next, if anything is.
  bool NextMessage() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (!refusals_.empty()) {
      outgoing_ = std::move(refusals_.front());
      refusals_.pop_front();
      return true;
    }
    for (auto item = items_.begin(); item != items_.end(); ++item) {
      auto chunk = item->generation->Take();
      if (!chunk.has_value()) continue;
      const std::optional<GenerationResult> result = chunk->result;
      Fill(*item, *std::move(chunk));
      // The next look begins with the others.
      if (result.has_value()) {
        Account(*result, item->generation->model().name);
        items_.erase(item);
      } else {
        items_.splice(items_.end(), items_, item);
      }
      return true;
    }
    return false;
  }

  void Fill(const Item& item, Generation::Chunk chunk) {
    const ServedModel& model = item.generation->model();
    const bool last = chunk.result.has_value();
    const absl::Status status = last ? StatusOf(*chunk.result, absl::OkStatus()) : absl::OkStatus();
    if (!status.ok()) {
      outgoing_ = ErrorMessage(item.request.id, status);
      return;
    }
    InferRequest request = item.request;
    if (!last) {
      std::erase_if(request.outputs, [](const std::string& name) {
        return name != "text_output" && name != "details";
      });
    }
    std::vector<InferOutput> outputs(1);
    if (last) outputs.front().usage = chunk.result->usage;
    FillSequence(0, std::move(chunk.output), model.engine->tokenizer(), &outputs.front().sequence);
    outgoing_.Clear();
    FillInfer(request, model.name, outputs, outgoing_.mutable_infer_response());
    (*outgoing_.mutable_infer_response()->mutable_parameters())[kFinalResponse].set_bool_param(
        last);
  }

  grpc::ByteBuffer incoming_;        // belongs to the read that is under way
  Response outgoing_;                // belongs to the write that is under way
  grpc::ByteBuffer outgoing_bytes_;  // the same
  bool metadata_sent_ = false;       // of the thread that writes

  bool started_ ABSL_GUARDED_BY(mutex_) = false;  // from then on the call may be finished
  bool reading_ ABSL_GUARDED_BY(mutex_) = true;
  // Threads about to tell gRPC to read: none may finish the call before they have, and they will.
  int starting_reads_ ABSL_GUARDED_BY(mutex_) = 0;
  // A request is being looked at: admitted, perhaps, and not yet in items_.
  bool taking_ ABSL_GUARDED_BY(mutex_) = false;
  bool reads_done_ ABSL_GUARDED_BY(mutex_) = false;
  bool closing_ ABSL_GUARDED_BY(mutex_) = false;  // the server drains
  std::list<Item> items_ ABSL_GUARDED_BY(mutex_);
  std::deque<Response> refusals_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

grpc::ServerUnaryReactor* StartModelInfer(grpc::CallbackServerContext* context,
                                          const inference::ModelInferRequest& request,
                                          inference::ModelInferResponse* response,
                                          const CallServices& services) {
  const auto call = std::make_shared<ModelInferCall>(context, response, services);
  call->Start(request);
  return call.get();
}

grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* StartModelStreamInfer(
    grpc::CallbackServerContext* context, const CallServices& services) {
  const auto call = std::make_shared<ModelStreamInferCall>(context, services);
  call->Start();
  return call.get();
}

}  // namespace firesteel::server
