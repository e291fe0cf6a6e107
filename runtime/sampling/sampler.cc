#include "runtime/sampling/sampler.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "absl/status/status.h"
#include "kernels/categorical.h"

namespace firesteel {
namespace {

uint64_t Mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

bool IsAllowed(int32_t token, std::span<const int32_t> forbidden) {
  return std::find(forbidden.begin(), forbidden.end(), token) == forbidden.end();
}

// +∞ would make every other weight NaN, so it counts as unusable too.
bool IsCandidate(int32_t token, float logit, std::span<const int32_t> forbidden) {
  return std::isfinite(logit) && IsAllowed(token, forbidden);
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
  if (params.temperature == 0.0f) {  // without a list of candidates, in most cases
    const float largest = kernels::LargestLogit(logits.data(), logits.size());
    const auto first = std::find(logits.begin(), logits.end(), largest);
    const auto token = static_cast<int32_t>(first - logits.begin());
    if (std::isfinite(largest) && IsAllowed(token, forbidden)) return token;
  } else if (params.top_k == 0 && params.top_p >= 1.0f && params.min_p <= 0.0f) {
    const double uniform = CounterUniform(params.seed, sequence, position);
    const auto token = DrawFromAll(logits, params.temperature, uniform, forbidden);
    if (token.has_value()) return *token;
  }
  candidates_.resize(logits.size());
  size_t found = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    const auto token = static_cast<int32_t>(i);
    candidates_[found] = {logits[i], token};
    found += IsCandidate(token, logits[i], forbidden) ? 1 : 0;
  }
  candidates_.resize(found);
  return SampleCandidates(params, sequence, position);
}

absl::StatusOr<int32_t> Sampler::Sample(std::span<const uint32_t> ids,
                                        std::span<const float> logits, const SamplingParams& params,
                                        uint64_t sequence, uint64_t position,
                                        std::span<const int32_t> forbidden) {
  candidates_.clear();
  for (size_t i = 0; i < ids.size(); ++i) {
    const auto token = static_cast<int32_t>(ids[i]);
    if (IsCandidate(token, logits[i], forbidden)) candidates_.push_back({logits[i], token});
  }
  return SampleCandidates(params, sequence, position);
}

// Sums of blocks say in which of them the token is, so that no list of candidates is written.
// Nothing where that does not tell: of +∞, or where what is left has no weight.
std::optional<int32_t> Sampler::DrawFromAll(std::span<const float> logits, float temperature,
                                            double uniform, std::span<const int32_t> forbidden) {
  constexpr size_t kBlock = kernels::kCategoricalBlock;
  const float largest = kernels::LargestLogit(logits.data(), logits.size());
  if (!std::isfinite(largest)) return std::nullopt;
  weights_.resize((logits.size() + kBlock - 1) / kBlock);
  kernels::CategoricalBlockSums(logits.data(), logits.size(), largest, temperature,
                                weights_.data());
  std::array<float, kBlock> block;
  const auto weigh = [&](size_t index) {
    const size_t begin = index * kBlock;
    const size_t n = std::min(kBlock, logits.size() - begin);
    kernels::CategoricalWeights(&logits[begin], n, largest, temperature, block.data());
    std::fill(block.begin() + n, block.end(), 0.0f);
    for (const int32_t token : forbidden) {
      const size_t i = static_cast<size_t>(token) - begin;  // wraps below the block
      if (i < kBlock) block[i] = 0.0f;
    }
  };
  for (const int32_t token : forbidden) {
    const size_t index = static_cast<size_t>(token) / kBlock;
    if (index >= weights_.size()) continue;
    weigh(index);
    weights_[index] = std::accumulate(block.begin(), block.end(), 0.0);
  }
  const double target = uniform * std::accumulate(weights_.begin(), weights_.end(), 0.0);
  std::optional<size_t> found;
  double sum = 0.0;
  for (size_t i = 0; i < weights_.size(); ++i) {
    if (weights_[i] <= 0.0) continue;
    found = i;
    if (target < sum + weights_[i]) break;
    sum += weights_[i];
  }
  if (!found.has_value()) return std::nullopt;
  weigh(*found);
  std::optional<int32_t> token;
  for (size_t i = 0; i < kBlock; ++i) {
    if (block[i] <= 0.0f) continue;
    token = static_cast<int32_t>(*found * kBlock + i);
    sum += static_cast<double>(block[i]);
    if (target < sum) break;  // else rounding left the target at the very end
  }
  return token;
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
  const float largest = std::min_element(candidates_.begin(), candidates_.end(), Before)->logit;
  weights_.clear();
  std::array<float, kernels::kCategoricalBlock> block;
  for (size_t begin = 0; begin < candidates_.size(); begin += block.size()) {
    const size_t n = std::min(block.size(), candidates_.size() - begin);
    for (size_t i = 0; i < n; ++i) block[i] = candidates_[begin + i].logit;
    kernels::CategoricalWeights(block.data(), n, largest, temperature, block.data());
    weights_.insert(weights_.end(), block.begin(), block.begin() + n);
  }
}

// The smallest set of most probable tokens whose probabilities reach top_p. A heap yields them in
// order, so that only what is kept is sorted. Not even in the heap are tokens so improbable that
// all of their kind together could be left out.
void Sampler::KeepTopP(float top_p) {
  const double whole = std::accumulate(weights_.begin(), weights_.end(), 0.0);
  const double mass = whole * top_p;
  const double least = (whole - mass) / static_cast<double>(weights_.size());
  order_.clear();
  for (size_t i = 0; i < weights_.size(); ++i) {
    if (weights_[i] >= least) order_.push_back(i);
  }
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
