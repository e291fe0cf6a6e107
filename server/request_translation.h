// Between the wire and the runtime: every check of a request, and every field of an answer.

#ifndef FIRESTEEL_SERVER_REQUEST_TRANSLATION_H_
#define FIRESTEEL_SERVER_REQUEST_TRANSLATION_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "firesteel/v1/generation_service.pb.h"
#include "firesteel/v1/model_service.pb.h"
#include "runtime/scheduler/request.h"
#include "server/model_registry.h"

namespace firesteel::server {

/// What a request may ask for, the same for every model; GetModel states it.
struct RequestLimits {
  static constexpr uint32_t kDefaultMaxTokens = 256;
  static constexpr uint32_t kMaxSequences = 16;
  static constexpr uint32_t kMaxStopStrings = 16;
  static constexpr uint32_t kMaxStopStringBytes = 256;
  static constexpr uint32_t kMaxStopTokenIds = 64;
  static constexpr uint32_t kMaxLogprobs = 20;
  static constexpr uint32_t kMaxLogitBiases = 1024;
  static constexpr uint32_t kMaxCacheSaltBytes = 256;
  static constexpr float kMaxTemperature = 100;
};

/// Checks every field of `request` against `model` and turns it into the runtime's terms. Request
/// id, deadline and, where the request has none, the seed are left to the caller (*needs_seed says
/// so). InvalidArgument with a google.rpc.BadRequest that lists every wrong field.
absl::StatusOr<GenerationRequest> TranslateRequest(const v1::GenerateRequest& request,
                                                   const ServedModel& model, bool* needs_seed);

v1::FinishReason ToProto(FinishReason reason);
v1::Usage ToProto(const Usage& usage);
v1::Timings ToProto(const Timings& timings);
v1::Sparsity ToProto(const Sparsity& sparsity);

/// Everything that GetModel tells about a model.
v1::ModelInfo DescribeModel(const ServedModel& model, bool is_default);

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_REQUEST_TRANSLATION_H_
