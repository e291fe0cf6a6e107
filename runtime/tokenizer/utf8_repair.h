// Bytes that arrive piece by piece to valid UTF-8.

#ifndef FIRESTEEL_RUNTIME_TOKENIZER_UTF8_REPAIR_H_
#define FIRESTEEL_RUNTIME_TOKENIZER_UTF8_REPAIR_H_

#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"

namespace firesteel {

/// Lets whole code points pass, holds back an unfinished one, and puts U+FFFD for each longest
/// piece that begins like a code point and can't become one (the Unicode standard's "substitution
/// of maximal subparts", which browsers use too). Not thread-safe.
class Utf8Repair {
 public:
  /// Appends to *text what `bytes` completes.
  void Append(absl::string_view bytes, std::string* text);
  /// The end: an unfinished code point becomes U+FFFD.
  void Finish(std::string* text);

 private:
  void Start(uint8_t byte, std::string* text);

  std::string held_;    // ≤ 3 bytes: the beginning of a code point
  int missing_ = 0;     // its bytes still to come
  uint8_t low_ = 0x80;  // bounds of the next one; narrower behind E0, ED, F0 and F4
  uint8_t high_ = 0xBF;
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_TOKENIZER_UTF8_REPAIR_H_
