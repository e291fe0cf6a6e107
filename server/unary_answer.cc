#include "server/unary_answer.h"

#include <exception>

#include "server/call_metadata.h"
#include "server/logging.h"
#include "server/status.h"

namespace firesteel::server {

absl::Status CheckCaller(const grpc::ServerContextBase& context, AccessControl* access,
                         Audience audience) {
  if (audience == Audience::kAnybody) return absl::OkStatus();
  const auto caller = access->Authenticate(context);
  if (!caller.ok()) return caller.status();
  return audience == Audience::kAdmins ? CheckAdmin(*caller) : absl::OkStatus();
}

grpc::ServerUnaryReactor* AnswerUnary(grpc::CallbackServerContext* context, AccessControl* access,
                                      Audience audience,
                                      const std::function<absl::Status()>& handle) {
  const CallMetadata metadata = ReadCallMetadata(*context);
  absl::Status status;
  try {
    status = CheckCaller(*context, access, audience);
    if (status.ok()) status = handle();
  } catch (const std::exception& e) {
    Log(LogLevel::kError, "request handling threw",
        {{"request_id", metadata.request_id}, {"error", e.what()}});
    status = Refusal(kInternalError, "the request could not be handled");
  }
  if (status.ok()) context->AddInitialMetadata(kRequestIdKey, metadata.request_id);
  AddTrailers(metadata, status, context);
  grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
  reactor->Finish(ToGrpcStatus(status));
  return reactor;
}

}  // namespace firesteel::server
