// Draws the next token from logits.

#ifndef FIRESTEEL_RUNTIME_SAMPLING_SAMPLER_H_
#define FIRESTEEL_RUNTIME_SAMPLING_SAMPLER_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"

namespace firesteel {

/// How the next token is drawn: temperature, then top_k, top_p, min_p. Values are checked by the
/// caller.
struct SamplingParams {
  float temperature = 1.0f;  // 0: greedy
  uint32_t top_k = 0;        // 0: off
  float top_p = 1.0f;        // (0, 1]
  float min_p = 0.0f;        // [0, 1]: of the most probable token's probability
  uint64_t seed = 0;
};

/// How many of the largest logits decide what is drawn: 1 for greedy, top_k where that is set
/// (top_p and min_p choose among those), 0 where all of them count.
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
  /// count as −∞. Internal error if nothing can be drawn (no finite logit is left).
  absl::StatusOr<int32_t> Sample(std::span<const float> logits, const SamplingParams& params,
                                 uint64_t sequence, uint64_t position,
                                 std::span<const int32_t> forbidden = {});

  /// The same token from some of the logits: `ids` [n], rising, and their logits [n]. They hold the
  /// n ≥ LargestLogitsNeeded(params) + forbidden.size() largest and all that equal
  /// the last of those, or the whole vocabulary.
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
  void AddCandidate(int32_t token, float logit, std::span<const int32_t> forbidden);
  absl::StatusOr<int32_t> SampleCandidates(const SamplingParams& params, uint64_t sequence,
                                           uint64_t position);
  void KeepTopK(uint32_t top_k);
  void Weigh(float temperature);
  void KeepTopP(float top_p);
  void KeepMinP(float min_p);
  int32_t Draw(double uniform) const;

  std::vector<Candidate> candidates_;
  std::vector<double> weights_;  // e^((logit − max) / temperature) of each candidate
  // Scratch of KeepTopP.
  std::vector<size_t> order_;
  std::vector<Candidate> kept_;
  std::vector<double> kept_weights_;
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_SAMPLING_SAMPLER_H_
