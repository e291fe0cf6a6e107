#include "runtime/sampling/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "absl/status/status.h"

namespace firesteel {
namespace {

uint64_t Mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

}  // namespace

double CounterUniform(uint64_t seed, uint64_t sequence, uint64_t position) {
  const uint64_t bits = Mix(Mix(Mix(seed) ^ sequence) ^ position);
  return static_cast<double>(bits >> 11) * 0x1.0p-53;
}

uint32_t LargestLogitsNeeded(const SamplingParams& params) {
  if (params.penalizes() || !params.logit_bias.empty()) return 0;
  return params.temperature == 0.0f ? 1 : params.top_k;
}

absl::StatusOr<int32_t> Sampler::Sample(std::span<const float> logits, const SamplingParams& params,
                                        uint64_t sequence, uint64_t position,
                                        std::span<const int32_t> forbidden,
                                        const TokenCounts* seen) {
  if (LargestLogitsNeeded(params) == 0) logits = Adjust(logits, params, seen);
  candidates_.clear();
  candidates_.reserve(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) {
    AddCandidate(static_cast<int32_t>(i), logits[i], forbidden);
  }
  return SampleCandidates(params, sequence, position);
}

absl::StatusOr<int32_t> Sampler::Sample(std::span<const uint32_t> ids,
                                        std::span<const float> logits, const SamplingParams& params,
                                        uint64_t sequence, uint64_t position,
                                        std::span<const int32_t> forbidden) {
  candidates_.clear();
  for (size_t i = 0; i < ids.size(); ++i) {
    AddCandidate(static_cast<int32_t>(ids[i]), logits[i], forbidden);
  }
  return SampleCandidates(params, sequence, position);
}

// Of candidates in the order of tokens.
absl::StatusOr<int32_t> Sampler::SampleCandidates(const SamplingParams& params, uint64_t sequence,
                                                  uint64_t position) {
  if (candidates_.empty()) {
    return absl::InternalError("no token can be drawn: the model gave no finite logit");
  }
  if (params.temperature == 0.0f) {
    return std::min_element(candidates_.begin(), candidates_.end(), Before)->token;
  }
  if (params.top_k > 0) KeepTopK(params.top_k);
  Weigh(params.temperature);
  if (params.top_p < 1.0f) KeepTopP(params.top_p);
  if (params.min_p > 0.0f) KeepMinP(params.min_p);
  return Draw(CounterUniform(params.seed, sequence, position));
}

// Penalties, then biases. The repetition penalty is that of CTRL (Keskar et al., 2019), the others
// are those of OpenAI's API.
std::span<const float> Sampler::Adjust(std::span<const float> logits, const SamplingParams& params,
                                       const TokenCounts* seen) {
  if (!params.penalizes() && params.logit_bias.empty()) return logits;
  adjusted_.assign(logits.begin(), logits.end());
  if (params.penalizes() && seen != nullptr) {
    for (const auto& [token, count] : *seen) {
      float& logit = adjusted_[static_cast<size_t>(token)];
      logit = logit > 0 ? logit / params.repetition_penalty : logit * params.repetition_penalty;
      logit -= params.presence_penalty + params.frequency_penalty * static_cast<float>(count);
    }
  }
  for (const LogitBias& bias : params.logit_bias) {
    adjusted_[static_cast<size_t>(bias.token)] += bias.bias;
  }
  return adjusted_;
}

// +∞ would make every other weight NaN, so it counts as unusable too.
void Sampler::AddCandidate(int32_t token, float logit, std::span<const int32_t> forbidden) {
  if (!std::isfinite(logit)) return;
  if (std::find(forbidden.begin(), forbidden.end(), token) != forbidden.end()) return;
  candidates_.push_back({logit, token});
}

void Sampler::KeepTopK(uint32_t top_k) {
  if (top_k > candidates_.size()) return;
  if (top_k < candidates_.size()) {
    std::nth_element(candidates_.begin(), candidates_.begin() + top_k, candidates_.end(), Before);
    candidates_.resize(top_k);
  }
  // Also where nothing had to go: the order decides which number draws which token, and lists that
  // were cut elsewhere must draw alike.
  std::sort(candidates_.begin(), candidates_.end(), Before);
}

void Sampler::Weigh(float temperature) {
  const double largest = std::min_element(candidates_.begin(), candidates_.end(), Before)->logit;
  weights_.resize(candidates_.size());
  for (size_t i = 0; i < candidates_.size(); ++i) {
    weights_[i] = std::exp((candidates_[i].logit - largest) / static_cast<double>(temperature));
  }
}

// The smallest set of most probable tokens whose probabilities reach top_p. A heap yields them in
// order, so that only what is kept is sorted.
void Sampler::KeepTopP(float top_p) {
  const double mass = std::accumulate(weights_.begin(), weights_.end(), 0.0) * top_p;
  order_.resize(candidates_.size());
  std::iota(order_.begin(), order_.end(), size_t{0});
  const auto after = [&](size_t a, size_t b) { return Before(candidates_[b], candidates_[a]); };
  std::make_heap(order_.begin(), order_.end(), after);
  auto end = order_.end();
  double sum = 0.0;
  while (end != order_.begin() && sum < mass) {
    sum += weights_[order_.front()];
    std::pop_heap(order_.begin(), end--, after);
  }
  // What was popped, the most probable last, becomes the list of candidates.
  kept_.clear();
  kept_weights_.clear();
  for (auto it = order_.end(); it != end;) {
    --it;
    kept_.push_back(candidates_[*it]);
    kept_weights_.push_back(weights_[*it]);
  }
  std::swap(candidates_, kept_);
  std::swap(weights_, kept_weights_);
}

void Sampler::KeepMinP(float min_p) {
  const double least = min_p * *std::max_element(weights_.begin(), weights_.end());
  size_t kept = 0;
  for (size_t i = 0; i < candidates_.size(); ++i) {
    if (weights_[i] < least) continue;
    candidates_[kept] = candidates_[i];
    weights_[kept++] = weights_[i];
  }
  candidates_.resize(kept);
  weights_.resize(kept);
}

int32_t Sampler::Draw(double uniform) const {
  const double target = uniform * std::accumulate(weights_.begin(), weights_.end(), 0.0);
  double sum = 0.0;
  for (size_t i = 0; i < candidates_.size(); ++i) {
    sum += weights_[i];
    if (target < sum) return candidates_[i].token;
  }
  return candidates_.back().token;  // rounding left the target at the very end
}

}  // namespace firesteel
