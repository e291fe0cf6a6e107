#include "server/admin_service.h"

#include <functional>

#include "server/call_metadata.h"
#include "server/request_translation.h"
#include "server/status.h"
#include "server/unary_answer.h"

namespace firesteel::server {
namespace {

/// What to do once a model is there: fill the response from it.
using Begin = std::function<absl::Status(ModelManager::Done)>;

// Answers a call when the change that `begin` starts is made. gRPC's default reactor lives until
// Finish, whatever becomes of the client.
grpc::ServerUnaryReactor* AnswerLater(grpc::CallbackServerContext* context, AccessControl* access,
                                      const ModelRegistry* models, v1::ModelInfo* info,
                                      const Begin& begin) {
  grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
  const CallMetadata metadata = ReadCallMetadata(*context);
  const auto finish = [context, metadata, reactor](const absl::Status& status) {
    AddTrailers(metadata, status, context);
    reactor->Finish(ToGrpcStatus(status));
  };
  absl::Status status = CheckCaller(*context, access, Audience::kAdmins);
  if (status.ok()) {
    status = begin([finish, models, info](const absl::StatusOr<ModelRegistry::Model>& model) {
      if (model.ok()) {
        const auto first = models->Find("");
        *info = DescribeModel(**model, first.ok() && *first == *model);
      }
      finish(model.status());
    });
  }
  if (!status.ok()) finish(status);
  return reactor;
}

}  // namespace

grpc::ServerUnaryReactor* AdminService::LoadModel(grpc::CallbackServerContext* context,
                                                  const v1::LoadModelRequest* request,
                                                  v1::LoadModelResponse* response) {
  return AnswerLater(
      context, access_, models_, response->mutable_model(), [&](ModelManager::Done done) {
        return manager_->Load({.name = request->name(), .path = request->path()}, std::move(done));
      });
}

grpc::ServerUnaryReactor* AdminService::UnloadModel(grpc::CallbackServerContext* context,
                                                    const v1::UnloadModelRequest* request,
                                                    v1::UnloadModelResponse*) {
  return AnswerUnary(context, access_, Audience::kAdmins,
                     [&] { return manager_->Unload(request->name()); });
}

grpc::ServerUnaryReactor* AdminService::ReloadModel(grpc::CallbackServerContext* context,
                                                    const v1::ReloadModelRequest* request,
                                                    v1::ReloadModelResponse* response) {
  return AnswerLater(
      context, access_, models_, response->mutable_model(),
      [&](ModelManager::Done done) { return manager_->Reload(request->name(), std::move(done)); });
}

}  // namespace firesteel::server
