#include "runtime/tokenizer/stream_decoder.h"

#include <algorithm>
#include <utility>

namespace firesteel {

StreamDecoder::StreamDecoder(std::vector<std::string> stops) {
  matchers_.reserve(stops.size());
  for (std::string& stop : stops) {
    if (!stop.empty()) matchers_.emplace_back(std::move(stop));
  }
}

std::string StreamDecoder::Append(absl::string_view bytes, bool match_stops) {
  if (!matched_stop_.empty()) return "";
  // The text not yet shown: [held before | new].
  std::string text = std::move(pending_);
  const size_t seen = text.size();
  repair_.Append(bytes, &text);
  pending_.clear();

  size_t stop_begin = text.size();
  const StopMatcher* winner = nullptr;
  size_t held = 0;
  for (StopMatcher& matcher : matchers_) {
    const size_t length = matcher.stop().size();
    for (size_t i = seen; i < text.size(); ++i) {
      if (!matcher.Advance(text[i]) || !match_stops) continue;
      const size_t begin = i + 1 - length;
      if (winner == nullptr || begin < stop_begin ||
          (begin == stop_begin && length > winner->stop().size())) {
        stop_begin = begin;
        winner = &matcher;
      }
    }
    held = std::max(held, matcher.partial());
  }

  if (winner != nullptr) {
    matched_stop_ = winner->stop();
    text.resize(stop_begin);
    return text;
  }
  pending_.assign(text, text.size() - held, held);
  text.resize(text.size() - held);
  return text;
}

std::string StreamDecoder::Finish() {
  if (!matched_stop_.empty()) return "";
  std::string text = std::move(pending_);
  pending_.clear();
  repair_.Finish(&text);
  return text;
}

}  // namespace firesteel
