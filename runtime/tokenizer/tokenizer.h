// Text ↔ token ids, by SentencePiece.

#ifndef FIRESTEEL_RUNTIME_TOKENIZER_TOKENIZER_H_
#define FIRESTEEL_RUNTIME_TOKENIZER_TOKENIZER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace firesteel {

/// A vocabulary read from a tokenizer.model file. Immutable, hence thread-safe.
class Tokenizer {
 public:
  /// Loads FOLDER/tokenizer.model, or that of a packed file. Its number of pieces must be ≤
  /// vocab_size, and bos_token_id in range.
  static absl::StatusOr<std::shared_ptr<const Tokenizer>> Load(const std::string& path,
                                                               size_t vocab_size,
                                                               int32_t bos_token_id);

  /// The same of the bytes of a tokenizer.model; `origin` is for messages.
  static absl::StatusOr<std::shared_ptr<const Tokenizer>> Parse(absl::string_view content,
                                                                const std::string& origin,
                                                                size_t vocab_size,
                                                                int32_t bos_token_id);

  /// The bytes of FOLDER/tokenizer.model, or that of a packed file, unchecked. NotFound where there
  /// is none.
  static absl::StatusOr<std::string> ReadModel(const std::string& path);
  virtual ~Tokenizer() = default;

  /// A prompt: bos, then the pieces of `text`.
  virtual absl::StatusOr<std::vector<int32_t>> EncodePrompt(absl::string_view text) const = 0;

  /// The bytes that one token adds to a text: " once" for "▁once", one byte for a byte piece,
  /// nothing for a control token or an id past the vocabulary.
  virtual const std::string& TokenBytes(int32_t token_id) const = 0;
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_TOKENIZER_TOKENIZER_H_
