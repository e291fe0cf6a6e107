// inference.GRPCInferenceService: the Open Inference Protocol, for KServe's and Triton's clients.

#ifndef FIRESTEEL_SERVER_KSERVE_SERVICE_H_
#define FIRESTEEL_SERVER_KSERVE_SERVICE_H_

#include "inference/grpc_service.grpc.pb.h"
#include "server/generation_call.h"
#include "server/health.h"

namespace firesteel::server {

/// All methods by gRPC's callback API, ModelStreamInfer with messages as bytes.
using KserveMethods = inference::GRPCInferenceService::WithRawCallbackMethod_ModelStreamInfer<
    inference::GRPCInferenceService::WithCallbackMethod_ServerLive<
        inference::GRPCInferenceService::WithCallbackMethod_ServerReady<
            inference::GRPCInferenceService::WithCallbackMethod_ModelReady<
                inference::GRPCInferenceService::WithCallbackMethod_ServerMetadata<
                    inference::GRPCInferenceService::WithCallbackMethod_ModelMetadata<
                        inference::GRPCInferenceService::WithCallbackMethod_ModelInfer<
                            inference::GRPCInferenceService::Service>>>>>>>;

/// Liveness and readiness are told to anybody, as to probes. Thread-safe.
class KserveService final : public KserveMethods {
 public:
  /// `health` outlives it.
  KserveService(const CallServices& services, const HealthMonitor* health)
      : services_(services), health_(health) {}

  grpc::ServerUnaryReactor* ServerLive(grpc::CallbackServerContext* context,
                                       const inference::ServerLiveRequest* request,
                                       inference::ServerLiveResponse* response) override;
  grpc::ServerUnaryReactor* ServerReady(grpc::CallbackServerContext* context,
                                        const inference::ServerReadyRequest* request,
                                        inference::ServerReadyResponse* response) override;
  grpc::ServerUnaryReactor* ModelReady(grpc::CallbackServerContext* context,
                                       const inference::ModelReadyRequest* request,
                                       inference::ModelReadyResponse* response) override;
  grpc::ServerUnaryReactor* ServerMetadata(grpc::CallbackServerContext* context,
                                           const inference::ServerMetadataRequest* request,
                                           inference::ServerMetadataResponse* response) override;
  grpc::ServerUnaryReactor* ModelMetadata(grpc::CallbackServerContext* context,
                                          const inference::ModelMetadataRequest* request,
                                          inference::ModelMetadataResponse* response) override;
  grpc::ServerUnaryReactor* ModelInfer(grpc::CallbackServerContext* context,
                                       const inference::ModelInferRequest* request,
                                       inference::ModelInferResponse* response) override;
  grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* ModelStreamInfer(
      grpc::CallbackServerContext* context) override;

 private:
  const CallServices services_;
  const HealthMonitor* const health_;
};

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_KSERVE_SERVICE_H_
