// firesteel.v1.AdminService.

#ifndef FIRESTEEL_SERVER_ADMIN_SERVICE_H_
#define FIRESTEEL_SERVER_ADMIN_SERVICE_H_

#include "firesteel/v1/admin_service.grpc.pb.h"
#include "server/access_control.h"
#include "server/model_manager.h"
#include "server/model_registry.h"

namespace firesteel::server {

/// Thread-safe. Everything given to it outlives it.
class AdminService final : public v1::AdminService::CallbackService {
 public:
  AdminService(const ModelRegistry* models, ModelManager* manager, AccessControl* access)
      : models_(models), manager_(manager), access_(access) {}

  grpc::ServerUnaryReactor* LoadModel(grpc::CallbackServerContext* context,
                                      const v1::LoadModelRequest* request,
                                      v1::LoadModelResponse* response) override;
  grpc::ServerUnaryReactor* UnloadModel(grpc::CallbackServerContext* context,
                                        const v1::UnloadModelRequest* request,
                                        v1::UnloadModelResponse* response) override;
  grpc::ServerUnaryReactor* ReloadModel(grpc::CallbackServerContext* context,
                                        const v1::ReloadModelRequest* request,
                                        v1::ReloadModelResponse* response) override;

 private:
  const ModelRegistry* const models_;
  ModelManager* const manager_;
  AccessControl* const access_;
};

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_ADMIN_SERVICE_H_
