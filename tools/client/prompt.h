// The text or token ids that a command works on.

#ifndef FIRESTEEL_TOOLS_CLIENT_PROMPT_H_
#define FIRESTEEL_TOOLS_CLIENT_PROMPT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "tools/client/console.h"

namespace firesteel::client {

/// `argument` itself, or all of standard input where it is "-".
std::string ReadPrompt(const std::string& argument, Console& console);

/// "2,17 5" as token ids. Error: names what is none.
absl::StatusOr<std::vector<uint32_t>> ParseTokenIds(const std::string& text);

}  // namespace firesteel::client

#endif  // FIRESTEEL_TOOLS_CLIENT_PROMPT_H_
