#include "server/generation_service.h"

#include "server/status.h"
#include "server/tokenization.h"
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
                                                      const v1::TokenizeRequest* request,
                                                      v1::TokenizeResponse* response) {
  return AnswerUnary(context, services_.access, Audience::kClients, [&] {
    const auto model = services_.models->Find(request->model());
    return model.ok() ? server::Tokenize(*request, **model, response) : model.status();
  });
}

grpc::ServerUnaryReactor* GenerationService::Detokenize(grpc::CallbackServerContext* context,
                                                        const v1::DetokenizeRequest* request,
                                                        v1::DetokenizeResponse* response) {
  return AnswerUnary(context, services_.access, Audience::kClients, [&] {
    const auto model = services_.models->Find(request->model());
    return model.ok() ? server::Detokenize(*request, **model, response) : model.status();
  });
}

grpc::ServerUnaryReactor* GenerationService::Score(grpc::CallbackServerContext* context,
                                                   const v1::ScoreRequest* request,
                                                   v1::ScoreResponse* response) {
  return StartScore(context, *request, response, services_);
}

}  // namespace firesteel::server
