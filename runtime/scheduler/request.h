// What is asked of the engine and what it answers, in the runtime's own terms (no wire types).

#ifndef FIRESTEEL_RUNTIME_SCHEDULER_REQUEST_H_
#define FIRESTEEL_RUNTIME_SCHEDULER_REQUEST_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "runtime/sampling/logprobs.h"
#include "runtime/sampling/sampler.h"

namespace firesteel {

/// What ends a sequence besides max_tokens.
struct StoppingParams {
  std::vector<std::string> stop;
  std::vector<int32_t> stop_token_ids;
  bool ignore_eos = false;
  uint32_t min_tokens = 0;  // before so many tokens, neither eos nor a stop ends the sequence
};

/// Bounds of a request that the engine checks.
inline constexpr uint32_t kMaxSequences = 16;
inline constexpr uint32_t kMaxLogprobs = 20;

/// A prompt, and the sequences to generate from it. The prompt is not empty and leaves room for one
/// token.
struct GenerationRequest {
  std::string request_id;
  std::vector<int32_t> prompt;  // token ids, each < vocab_size
  /// Of each sequence, ≥ 1; prompt.size() + max_tokens ≤ context. May be 0 with prompt_logprobs, to
  /// score a text: nothing is generated, and the request ends with kLength.
  uint32_t max_tokens = 256;
  uint32_t n = 1;  // sequences, from 1 to kMaxSequences; they share the prompt's computation
  SamplingParams sampling;
  StoppingParams stopping;
  /// Log-probabilities of tokens, each with so many alternatives, at most kMaxLogprobs.
  std::optional<uint32_t> logprobs;
  bool prompt_logprobs = false;  // of the prompt's tokens, too
  int32_t priority = 0;          // the larger is admitted first
  absl::Time deadline = absl::InfiniteFuture();
  /// Who asks, as authenticated: waiting requests of different clients take fair turns. Nothing of
  /// a prompt is shared between requests that differ in client or cache_salt.
  std::string client;
  std::string cache_salt;
};

enum class FinishReason : uint8_t { kLength, kEos, kStop, kCancelled, kDeadlineExceeded, kError };
inline constexpr size_t kNumFinishReasons = 6;

/// "length", "eos", "stop", "cancelled", "deadline_exceeded", "error".
const char* FinishReasonName(FinishReason reason);

/// How a sequence ended by itself.
struct SequenceEnd {
  FinishReason reason = FinishReason::kLength;  // kLength, kEos or kStop
  std::string stop_match;  // the stop string or the text of the stop token, where reason is kStop
};

/// What one step added to a sequence. The text never splits a code point and may lag behind the
/// tokens.
struct TokenDelta {
  uint32_t index = 0;  // of the sequence, < n
  std::string text;
  std::vector<int32_t> token_ids;
  std::vector<TokenLogprob> logprobs;  // one for each of token_ids, where they were asked for
  std::optional<SequenceEnd> end;      // set in the sequence's last delta, if it ended by itself
};

struct Usage {
  uint32_t prompt_tokens = 0;
  uint32_t cached_tokens = 0;     // of the prompt's, those that were not computed anew
  uint32_t generated_tokens = 0;  // of all sequences
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
  /// Of the first sequence where all ended by themselves; else what ended the request: kCancelled,
  /// kDeadlineExceeded or kError.
  FinishReason reason = FinishReason::kError;
  absl::Status status;  // the error, where reason is kError
  Usage usage;
  Timings timings;
  Sparsity sparsity;
};

/// Receives one request's output. Called from the engine's thread, in order, OnFinish exactly once
/// and last. Implementations must not block and must not call back into the engine.
class GenerationSink {
 public:
  virtual ~GenerationSink() = default;
  /// The next tokens of the prompt, where prompt_logprobs asks for them: every one but the first,
  /// which nothing precedes, in order, before any delta.
  // By value, as overrides keep them. NOLINTNEXTLINE(performance-unnecessary-value-param)
  virtual void OnPromptLogprobs(std::vector<TokenLogprob> /*logprobs*/) {}
  virtual void OnDelta(TokenDelta delta) = 0;
  virtual void OnFinish(GenerationResult result) = 0;
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_SCHEDULER_REQUEST_H_
