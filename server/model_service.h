// firesteel.v1.ModelService.

#ifndef FIRESTEEL_SERVER_MODEL_SERVICE_H_
#define FIRESTEEL_SERVER_MODEL_SERVICE_H_

#include "firesteel/v1/model_service.grpc.pb.h"
#include "server/access_control.h"
#include "server/load_report.h"
#include "server/model_registry.h"

namespace firesteel::server {

/// Thread-safe. What is given by pointer outlives it.
class ModelService final : public v1::ModelService::CallbackService {
 public:
  /// `info` is what GetServerInfo answers.
  ModelService(const ModelRegistry* models, AccessControl* access, LoadMonitor* load,
               v1::GetServerInfoResponse info)
      : models_(models), access_(access), load_(load), info_(std::move(info)) {}

  grpc::ServerUnaryReactor* ListModels(grpc::CallbackServerContext* context,
                                       const v1::ListModelsRequest* request,
                                       v1::ListModelsResponse* response) override;
  grpc::ServerUnaryReactor* GetModel(grpc::CallbackServerContext* context,
                                     const v1::GetModelRequest* request,
                                     v1::GetModelResponse* response) override;
  grpc::ServerUnaryReactor* GetServerInfo(grpc::CallbackServerContext* context,
                                          const v1::GetServerInfoRequest* request,
                                          v1::GetServerInfoResponse* response) override;
  grpc::ServerUnaryReactor* GetLoad(grpc::CallbackServerContext* context,
                                    const v1::GetLoadRequest* request,
                                    v1::GetLoadResponse* response) override;

 private:
  const ModelRegistry* const models_;
  AccessControl* const access_;
  LoadMonitor* const load_;
  const v1::GetServerInfoResponse info_;  // without models
};

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_MODEL_SERVICE_H_
