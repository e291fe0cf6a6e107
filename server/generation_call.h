// One call of GenerationService: gRPC's reactor on one side, the engine's sink on the other.
//
// A call is held by a reference of its own until gRPC says OnDone, by the engine until the sink has
// finished, and by the delivery thread while it is scheduled. Finish() is called exactly once, and
// only after the sink has finished (or the request was never admitted): so nothing of the engine's
// can come after OnDone.

#ifndef FIRESTEEL_SERVER_GENERATION_CALL_H_
#define FIRESTEEL_SERVER_GENERATION_CALL_H_

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "firesteel/v1/generation_service.pb.h"
#include "runtime/scheduler/engine.h"
#include "runtime/threading/mutex.h"
#include "server/call_metadata.h"
#include "server/delivery_thread.h"
#include "server/live_calls.h"
#include "server/model_registry.h"

namespace firesteel::server {

/// What a call needs of its server. All outlive the call.
struct CallServices {
  const ModelRegistry* models = nullptr;
  DeliveryThread* delivery = nullptr;
  LiveCalls* live = nullptr;
};

/// What unary and streamed calls share: admission, the output that waits to be sent, cancellation,
/// the log line.
///
/// Thread-safe: the engine's thread calls the sink, gRPC's threads and the delivery thread the
/// rest. No lock is held while the engine or gRPC is called.
class GenerationCall : public GenerationSink,
                       public Deliverable,
                       public std::enable_shared_from_this<GenerationCall> {
 public:
  GenerationCall(grpc::CallbackServerContext* context, const char* method,
                 const CallServices& services);

  void OnDelta(TokenDelta delta) override;
  void OnFinish(GenerationResult result) override;

 protected:
  /// Everything that came from the engine and was not taken yet.
  struct Output {
    std::string text;
    std::vector<int32_t> token_ids;
    std::optional<GenerationResult> result;  // set where nothing follows
    std::string stop_match;                  // beside a result
  };

  /// Checks, translates and submits. On success the sink's methods may have been called before it
  /// returns.
  absl::Status Admit(const v1::GenerateRequest& request);

  /// To be called when the client has gone, in either way that gRPC tells so. The request leaves
  /// the batch.
  void Abandon() ABSL_LOCKS_EXCLUDED(mutex_);

  /// The status that a result stands for; OK where the client got what it asked for.
  absl::Status StatusOf(const GenerationResult& result) const ABSL_LOCKS_EXCLUDED(mutex_);

  /// Adds the trailing metadata, remembers `status` for the log line, and translates it.
  grpc::Status PrepareFinish(const absl::Status& status);

  /// OnDone: writes the log line and leaves. The call is gone afterwards.
  void Close() ABSL_LOCKS_EXCLUDED(mutex_);

  /// To be called before gRPC or the engine knows of the call: it keeps itself alive until Close.
  void Open();

  /// Whether new output from the engine should be scheduled for delivery; called with the lock
  /// held.
  virtual bool WantsDelivery() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) = 0;

  /// Moves the text into `sequence`, with the result if there is one.
  void FillSequence(Output output, v1::Sequence* sequence) const;

  grpc::CallbackServerContext* const context_;  // gRPC's, valid until OnDone
  const char* const method_;
  const CallMetadata metadata_;
  const CallServices services_;
  const absl::Time start_;

  // Set by Admit, before the engine or another thread sees the call; constant from then on.
  const ServedModel* model_ = nullptr;
  bool return_token_ids_ = false;

  mutable Mutex mutex_;
  Output pending_ ABSL_GUARDED_BY(mutex_);
  bool scheduled_ ABSL_GUARDED_BY(mutex_) = false;
  bool abandoned_ ABSL_GUARDED_BY(mutex_) = false;  // nobody reads any more
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;   // gRPC was told the status

 private:
  void WriteLogLine() const ABSL_LOCKS_EXCLUDED(mutex_);
  void ScheduleIfWanted() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  std::optional<Engine::RequestHandle> handle_ ABSL_GUARDED_BY(mutex_);
  std::string stop_match_ ABSL_GUARDED_BY(mutex_);                  // of the one sequence
  std::optional<GenerationResult> result_ ABSL_GUARDED_BY(mutex_);  // for the log line
  absl::Status final_status_ ABSL_GUARDED_BY(mutex_);
  std::shared_ptr<GenerationCall> self_;  // from Open to Close
};

/// Starts the calls' reactors; they delete themselves.
grpc::ServerUnaryReactor* StartGenerate(grpc::CallbackServerContext* context,
                                        const v1::GenerateRequest& request,
                                        v1::GenerateResponse* response,
                                        const CallServices& services);

grpc::ServerWriteReactor<v1::GenerateStreamResponse>* StartGenerateStream(
    grpc::CallbackServerContext* context, const v1::GenerateRequest& request,
    const CallServices& services);

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_GENERATION_CALL_H_
