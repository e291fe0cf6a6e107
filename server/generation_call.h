// The calls that generate: gRPC's reactor on one side, generations in engines on the other.
//
// A call is held by LiveCalls until gRPC says OnDone, by its generations until their engine has
// finished, and by the delivery thread while it is scheduled. What an engine still says
// after Finish() reaches nobody.

#ifndef FIRESTEEL_SERVER_GENERATION_CALL_H_
#define FIRESTEEL_SERVER_GENERATION_CALL_H_

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "firesteel/v1/generation_service.pb.h"
#include "runtime/threading/mutex.h"
#include "server/access_control.h"
#include "server/call_metadata.h"
#include "server/delivery_thread.h"
#include "server/generation.h"
#include "server/live_calls.h"
#include "server/model_registry.h"
#include "server/status.h"

namespace firesteel::server {

/// When a reader counts as stalled.
struct StallLimits {
  absl::Duration write = absl::Seconds(60);  // one write takes longer
  size_t buffer_bytes = size_t{4} << 20;     // more waits behind a write
};

/// What a call needs of its server. All outlive the call.
struct CallServices {
  const ModelRegistry* models = nullptr;
  AccessControl* access = nullptr;
  DeliveryThread* delivery = nullptr;
  LiveCalls* live = nullptr;
  StallLimits stall;
};

/// What all calls that generate share: admission, delivery by the delivery thread, cancellation,
/// the log line.
///
/// Thread-safe: engines' threads call OnOutput, gRPC's threads and the delivery thread the rest. No
/// lock is held while an engine or gRPC is called, but for context_mutex_.
class GenerationCall : public OutputListener,
                       public Deliverable,
                       public LiveCall,
                       public std::enable_shared_from_this<GenerationCall> {
 public:
  GenerationCall(grpc::CallbackServerContext* context, const char* method,
                 const CallServices& services);

  void OnOutput() final ABSL_LOCKS_EXCLUDED(mutex_);
  void Deliver() final ABSL_LOCKS_EXCLUDED(mutex_);
  void EndIfStalled(absl::Time now) final ABSL_LOCKS_EXCLUDED(mutex_);

 protected:
  /// Sends what there is to send. Called by any thread, also where there is nothing.
  virtual void Pump() = 0;

  /// To be called before gRPC or an engine knows of the call: it stays alive until Close. Says
  /// whether the caller may make it.
  absl::Status Open();

  /// Whether the caller may make the call, as its credentials stand now. Called by one thread at a
  /// time.
  absl::Status Authenticate();

  /// Checks, translates and submits one generation. Pump may be called before it returns; once it
  /// has, it will be called again.
  absl::StatusOr<std::shared_ptr<Generation>> Admit(const std::string& model_name,
                                                    const Generation::Translate& translate);

  /// Nobody reads any more, and why. Everything admitted leaves its batch. The first reason counts.
  void Abandon(const absl::Status& why) ABSL_LOCKS_EXCLUDED(mutex_);

  /// The same, to be called when the client has gone, in whichever way gRPC tells so.
  void AbandonByClient() ABSL_LOCKS_EXCLUDED(mutex_);

  /// Counts what a generation did, for the log line.
  void Account(const GenerationResult& result, const std::string& model)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  /// Adds the trailing metadata, remembers `status` for the log line, and translates it.
  grpc::Status PrepareFinish(const absl::Status& status) ABSL_LOCKS_EXCLUDED(mutex_);

  /// OnDone: writes the log line and leaves. The call is gone afterwards.
  void Close() ABSL_LOCKS_EXCLUDED(mutex_, context_mutex_);

  grpc::CallbackServerContext* const context_;  // gRPC's, valid until OnDone
  const char* const method_;
  const CallMetadata metadata_;
  const CallServices services_;
  const absl::Time start_;

  mutable Mutex mutex_;
  absl::Status abandoned_ ABSL_GUARDED_BY(mutex_);  // why nobody reads any more; OK: somebody does
  // When the write under way began, the last one included.
  std::optional<absl::Time> writing_since_ ABSL_GUARDED_BY(mutex_);
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;  // gRPC was told the status

 private:
  void WriteLogLine() const ABSL_LOCKS_EXCLUDED(mutex_);

  /// Ends the call, unless gRPC is done with it. For threads that are not gRPC's.
  void TryCancel() ABSL_LOCKS_EXCLUDED(context_mutex_);

  // Keeps OnDone waiting while the call is cancelled. gRPC calls none of our reactions within that.
  Mutex context_mutex_;
  bool closed_ ABSL_GUARDED_BY(context_mutex_) = false;  // the context is gone

  bool scheduled_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::weak_ptr<Generation>> admitted_ ABSL_GUARDED_BY(mutex_);
  std::string model_ ABSL_GUARDED_BY(mutex_);                       // for the log line
  std::optional<GenerationResult> result_ ABSL_GUARDED_BY(mutex_);  // the same; tokens summed up
  absl::Status final_status_ ABSL_GUARDED_BY(mutex_);
  Caller caller_;  // set by Authenticate
};

/// Answers once, when all that was admitted has finished.
class UnaryGenerationCall : public GenerationCall, public grpc::ServerUnaryReactor {
 public:
  using GenerationCall::GenerationCall;

  void OnCancel() final { AbandonByClient(); }
  void OnDone() final { Close(); }

 protected:
  struct Part {
    std::string model;
    Generation::Translate translate;
  };
  /// Opens the call. Then asks for its parts and admits all of them, or ends the call with the
  /// first refusal: then nothing goes on.
  void Start(const std::function<absl::StatusOr<std::vector<Part>>()>& parts);

  /// Fills the response from the parts, all of which have finished well.
  virtual void Fill(const std::vector<std::shared_ptr<Generation>>& parts) = 0;

 private:
  void Pump() final;

  absl::StatusOr<std::vector<std::shared_ptr<Generation>>> AdmitAll(
      const std::function<absl::StatusOr<std::vector<Part>>()>& parts);

  std::vector<std::shared_ptr<Generation>> parts_ ABSL_GUARDED_BY(mutex_);
};

/// Answers by any number of messages, one write at a time. `Reactor` is gRPC's for the method.
template <typename Reactor>
class StreamedGenerationCall : public GenerationCall, public Reactor {
 public:
  using GenerationCall::GenerationCall;

  void OnWriteDone(bool ok) final {
    if (!ok) AbandonByClient();
    {
      MutexLock lock(&mutex_);
      writing_ = false;
      writing_since_.reset();
    }
    Pump();
  }
  void OnCancel() final {
    AbandonByClient();
    Pump();
  }
  void OnDone() final { Close(); }

 protected:
  /// Ends the call before anything was sent, so that a client or proxy may try elsewhere.
  void Refuse(const absl::Status& status) ABSL_LOCKS_EXCLUDED(mutex_) {
    {
      MutexLock lock(&mutex_);
      finished_ = true;
    }
    this->Finish(PrepareFinish(status));
  }

  /// From now on the caller alone may write, until OnWriteDone.
  void BeginWrite(absl::Time since) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    writing_ = true;
    writing_since_ = since;
  }

  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
};

/// Starts the calls' reactors; they delete themselves.
grpc::ServerUnaryReactor* StartGenerate(grpc::CallbackServerContext* context,
                                        const v1::GenerateRequest& request,
                                        v1::GenerateResponse* response,
                                        const CallServices& services);

grpc::ServerUnaryReactor* StartScore(grpc::CallbackServerContext* context,
                                     const v1::ScoreRequest& request, v1::ScoreResponse* response,
                                     const CallServices& services);

grpc::ServerWriteReactor<v1::GenerateStreamResponse>* StartGenerateStream(
    grpc::CallbackServerContext* context, const v1::GenerateRequest& request,
    const CallServices& services);

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_GENERATION_CALL_H_
