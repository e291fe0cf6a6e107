#include "server/tokenization.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/tokenizer/utf8_repair.h"

namespace firesteel::server {
namespace {

// Text with more bytes than this for each token that a prompt may have can't fit.
constexpr uint64_t kMaxBytesPerToken = 64;

// Tag and length of a token in an answer; a text of 128 bytes and more has one more.
constexpr uint64_t kTokenFrameBytes = 3;

}  // namespace

std::string TokenText(const Tokenizer& tokenizer, int32_t token_id) {
  Utf8Repair repair;
  std::string text;
  repair.Append(tokenizer.TokenBytes(token_id), &text);
  repair.Finish(&text);
  return text;
}

std::vector<int32_t> TokenizeText(absl::string_view field, const std::string& text,
                                  const ServedModel& model, FieldViolations* violations) {
  const uint64_t max_bytes = kMaxBytesPerToken * model.max_prompt_tokens;
  if (text.size() > max_bytes) {
    violations->Add(field, absl::StrCat("has ", text.size(), " bytes; at most ", max_bytes,
                                        " fit this model (", model.max_prompt_tokens, " tokens)"));
    return {};
  }
  auto ids = model.engine->tokenizer().EncodePrompt(text);
  if (!ids.ok()) {
    violations->Add(field, absl::StrCat("cannot be tokenized: ", ids.status().message()));
    return {};
  }
  return *std::move(ids);
}

void CheckTokenId(const std::string& field, uint32_t id, const ServedModel& model,
                  FieldViolations* violations) {
  const size_t vocab_size = model.config().vocab_size;
  if (id < vocab_size) return;
  violations->Add(field,
                  absl::StrCat("is ", id, "; token ids of this model are below ", vocab_size));
}

absl::Status Tokenize(const v1::TokenizeRequest& request, const ServedModel& model,
                      v1::TokenizeResponse* response) {
  FieldViolations violations;
  const std::vector<int32_t> ids = TokenizeText("text", request.text(), model, &violations);
  if (!violations.empty()) return violations.ToStatus();
  response->set_model(model.name);
  const bool keep_bos = !request.has_add_bos() || request.add_bos();
  uint64_t bytes = 0;
  for (size_t i = keep_bos ? 0 : 1; i < ids.size(); ++i) {
    v1::Token* const token = response->add_tokens();
    token->set_token_id(static_cast<uint32_t>(ids[i]));
    token->set_text(TokenText(model.engine->tokenizer(), ids[i]));
    bytes += token->ByteSizeLong() + kTokenFrameBytes;
    if (bytes <= model.max_answer_bytes) continue;
    return InvalidField("text", absl::StrCat("has ", ids.size(), " tokens, whose answer exceeds ",
                                             model.max_answer_bytes, " bytes; send it in parts"));
  }
  return absl::OkStatus();
}

absl::Status Detokenize(const v1::DetokenizeRequest& request, const ServedModel& model,
                        v1::DetokenizeResponse* response) {
  FieldViolations violations;
  const auto count = static_cast<size_t>(request.token_ids_size());
  const size_t context = model.config().max_position_embeddings;
  if (count > context) {
    violations.Add("token_ids", absl::StrCat("has ", count, " tokens; at most ", context,
                                             ", the model's context, are allowed"));
    return violations.ToStatus();
  }
  Utf8Repair repair;
  std::string text;
  for (int i = 0; i < request.token_ids_size(); ++i) {
    const uint32_t id = request.token_ids(i);
    CheckTokenId(absl::StrCat("token_ids[", i, "]"), id, model, &violations);
    if (violations.empty()) {
      repair.Append(model.engine->tokenizer().TokenBytes(static_cast<int32_t>(id)), &text);
    }
  }
  if (!violations.empty()) return violations.ToStatus();
  repair.Finish(&text);
  if (text.size() > model.max_answer_bytes) {
    return InvalidField("token_ids",
                        absl::StrCat("have a text of ", text.size(), " bytes; at most ",
                                     model.max_answer_bytes, " are allowed; send them in parts"));
  }
  response->set_model(model.name);
  response->set_text(std::move(text));
  return absl::OkStatus();
}

}  // namespace firesteel::server
