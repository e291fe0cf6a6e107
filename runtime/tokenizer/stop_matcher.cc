#include "runtime/tokenizer/stop_matcher.h"

namespace firesteel {

StopMatcher::StopMatcher(std::string stop) : stop_(std::move(stop)), border_(stop_.size(), 0) {
  size_t length = 0;
  for (size_t i = 1; i < stop_.size(); ++i) {
    while (length > 0 && stop_[i] != stop_[length]) length = border_[length - 1];
    if (stop_[i] == stop_[length]) ++length;
    border_[i] = length;
  }
}

bool StopMatcher::Advance(char byte) {
  while (matched_ > 0 && stop_[matched_] != byte) matched_ = border_[matched_ - 1];
  if (stop_[matched_] == byte) ++matched_;
  if (matched_ < stop_.size()) return false;
  matched_ = border_[matched_ - 1];
  return true;
}

}  // namespace firesteel
