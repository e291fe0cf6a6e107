#include "server/answer_size.h"

#include <algorithm>
#include <iterator>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/status.h"
#include "server/tokenization.h"

namespace firesteel::server {
namespace {

// Of a token and its log-probability, besides the text: tags, lengths and numbers in protobuf;
// names, quotes and up to 25 digits of a number in JSON.
constexpr uint64_t kProtoEntryBytes = 20;
constexpr uint64_t kJsonEntryBytes = 100;
// A token id in protobuf, at most.
constexpr uint64_t kTokenIdBytes = 5;
// What a sequence has besides its tokens: the stop string that it matched, its finish reason …
constexpr uint64_t kSequenceBytes = 512;
// … and an answer besides its sequences: names, ids, usage, timings, sparsity.
constexpr uint64_t kAnswerBytes = 2048;

uint64_t EntryBytes(AnswerForm form) {
  return form == AnswerForm::kProto ? kProtoEntryBytes : kJsonEntryBytes;
}

size_t EscapedBytes(const std::string& text) {
  size_t bytes = 0;
  for (const unsigned char c : text) {
    const bool has_name = c == '"' || c == '\\' || (c >= 0x08 && c <= 0x0D && c != 0x0B);
    bytes += has_name ? 2 : c < 0x20 ? 6 : 1;  // "\n", "\u0001"
  }
  return bytes;
}

// What comes before the generated tokens of each sequence.
uint64_t PromptBytes(const TranslatedRequest& request, const ServedModel& model,
                     uint64_t entry_bytes, uint64_t alternatives_bytes) {
  const std::vector<int32_t>& prompt = request.request.prompt;
  uint64_t bytes = request.echo ? request.prompt_text.size() : 0;
  if (request.echo && request.return_token_ids) bytes += prompt.size() * kTokenIdBytes;
  if (!request.request.prompt_logprobs) return bytes;
  for (const int32_t id : prompt) {
    bytes += entry_bytes + EscapedBytes(TokenText(model.engine->tokenizer(), id));
  }
  return bytes + prompt.size() * alternatives_bytes;
}

std::string TakeText(size_t max_bytes, std::string* text) {
  if (text->size() <= max_bytes) return std::exchange(*text, "");
  size_t cut = max_bytes;
  while (cut > 0 && ((*text)[cut] & 0xC0) == 0x80) --cut;  // in the middle of a code point
  std::string front = text->substr(0, cut);
  text->erase(0, cut);
  return front;
}

template <typename T>
std::vector<T> TakeFirst(size_t max_count, std::vector<T>* from) {
  const auto end = from->begin() + static_cast<std::ptrdiff_t>(std::min(max_count, from->size()));
  std::vector<T> front(std::make_move_iterator(from->begin()), std::make_move_iterator(end));
  from->erase(from->begin(), end);
  return front;
}

}  // namespace

uint32_t LongestTokenText(const Tokenizer& tokenizer, size_t vocab_size) {
  size_t longest = 0;
  for (size_t id = 0; id < vocab_size; ++id) {
    longest = std::max(longest, EscapedBytes(TokenText(tokenizer, static_cast<int32_t>(id))));
  }
  return static_cast<uint32_t>(longest);
}

uint64_t MaxAnswerBytes(const TranslatedRequest& request, const ServedModel& model,
                        AnswerForm form) {
  const GenerationRequest& asked = request.request;
  const uint64_t entry = EntryBytes(form);
  const uint64_t longest = model.longest_token_text;
  const uint64_t alternatives = asked.logprobs.value_or(0) * (entry + longest);
  uint64_t token = longest;
  if (request.return_token_ids) token += kTokenIdBytes;
  if (asked.logprobs.has_value()) token += entry + longest + alternatives;
  const uint64_t sequence =
      PromptBytes(request, model, entry, alternatives) + asked.max_tokens * token + kSequenceBytes;
  return asked.n * sequence + kAnswerBytes;
}

absl::StatusOr<TranslatedRequest> WithBoundedAnswer(absl::StatusOr<TranslatedRequest> request,
                                                    const ServedModel& model, AnswerForm form,
                                                    size_t answers) {
  if (!request.ok()) return request;
  const uint64_t bytes = MaxAnswerBytes(*request, model, form);
  const uint64_t limit = model.max_answer_bytes / answers;
  if (bytes <= limit) return request;
  const GenerationRequest& asked = request->request;
  const std::string size =
      absl::StrCat("the answer could have ", bytes, " bytes; at most ", limit, " are allowed");
  if (asked.max_tokens == 0) {
    return InvalidField(request->input_field,
                        absl::StrCat("has ", asked.prompt.size(), " tokens: ", size));
  }
  std::string what = absl::StrCat("is ", asked.max_tokens);
  if (asked.n > 1) absl::StrAppend(&what, ", n ", asked.n);
  if (asked.logprobs.has_value()) absl::StrAppend(&what, ", logprobs ", *asked.logprobs);
  if (request->echo) absl::StrAppend(&what, ", echo of ", asked.prompt.size(), " tokens");
  if (answers > 1) absl::StrAppend(&what, ", for each of ", answers, " texts");
  return InvalidField("max_tokens", absl::StrCat(what, ": ", size, " (a stream has no limit)"));
}

SequenceOutput TakeFront(const ServedModel& model, SequenceOutput* output) {
  const uint64_t room = model.max_answer_bytes - kSequenceBytes - kAnswerBytes;
  const uint64_t alternatives =
      output->logprobs.empty() ? 0 : output->logprobs.back().alternatives.size();
  const uint64_t entry = (1 + alternatives) * (kJsonEntryBytes + model.longest_token_text);
  const uint64_t bytes = output->text.size() + output->token_ids.size() * kTokenIdBytes +
                         output->logprobs.size() * entry;
  if (bytes <= room) return std::exchange(*output, SequenceOutput());
  SequenceOutput front;
  front.starts_prompt = std::exchange(output->starts_prompt, false);
  front.text = TakeText(room / 4, &output->text);
  front.token_ids = TakeFirst(room / 4 / kTokenIdBytes, &output->token_ids);
  front.logprobs = TakeFirst(std::max<uint64_t>(1, room / 2 / entry), &output->logprobs);
  return front;
}

}  // namespace firesteel::server
