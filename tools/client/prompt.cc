#include "tools/client/prompt.h"

#include <iterator>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace firesteel::client {

std::string ReadPrompt(const std::string& argument, Console& console) {
  if (argument != "-") return argument;
  return std::string(std::istreambuf_iterator<char>(console.in), std::istreambuf_iterator<char>());
}

absl::StatusOr<std::vector<uint32_t>> ParseTokenIds(const std::string& text) {
  std::vector<uint32_t> ids;
  for (absl::string_view part :
       absl::StrSplit(text, absl::ByAnyChar(", \t\n"), absl::SkipEmpty())) {
    uint32_t id = 0;
    if (!absl::SimpleAtoi(part, &id)) {
      return absl::InvalidArgumentError(
          absl::StrCat("--token-ids: '", part, "' is no token id (a whole number from 0 on)"));
    }
    ids.push_back(id);
  }
  return ids;
}

}  // namespace firesteel::client
