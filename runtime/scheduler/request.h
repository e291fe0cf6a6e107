// What is asked of the engine and what it answers, in the runtime's own terms (no wire types).

#ifndef FIRESTEEL_RUNTIME_SCHEDULER_REQUEST_H_
#define FIRESTEEL_RUNTIME_SCHEDULER_REQUEST_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "runtime/sampling/sampler.h"

namespace firesteel {

/// What ends a sequence besides max_tokens.
struct StoppingParams {
  std::vector<std::string> stop;
  std::vector<int32_t> stop_token_ids;
  bool ignore_eos = false;
  uint32_t min_tokens = 0;  // before so many tokens, neither eos nor a stop ends the sequence
};

/// One sequence to generate. The prompt is not empty and leaves room for one token.
struct GenerationRequest {
  std::string request_id;
  std::vector<int32_t> prompt;  // token ids, each < vocab_size
  uint32_t max_tokens = 256;    // ≥ 1; prompt.size() + max_tokens ≤ context
  SamplingParams sampling;
  StoppingParams stopping;
  int32_t priority = 0;  // the larger is admitted first
  absl::Time deadline = absl::InfiniteFuture();
};

enum class FinishReason : uint8_t { kLength, kEos, kStop, kCancelled, kDeadlineExceeded, kError };
inline constexpr size_t kNumFinishReasons = 6;

/// "length", "eos", "stop", "cancelled", "deadline_exceeded", "error".
const char* FinishReasonName(FinishReason reason);

/// What one step added to a sequence. The text never splits a code point and may lag behind the
/// tokens.
struct TokenDelta {
  std::string text;
  std::vector<int32_t> token_ids;
};

struct Usage {
  uint32_t prompt_tokens = 0;
  uint32_t cached_tokens = 0;
  uint32_t generated_tokens = 0;
};

/// Phases of a request as the scheduler saw them.
struct Timings {
  absl::Duration queue;        // submit → admitted to the batch
  absl::Duration prefill;      // admitted → prompt computed
  absl::Duration first_token;  // submit → first token; zero where none came
  absl::Duration decode;       // first token → end
  absl::Duration total;        // submit → end
};

/// Means over all layers and over the positions that the request computed.
struct Sparsity {
  double ffn_active_fraction = 0;           // of F neurons
  double attention_attended_positions = 0;  // a head
  double attention_attended_fraction = 0;   // of the visible positions
  double flops_skipped_fraction = 0;        // of the same model's FLOPs with nothing skipped
};

struct GenerationResult {
  FinishReason reason = FinishReason::kError;
  std::string stop_match;  // the stop string or the text of the stop token, where reason is kStop
  absl::Status status;     // the error, where reason is kError
  Usage usage;
  Timings timings;
  Sparsity sparsity;
};

/// Receives one request's output. Called from the engine's thread, in order, OnFinish exactly once
/// and last. Implementations must not block and must not call back into the engine.
class GenerationSink {
 public:
  virtual ~GenerationSink() = default;
  virtual void OnDelta(TokenDelta delta) = 0;
  virtual void OnFinish(GenerationResult result) = 0;
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_SCHEDULER_REQUEST_H_
