// Log-probabilities of tokens in the model's own distribution.

#ifndef FIRESTEEL_RUNTIME_SAMPLING_LOGPROBS_H_
#define FIRESTEEL_RUNTIME_SAMPLING_LOGPROBS_H_

#include <cstdint>
#include <span>
#include <vector>

namespace firesteel {

/// A token that might have come.
struct TokenAlternative {
  int32_t token_id = 0;
  float logprob = 0;
};

/// A token, and what else was likely in its place.
struct TokenLogprob {
  int32_t token_id = 0;
  float logprob = 0;                           // log p(token | all before it); −∞ for p = 0
  std::vector<TokenAlternative> alternatives;  // the most probable tokens, in falling order
};

/// log softmax of `logits` [vocab] at `token`, with the `num_alternatives` most probable tokens (of
/// equals the lower first; fewer where fewer logits are finite). Logits that are not finite count
/// as −∞. Costs one exponential a logit.
TokenLogprob LogprobOf(std::span<const float> logits, int32_t token, uint32_t num_alternatives);

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_SAMPLING_LOGPROBS_H_
