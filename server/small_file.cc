#include "server/small_file.h"

#include <fstream>

#include "absl/strings/str_cat.h"

namespace firesteel::server {

absl::StatusOr<std::string> ReadSmallFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text(kMaxSmallFileBytes + 1, '\0');
  if (file) file.read(text.data(), static_cast<std::streamsize>(text.size()));
  // A folder opens but does not read.
  if (!file.is_open() || file.bad() || (file.fail() && !file.eof())) {
    return absl::InvalidArgumentError("cannot be read");
  }
  text.resize(static_cast<size_t>(file.gcount()));
  if (text.size() > kMaxSmallFileBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("is larger than ", kMaxSmallFileBytes, " bytes"));
  }
  text.shrink_to_fit();  // some are kept
  return text;
}

}  // namespace firesteel::server
