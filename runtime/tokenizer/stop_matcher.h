// Finds one string in a text that arrives piece by piece.

#ifndef FIRESTEEL_RUNTIME_TOKENIZER_STOP_MATCHER_H_
#define FIRESTEEL_RUNTIME_TOKENIZER_STOP_MATCHER_H_

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

namespace firesteel {

/// The automaton of Knuth, Morris and Pratt: amortized constant time a byte, whatever the string
/// repeats. Not thread-safe.
class StopMatcher {
 public:
  /// `stop` is not empty.
  explicit StopMatcher(std::string stop);

  /// Takes one byte; true if the string now ends here. Overlapping occurrences are all found.
  bool Advance(char byte);

  /// Bytes at the end of the text that are a proper prefix of the string: the longest such.
  size_t partial() const { return matched_; }
  const std::string& stop() const { return stop_; }

 private:
  std::string stop_;
  std::vector<size_t> border_;  // [i]: length of the longest proper border of the first i + 1 bytes
  size_t matched_ = 0;          // < stop_.size()
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_TOKENIZER_STOP_MATCHER_H_
