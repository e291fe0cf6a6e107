// Files that an operator writes: configuration, certificates, tokens.

#ifndef FIRESTEEL_SERVER_SMALL_FILE_H_
#define FIRESTEEL_SERVER_SMALL_FILE_H_

#include <string>

#include "absl/status/statusor.h"

namespace firesteel::server {

inline constexpr size_t kMaxSmallFileBytes = size_t{1} << 20;

/// The content of a file of at most kMaxSmallFileBytes. InvalidArgument says what is wrong with it,
/// without its name.
absl::StatusOr<std::string> ReadSmallFile(const std::string& path);

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_SMALL_FILE_H_
