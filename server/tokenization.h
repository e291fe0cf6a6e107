// Tokenize and Detokenize: text and tokens without the model.

#ifndef FIRESTEEL_SERVER_TOKENIZATION_H_
#define FIRESTEEL_SERVER_TOKENIZATION_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "firesteel/v1/generation_service.pb.h"
#include "runtime/tokenizer/tokenizer.h"
#include "server/model_registry.h"
#include "server/status.h"

namespace firesteel::server {

/// A token's text on its own; bytes that are no UTF-8 alone become U+FFFD.
std::string TokenText(const Tokenizer& tokenizer, int32_t token_id);

/// `text` as tokens behind a bos. A text that can't fit the model is a violation of `field`, found
/// before tokenizing it would keep others waiting; the result is then empty.
std::vector<int32_t> TokenizeText(absl::string_view field, const std::string& text,
                                  const ServedModel& model, FieldViolations* violations);

/// `id` must be one of the model's vocabulary.
void CheckTokenId(const std::string& field, uint32_t id, const ServedModel& model,
                  FieldViolations* violations);

/// Checks the request and fills the answer. InvalidArgument names what is wrong.
absl::Status Tokenize(const v1::TokenizeRequest& request, const ServedModel& model,
                      v1::TokenizeResponse* response);
absl::Status Detokenize(const v1::DetokenizeRequest& request, const ServedModel& model,
                        v1::DetokenizeResponse* response);

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_TOKENIZATION_H_
