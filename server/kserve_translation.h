// Between the Open Inference Protocol and firesteel.v1: tensors and parameters become
// GenerateRequests, and what comes of those becomes tensors.

#ifndef FIRESTEEL_SERVER_KSERVE_TRANSLATION_H_
#define FIRESTEEL_SERVER_KSERVE_TRANSLATION_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "firesteel/v1/generation_service.pb.h"
#include "inference/grpc_service.pb.h"
#include "server/model_registry.h"
#include "server/request_translation.h"

namespace firesteel::server {

/// Texts of one ModelInferRequest.
inline constexpr size_t kMaxInferBatch = 64;

/// Of a request's id, which comes back in every message of its stream.
inline constexpr size_t kMaxInferIdBytes = 1024;

/// The one version that every model has.
inline constexpr char kModelVersion[] = "1";

/// A ModelInferRequest, taken apart.
struct InferRequest {
  std::string id;
  std::vector<v1::GenerateRequest> requests;          // one a text
  std::vector<int64_t> shape;                         // of text_input, and so of every output
  std::vector<std::string> outputs;                   // the tensors to answer with
  absl::Duration timeout = absl::InfiniteDuration();  // of each text, from its admission
  bool raw = false;  // the answer's tensors go where the request's were
};

/// InvalidArgument with a google.rpc.BadRequest that lists everything wrong with tensors and
/// parameters; NotFound for a version that is not there. What the parameters' values may be is
/// checked by TranslateRequest.
absl::StatusOr<InferRequest> TranslateInfer(const inference::ModelInferRequest& request);

/// What came of one text.
struct InferOutput {
  v1::Sequence sequence;
  Usage usage;
};

/// Fills the tensors that `request` wants from one output a text.
void FillInfer(const InferRequest& request, const std::string& model,
               const std::vector<InferOutput>& outputs, inference::ModelInferResponse* response);

/// The tensors of a model.
void DescribeTensors(const ServedModel& model, inference::ModelMetadataResponse* response);

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_KSERVE_TRANSLATION_H_
