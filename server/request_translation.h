// Between the wire and the runtime: every check of a request, and every field of an answer.

#ifndef FIRESTEEL_SERVER_REQUEST_TRANSLATION_H_
#define FIRESTEEL_SERVER_REQUEST_TRANSLATION_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "firesteel/v1/generation_service.pb.h"
#include "firesteel/v1/model_service.pb.h"
#include "runtime/scheduler/request.h"
#include "runtime/tokenizer/tokenizer.h"
#include "server/model_registry.h"

namespace firesteel::server {

/// What came of one sequence.
struct SequenceOutput {
  std::string text;
  std::vector<int32_t> token_ids;      // where the request wants them
  std::vector<TokenLogprob> logprobs;  // the same
  bool starts_prompt = false;          // the first logprob is of a token that nothing precedes
  std::optional<SequenceEnd> end;      // set where nothing follows

  bool empty() const {
    return text.empty() && token_ids.empty() && logprobs.empty() && !end.has_value();
  }
};

/// What a request may ask for, the same for every model; GetModel states it.
struct RequestLimits {
  static constexpr uint32_t kDefaultMaxTokens = 256;
  static constexpr uint32_t kMaxStopStrings = 16;
  static constexpr uint32_t kMaxStopStringBytes = 256;
  static constexpr uint32_t kMaxStopTokenIds = 64;
  static constexpr uint32_t kMaxLogitBiases = 1024;
  static constexpr uint32_t kMaxCacheSaltBytes = 256;
  static constexpr float kMaxTemperature = 100;
};

/// A request in the runtime's terms, and what of its answer is the server's matter. Request id and
/// deadline are left to the caller, and the seed where the request has none.
struct TranslatedRequest {
  GenerationRequest request;
  bool needs_seed = false;
  bool return_token_ids = false;
  bool echo = false;
  std::string prompt_text;             // of an echo
  const char* input_field = "prompt";  // where the prompt came from, for messages
};

/// Checks every field of `request` against `model`. InvalidArgument with a google.rpc.BadRequest
/// that lists every wrong field.
absl::StatusOr<TranslatedRequest> TranslateRequest(const v1::GenerateRequest& request,
                                                   const ServedModel& model);

/// The same for a text to score: nothing is generated.
absl::StatusOr<TranslatedRequest> TranslateScore(const v1::ScoreRequest& request,
                                                 const ServedModel& model);

/// One sequence, or what is new of it.
void FillSequence(uint32_t index, SequenceOutput output, const Tokenizer& tokenizer,
                  v1::Sequence* sequence);

/// The tokens of a scored text: the first, which nothing precedes, and the others.
void FillScore(int32_t first_token, const std::vector<TokenLogprob>& others,
               const Tokenizer& tokenizer, v1::ScoreResponse* response);

v1::FinishReason ToProto(FinishReason reason);
v1::Usage ToProto(const Usage& usage);
v1::Timings ToProto(const Timings& timings);
v1::Sparsity ToProto(const Sparsity& sparsity);

/// Everything that GetModel tells about a model.
v1::ModelInfo DescribeModel(const ServedModel& model, bool is_default);

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_REQUEST_TRANSLATION_H_
