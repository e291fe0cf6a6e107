// The SentencePiece library behind a header of standard types only: some versions of its own header
// declare an absl::string_view that clashes with Abseil's, so no source file may include both.

#ifndef FIRESTEEL_RUNTIME_TOKENIZER_SENTENCEPIECE_MODEL_H_
#define FIRESTEEL_RUNTIME_TOKENIZER_SENTENCEPIECE_MODEL_H_

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace firesteel {

/// A loaded tokenizer.model. Immutable once loaded, hence thread-safe.
class SentencePieceModel {
 public:
  enum class PieceKind { kNormal, kUnknown, kControl, kUnused, kByte };

  SentencePieceModel();
  ~SentencePieceModel();

  /// Parses a serialized model. False, and *error, where the library refuses it.
  bool Load(std::string_view serialized, std::string* error);

  int num_pieces() const;
  PieceKind kind(int id) const;
  /// The piece as the model holds it: "▁once", "<0x0A>".
  const std::string& piece(int id) const;
  /// Text of one id on its own, as the library decodes it.
  std::string Decode(int id) const;
  /// False, and *error, where the library fails.
  bool Encode(std::string_view text, std::vector<int>* ids, std::string* error) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_TOKENIZER_SENTENCEPIECE_MODEL_H_
