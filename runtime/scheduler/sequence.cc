#include "runtime/scheduler/sequence.h"

#include <algorithm>

namespace firesteel {

Sequence::Sequence(uint32_t index, const GenerationRequest& request, const ModelConfig& config,
                   const Tokenizer& tokenizer)
    : index_(index),
      request_(request),
      tokenizer_(tokenizer),
      ending_tokens_(request.stopping.stop_token_ids),
      decoder_(request.stopping.stop) {
  if (!request.stopping.ignore_eos) {
    ending_tokens_.insert(ending_tokens_.end(), config.eos_token_ids.begin(),
                          config.eos_token_ids.end());
  }
  if (request.sampling.penalizes()) {
    seen_.emplace();
    for (const int32_t token : request.prompt) ++(*seen_)[token];
  }
}

std::span<const int32_t> Sequence::forbidden_tokens() const {
  if (generated_.size() >= request_.stopping.min_tokens) return {};
  return ending_tokens_;
}

bool Sequence::Stops(int32_t token) const {
  const auto& stops = request_.stopping.stop_token_ids;
  return std::find(stops.begin(), stops.end(), token) != stops.end();
}

TokenDelta Sequence::TakeToken(int32_t token, absl::Time now) {
  if (!generated_.empty()) inter_token_latency_ = now - latest_token_;
  latest_token_ = now;
  generated_.push_back(token);
  if (seen_.has_value()) ++(*seen_)[token];

  TokenDelta delta;
  delta.index = index_;
  delta.token_ids.push_back(token);
  const std::string& bytes = tokenizer_.TokenBytes(token);
  if (std::find(ending_tokens_.begin(), ending_tokens_.end(), token) != ending_tokens_.end()) {
    end_ = Stops(token) ? SequenceEnd{FinishReason::kStop, bytes}
                        : SequenceEnd{FinishReason::kEos, ""};
  } else {
    delta.text = decoder_.Append(bytes, generated_.size() >= request_.stopping.min_tokens);
    if (!decoder_.matched_stop().empty()) {
      end_ = SequenceEnd{FinishReason::kStop, decoder_.matched_stop()};
    } else if (generated_.size() >= request_.max_tokens) {
      end_ = SequenceEnd{FinishReason::kLength, ""};
    }
  }
  if (end_.has_value()) {
    delta.text += decoder_.Finish();
    delta.end = end_;
    kv_ = KvLease();
  }
  return delta;
}

}  // namespace firesteel
