// Draws the next token from logits.

#ifndef FIRESTEEL_RUNTIME_SAMPLING_SAMPLER_H_
#define FIRESTEEL_RUNTIME_SAMPLING_SAMPLER_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

#include "absl/status/statusor.h"

namespace firesteel {

/// Added to the logit of a token.
struct LogitBias {
  int32_t token = 0;
  float bias = 0.0f;
};

/// How the next token is drawn: penalties for tokens seen before, biases, temperature, then top_k,
/// top_p, min_p. Values are checked by the caller.
struct SamplingParams {
  float temperature = 1.0f;           // 0: greedy
  uint32_t top_k = 0;                 // 0: off
  float top_p = 1.0f;                 // (0, 1]
  float min_p = 0.0f;                 // [0, 1]: of the most probable token's probability
  float repetition_penalty = 1.0f;    // > 0: divides positive, multiplies negative logits
  float presence_penalty = 0.0f;      // subtracted once
  float frequency_penalty = 0.0f;     // subtracted as often as the token was seen
  std::vector<LogitBias> logit_bias;  // of different tokens, each < vocab_size
  uint64_t seed = 0;

  bool penalizes() const {
    return repetition_penalty != 1.0f || presence_penalty != 0.0f || frequency_penalty != 0.0f;
  }
};

/// How often each token occurs in a sequence so far, prompt and generated: what penalties look at.
using TokenCounts = std::unordered_map<int32_t, uint32_t>;

/// How many of the largest logits decide what is drawn: 1 for greedy, top_k where that is set
/// (top_p and min_p choose among those), 0 where all of them count: penalties and biases may lift
/// any token to the top.
uint32_t LargestLogitsNeeded(const SamplingParams& params);

/// A uniform number in [0, 1) that depends on its arguments only, so that neither batching nor
/// order of arrival changes what a sequence draws. Rounds of the splitmix64 finaliser (Steele et
/// al., OOPSLA 2014).
double CounterUniform(uint64_t seed, uint64_t sequence, uint64_t position);

/// Scratch of one thread; grows to the vocabulary once.
class Sampler {
 public:
  /// The next token of a sequence, given the logits [vocab] of its last position.
  ///
  /// `forbidden` tokens are never drawn. Greedy takes the first largest logit. Logits that are NaN
  /// count as −∞. Internal error if nothing can be drawn (no finite logit is left). `seen` may be
  /// null where the params do not penalize; its order changes nothing.
  absl::StatusOr<int32_t> Sample(std::span<const float> logits, const SamplingParams& params,
                                 uint64_t sequence, uint64_t position,
                                 std::span<const int32_t> forbidden = {},
                                 const TokenCounts* seen = nullptr);

  /// The same token from some of the logits: `ids` [n], rising, and their logits [n]. They hold the
  /// n ≥ LargestLogitsNeeded(params) + forbidden.size() largest and all that equal
  /// the last of those, or the whole vocabulary. LargestLogitsNeeded(params) > 0.
  absl::StatusOr<int32_t> Sample(std::span<const uint32_t> ids, std::span<const float> logits,
                                 const SamplingParams& params, uint64_t sequence, uint64_t position,
                                 std::span<const int32_t> forbidden = {});

 private:
  struct Candidate {
    float logit;
    int32_t token;
  };
  // Candidates in falling order of logit, of equals the lower token first.
  static bool Before(const Candidate& a, const Candidate& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
  }
  std::span<const float> Adjust(std::span<const float> logits, const SamplingParams& params,
                                const TokenCounts* seen);
  std::optional<int32_t> DrawFromAll(std::span<const float> logits, float temperature,
                                     double uniform, std::span<const int32_t> forbidden);
  absl::StatusOr<int32_t> SampleCandidates(const SamplingParams& params, uint64_t sequence,
                                           uint64_t position);
  void KeepTopK(uint32_t top_k);
  void Weigh(float temperature);
  void KeepTopP(float top_p);
  void KeepMinP(float min_p);
  int32_t Draw(double uniform) const;

  std::vector<float> adjusted_;  // [vocab]: logits after penalties and biases
  std::vector<Candidate> candidates_;
  std::vector<double> weights_;  // e^((logit − max) / temperature) of each candidate, or block
  // Scratch of KeepTopP.
  std::vector<size_t> order_;
  std::vector<Candidate> kept_;
  std::vector<double> kept_weights_;
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_SAMPLING_SAMPLER_H_
