#include "runtime/sampling/logprobs.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

namespace firesteel {
namespace {

// Ids of the `count` largest finite logits. A heap whose top is the least of those kept: most of a
// vocabulary falls at the first comparison.
std::vector<int32_t> Largest(std::span<const float> logits, size_t count) {
  std::vector<int32_t> kept;
  if (count == 0) return kept;
  const auto before = [&](int32_t a, int32_t b) {
    const float x = logits[static_cast<size_t>(a)], y = logits[static_cast<size_t>(b)];
    return x > y || (x == y && a < b);
  };
  for (size_t i = 0; i < logits.size(); ++i) {
    const int32_t token = static_cast<int32_t>(i);
    if (!std::isfinite(logits[i])) continue;
    if (kept.size() == count) {
      if (!before(token, kept.front())) continue;
      std::pop_heap(kept.begin(), kept.end(), before);
      kept.pop_back();
    }
    kept.push_back(token);
    std::push_heap(kept.begin(), kept.end(), before);
  }
  std::sort_heap(kept.begin(), kept.end(), before);
  return kept;
}

}  // namespace

TokenLogprob LogprobOf(std::span<const float> logits, int32_t token, uint32_t num_alternatives) {
  double largest = -std::numeric_limits<double>::infinity();
  for (const float logit : logits) {
    if (std::isfinite(logit)) largest = std::max<double>(largest, logit);
  }
  double sum = 0;
  for (const float logit : logits) {
    if (std::isfinite(logit)) sum += std::exp(logit - largest);
  }
  const double log_sum = largest + std::log(sum);
  const auto logprob = [&](int32_t id) {
    const float logit = logits[static_cast<size_t>(id)];
    return std::isfinite(logit) ? static_cast<float>(logit - log_sum)
                                : -std::numeric_limits<float>::infinity();
  };
  TokenLogprob result{token, logprob(token), {}};
  for (const int32_t id : Largest(logits, num_alternatives)) {
    result.alternatives.push_back({id, logprob(id)});
  }
  return result;
}

}  // namespace firesteel
