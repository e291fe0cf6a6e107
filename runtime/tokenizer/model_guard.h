// Refuses tokenizer.model files that the SentencePiece library would follow into memory that isn't
// there.

#ifndef FIRESTEEL_RUNTIME_TOKENIZER_MODEL_GUARD_H_
#define FIRESTEEL_RUNTIME_TOKENIZER_MODEL_GUARD_H_

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace firesteel {

/// Looks through a serialized ModelProto for what the library trusts unseen. It walks the offsets
/// of a normalizer's compiled rules (precompiled_charsmap) unchecked, so only models without such
/// rules are accepted: Gemma's tokenizers normalize by identity and have none. InvalidArgument too
/// where the bytes are no protobuf message.
absl::Status CheckTokenizerModel(absl::string_view serialized);

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_TOKENIZER_MODEL_GUARD_H_
