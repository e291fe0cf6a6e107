// What the client shows, as text: pure functions from messages to strings.

#ifndef FIRESTEEL_TOOLS_CLIENT_FORMAT_H_
#define FIRESTEEL_TOOLS_CLIENT_FORMAT_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "firesteel/v1/generation_service.pb.h"
#include "firesteel/v1/model_service.pb.h"
#include "google/protobuf/duration.pb.h"
#include "google/protobuf/message.h"

namespace firesteel::client {

absl::Duration ToDuration(const google::protobuf::Duration& duration);

/// Three significant digits in the unit that fits: "850 us", "31.2 ms", "1.24 s".
std::string ShortDuration(absl::Duration duration);

/// "512 B", "25.7 MiB".
std::string FormatBytes(uint64_t bytes);

/// "970", "12.9 M", "2.61 G".
std::string FormatCount(uint64_t count);

/// "length", "eos", … as the metrics' labels have them; "none" for a sequence that goes on.
std::string FinishReasonName(v1::FinishReason reason);

/// One line about a finished request. `first_text`: when the client saw the first text, counted
/// from its call; `ttft` in the line is the server's own figure where it sent one. Tokens a second
/// are those after the first, over the time after the first: prefill is not in them.
std::string FormatSummary(const v1::Usage& usage, const v1::Timings& timings,
                          const v1::Sparsity& sparsity, const v1::Sequence& last,
                          absl::Duration first_text);

/// One line: the token's log-probability and text, then those of its alternatives.
std::string FormatLogprob(const v1::TokenLogprob& token);

/// The server's answer as a few lines.
std::string FormatServerInfo(const v1::GetServerInfoResponse& info);

/// A model as a table of two columns.
std::string FormatModel(const v1::ModelInfo& model);

/// Text of a model, safe to show on a terminal: control characters other than newline and tab (also
/// those that UTF-8 encodes in two bytes) become U+FFFD, so that no output can steer the terminal.
/// REQUIRES: `text` ends with a whole code point.
std::string VisibleText(absl::string_view text);

/// One line of JSON without its newline, with the names of the .proto file and unset scalars
/// included. Error: the message holds what JSON can't, e.g. a time out of range.
absl::StatusOr<std::string> ToJson(const google::protobuf::Message& message);

}  // namespace firesteel::client

#endif  // FIRESTEEL_TOOLS_CLIENT_FORMAT_H_
