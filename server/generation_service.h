// firesteel.v1.GenerationService.

#ifndef FIRESTEEL_SERVER_GENERATION_SERVICE_H_
#define FIRESTEEL_SERVER_GENERATION_SERVICE_H_

#include "firesteel/v1/generation_service.grpc.pb.h"
#include "server/generation_call.h"

namespace firesteel::server {

/// Thread-safe.
class GenerationService final : public v1::GenerationService::CallbackService {
 public:
  explicit GenerationService(const CallServices& services) : services_(services) {}

  grpc::ServerUnaryReactor* Generate(grpc::CallbackServerContext* context,
                                     const v1::GenerateRequest* request,
                                     v1::GenerateResponse* response) override;
  grpc::ServerWriteReactor<v1::GenerateStreamResponse>* GenerateStream(
      grpc::CallbackServerContext* context, const v1::GenerateRequest* request) override;
  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context,
                                     const v1::TokenizeRequest* request,
                                     v1::TokenizeResponse* response) override;
  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context,
                                       const v1::DetokenizeRequest* request,
                                       v1::DetokenizeResponse* response) override;
  grpc::ServerUnaryReactor* Score(grpc::CallbackServerContext* context,
                                  const v1::ScoreRequest* request,
                                  v1::ScoreResponse* response) override;

 private:
  const CallServices services_;
};

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_GENERATION_SERVICE_H_
