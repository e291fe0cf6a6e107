#include "server/kserve_service.h"

#include "absl/strings/str_cat.h"
#include "server/infer_call.h"
#include "server/kserve_translation.h"
#include "server/options.h"
#include "server/status.h"
#include "server/unary_answer.h"

namespace firesteel::server {

grpc::ServerUnaryReactor* KserveService::ServerLive(grpc::CallbackServerContext* context,
                                                    const inference::ServerLiveRequest*,
                                                    inference::ServerLiveResponse* response) {
  return AnswerUnary(context, services_.access, Audience::kAnybody, [&] {
    response->set_live(true);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* KserveService::ServerReady(grpc::CallbackServerContext* context,
                                                     const inference::ServerReadyRequest*,
                                                     inference::ServerReadyResponse* response) {
  return AnswerUnary(context, services_.access, Audience::kAnybody, [&] {
    response->set_ready(health_->IsServing(""));
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* KserveService::ModelReady(grpc::CallbackServerContext* context,
                                                    const inference::ModelReadyRequest* request,
                                                    inference::ModelReadyResponse* response) {
  return AnswerUnary(context, services_.access, Audience::kAnybody, [&] {
    const auto model = services_.models->Find(request->name());
    const bool version = request->version().empty() || request->version() == kModelVersion;
    response->set_ready(model.ok() && version && health_->IsServing((*model)->name));
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* KserveService::ServerMetadata(
    grpc::CallbackServerContext* context, const inference::ServerMetadataRequest*,
    inference::ServerMetadataResponse* response) {
  return AnswerUnary(context, services_.access, Audience::kClients, [&] {
    response->set_name("firesteel");
    response->set_version(Version());
    for (const char* extension : {"parameters", "generate", "binary_tensor_data"}) {
      response->add_extensions(extension);
    }
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* KserveService::ModelMetadata(
    grpc::CallbackServerContext* context, const inference::ModelMetadataRequest* request,
    inference::ModelMetadataResponse* response) {
  return AnswerUnary(context, services_.access, Audience::kClients, [&] {
    const auto model = services_.models->Find(request->name());
    if (!model.ok()) return model.status();
    if (!request->version().empty() && request->version() != kModelVersion) {
      return Refusal(kModelNotFound,
                     absl::StrCat("version: is ", Quoted(request->version()),
                                  "; every model has the one version ", kModelVersion));
    }
    DescribeTensors(**model, response);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* KserveService::ModelInfer(grpc::CallbackServerContext* context,
                                                    const inference::ModelInferRequest* request,
                                                    inference::ModelInferResponse* response) {
  return StartModelInfer(context, *request, response, services_);
}

grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* KserveService::ModelStreamInfer(
    grpc::CallbackServerContext* context) {
  return StartModelStreamInfer(context, services_);
}

}  // namespace firesteel::server
