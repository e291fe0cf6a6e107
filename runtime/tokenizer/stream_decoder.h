// Turns a sequence's tokens into text deltas that never split a UTF-8 code point nor leak a stop string.

#ifndef FIRESTEEL_RUNTIME_TOKENIZER_STREAM_DECODER_H_
#define FIRESTEEL_RUNTIME_TOKENIZER_STREAM_DECODER_H_

#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace firesteel {

/// Collects the bytes of one sequence. Holds back only an unfinished code point and the longest suffix that is
/// a proper prefix of a stop string. Bytes that can't be UTF-8 come out as U+FFFD. Linear time in the text for
/// each stop string. Not thread-safe: one sequence, one decoder, one thread.
class StreamDecoder {
 public:
  /// `stops`: strings that end the text, none empty; the earliest match wins, the longest where several start there.
  explicit StreamDecoder(std::vector<std::string> stops);

  /// Appends a token's bytes; returns the text that is now safe to show. Does nothing after a stop matched.
  /// If `match_stops` is false (min_tokens not reached), a stop string completed by these bytes does not count.
  std::string Append(absl::string_view bytes, bool match_stops = true);

  /// The end of the sequence: what was held back, if no stop string matched.
  std::string Finish();

  /// The stop string that ended the text; empty where none has.
  const std::string& matched_stop() const { return matched_stop_; }

 private:
  std::vector<std::string> stops_;
  std::string pending_;
  std::string matched_stop_;
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_TOKENIZER_STREAM_DECODER_H_
