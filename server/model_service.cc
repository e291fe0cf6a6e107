#include "server/model_service.h"

#include "server/request_translation.h"
#include "server/unary_answer.h"

namespace firesteel::server {

grpc::ServerUnaryReactor* ModelService::ListModels(grpc::CallbackServerContext* context,
                                                   const v1::ListModelsRequest*,
                                                   v1::ListModelsResponse* response) {
  return AnswerUnary(context, access_, Audience::kClients, [&] {
    for (const auto& model : models_->models()) {
      *response->add_models() = DescribeModel(*model, response->models_size() == 0);
    }
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* ModelService::GetModel(grpc::CallbackServerContext* context,
                                                 const v1::GetModelRequest* request,
                                                 v1::GetModelResponse* response) {
  return AnswerUnary(context, access_, Audience::kClients, [&] {
    const auto model = models_->Find(request->model());
    if (!model.ok()) return model.status();
    const auto first = models_->Find("");
    *response->mutable_model() = DescribeModel(**model, first.ok() && *first == *model);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* ModelService::GetServerInfo(grpc::CallbackServerContext* context,
                                                      const v1::GetServerInfoRequest*,
                                                      v1::GetServerInfoResponse* response) {
  return AnswerUnary(context, access_, Audience::kClients, [&] {
    *response = info_;
    for (const auto& model : models_->models()) response->add_models(model->name);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* ModelService::GetLoad(grpc::CallbackServerContext* context,
                                                const v1::GetLoadRequest*,
                                                v1::GetLoadResponse* response) {
  return AnswerUnary(context, access_, Audience::kClients, [&] {
    *response = load_->Load();
    return absl::OkStatus();
  });
}

}  // namespace firesteel::server
