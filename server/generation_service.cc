#include "server/generation_service.h"

#include "server/unary_answer.h"

namespace firesteel::server {

grpc::ServerUnaryReactor* GenerationService::Generate(grpc::CallbackServerContext* context,
                                                      const v1::GenerateRequest* request,
                                                      v1::GenerateResponse* response) {
  return StartGenerate(context, *request, response, services_);
}

grpc::ServerWriteReactor<v1::GenerateStreamResponse>* GenerationService::GenerateStream(
    grpc::CallbackServerContext* context, const v1::GenerateRequest* request) {
  return StartGenerateStream(context, *request, services_);
}

grpc::ServerUnaryReactor* GenerationService::Tokenize(grpc::CallbackServerContext* context,
                                                      const v1::TokenizeRequest*,
                                                      v1::TokenizeResponse*) {
  return Answer(context, RpcNotSupported("GenerationService.Tokenize"));
}

grpc::ServerUnaryReactor* GenerationService::Detokenize(grpc::CallbackServerContext* context,
                                                        const v1::DetokenizeRequest*,
                                                        v1::DetokenizeResponse*) {
  return Answer(context, RpcNotSupported("GenerationService.Detokenize"));
}

grpc::ServerUnaryReactor* GenerationService::Score(grpc::CallbackServerContext* context,
                                                   const v1::ScoreRequest*, v1::ScoreResponse*) {
  return Answer(context, RpcNotSupported("GenerationService.Score"));
}

}  // namespace firesteel::server
