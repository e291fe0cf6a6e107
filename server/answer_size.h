// How large answers get on the wire: what a unary call may ask for, decided before any work, and
// where the messages of streams are cut. Clients' libraries refuse messages of more than 4 MiB
// unless told otherwise, and only once all the work is done.

#ifndef FIRESTEEL_SERVER_ANSWER_SIZE_H_
#define FIRESTEEL_SERVER_ANSWER_SIZE_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/statusor.h"
#include "runtime/tokenizer/tokenizer.h"
#include "server/model_registry.h"
#include "server/request_translation.h"

namespace firesteel::server {

/// How log-probabilities are written: as messages of firesteel.v1, or as KServe's `details`.
enum class AnswerForm : uint8_t { kProto, kJson };

/// Bytes of the longest text that one token of the vocabulary has, as it is or escaped for JSON.
/// Looks at every token: some 40 ms for 256,000 of them.
uint32_t LongestTokenText(const Tokenizer& tokenizer, size_t vocab_size);

/// An upper bound of what the whole answer to `request` takes: all tokens generated, each with the
/// longest text that there is.
uint64_t MaxAnswerBytes(const TranslatedRequest& request, const ServedModel& model,
                        AnswerForm form);

/// Passes on a request whose answer fits one message of the model's max_answer_bytes together with
/// those of `answers` − 1 others like it, and errors. InvalidArgument, with the numbers, for what
/// does not fit.
absl::StatusOr<TranslatedRequest> WithBoundedAnswer(absl::StatusOr<TranslatedRequest> request,
                                                    const ServedModel& model, AnswerForm form,
                                                    size_t answers = 1);

/// Takes from `output` what a message of the model's max_answer_bytes holds, in either form: all of
/// it, or a first part, which ends at a code point.
SequenceOutput TakeFront(const ServedModel& model, SequenceOutput* output);

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_ANSWER_SIZE_H_
