// Turns a sequence's tokens into text deltas that never split a UTF-8 code point nor leak a stop
// string.

#ifndef FIRESTEEL_RUNTIME_TOKENIZER_STREAM_DECODER_H_
#define FIRESTEEL_RUNTIME_TOKENIZER_STREAM_DECODER_H_

#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "runtime/tokenizer/stop_matcher.h"
#include "runtime/tokenizer/utf8_repair.h"

namespace firesteel {

/// Collects the bytes of one sequence. Holds back only an unfinished code point and the longest
/// suffix that is a proper prefix of a stop string. Bytes that can't be UTF-8 come out as U+FFFD;
/// stop strings, which are UTF-8, are looked for in the text as it comes out. Linear time in the
/// text for each stop string. Not thread-safe: one sequence, one decoder, one thread.
class StreamDecoder {
 public:
  /// `stops`: strings that end the text, none empty. As soon as one is complete the text ends where
  /// it starts; where the same bytes complete several, the earliest start wins, and the longest of
  /// those that start there.
  explicit StreamDecoder(std::vector<std::string> stops);

  /// Appends a token's bytes; returns the text that is now safe to show. Does nothing after a stop
  /// matched. If `match_stops` is false (min_tokens not reached), a stop string completed by these
  /// bytes does not count.
  std::string Append(absl::string_view bytes, bool match_stops = true);

  /// The end of the sequence: what was held back, if no stop string matched. Matches nothing any
  /// more: an unfinished code point comes out as U+FFFD and can't complete a stop string.
  std::string Finish();

  /// The stop string that ended the text; empty where none has.
  const std::string& matched_stop() const { return matched_stop_; }

 private:
  Utf8Repair repair_;
  std::vector<StopMatcher>
      matchers_;         // one a stop string; what they have seen is what repair_ let pass
  std::string pending_;  // passed repair_, and the beginning of a stop string
  std::string matched_stop_;
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_TOKENIZER_STREAM_DECODER_H_
