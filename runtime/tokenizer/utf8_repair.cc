#include "runtime/tokenizer/utf8_repair.h"

namespace firesteel {
namespace {

constexpr char kReplacement[] = "\xEF\xBF\xBD";

}  // namespace

void Utf8Repair::Start(uint8_t byte, std::string* text) {
  low_ = 0x80;
  high_ = 0xBF;
  if (byte < 0x80) {
    text->push_back(static_cast<char>(byte));
    return;
  }
  if (byte < 0xC2 || byte > 0xF4) {  // a stray continuation, an overlong form, past U+10FFFF
    text->append(kReplacement);
    return;
  }
  missing_ = byte < 0xE0 ? 1 : byte < 0xF0 ? 2 : 3;
  if (byte == 0xE0) low_ = 0xA0;   // no overlong forms
  if (byte == 0xED) high_ = 0x9F;  // no surrogates
  if (byte == 0xF0) low_ = 0x90;   // no overlong forms
  if (byte == 0xF4) high_ = 0x8F;  // nothing past U+10FFFF
  held_.assign(1, static_cast<char>(byte));
}

void Utf8Repair::Append(absl::string_view bytes, std::string* text) {
  for (const char c : bytes) {
    const uint8_t byte = static_cast<uint8_t>(c);
    if (missing_ > 0 && byte >= low_ && byte <= high_) {
      held_.push_back(c);
      low_ = 0x80;
      high_ = 0xBF;
      if (--missing_ > 0) continue;
      text->append(held_);
      held_.clear();
      continue;
    }
    Finish(text);  // what is held can't go on with this byte, which may begin anew
    Start(byte, text);
  }
}

void Utf8Repair::Finish(std::string* text) {
  if (missing_ > 0) text->append(kReplacement);
  missing_ = 0;
  held_.clear();
}

}  // namespace firesteel
