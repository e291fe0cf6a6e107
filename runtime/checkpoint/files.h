// Files of a checkpoint folder: read whole, or mapped read-only.

#ifndef FIRESTEEL_RUNTIME_CHECKPOINT_FILES_H_
#define FIRESTEEL_RUNTIME_CHECKPOINT_FILES_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace firesteel {

/// `folder` and `name` joined by one slash.
std::string JoinPath(absl::string_view folder, absl::string_view name);

/// True if `path` names anything at all (a folder or a device too; the readers below refuse those
/// by name).
bool PathExists(const std::string& path);

/// Text that came from a file, fit for a message: escaped to printable ASCII and cut after 100
/// bytes.
std::string Printable(absl::string_view text);

/// An open regular file, read at any offset; closed with the object. Thread-safe.
class InputFile {
 public:
  /// NotFound where there is none; InvalidArgument if it is not a regular file.
  static absl::StatusOr<std::unique_ptr<InputFile>> Open(const std::string& path);
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;
  ~InputFile();

  const std::string& path() const { return path_; }
  /// In bytes, when it was opened.
  uint64_t size() const { return size_; }
  int fd() const { return fd_; }
  /// Reads `bytes` at `offset`. InvalidArgument where the file ends before that.
  absl::Status Read(uint64_t offset, size_t bytes, void* out) const;

 private:
  InputFile(std::string path, int fd, uint64_t size)
      : path_(std::move(path)), fd_(fd), size_(size) {}

  const std::string path_;
  const int fd_;
  const uint64_t size_;
};

/// The whole content of a regular file. NotFound where there is none; InvalidArgument if it is not
/// a regular file or larger than `max_bytes`.
absl::StatusOr<std::string> ReadFile(const std::string& path, size_t max_bytes);

/// A regular file mapped read-only for as long as the object lives. Immutable, hence thread-safe.
/// The file must not be cut short meanwhile: the kernel would answer a read past its new end with
/// SIGBUS.
class MappedFile {
 public:
  /// NotFound where there is none; InvalidArgument if it is not a regular file.
  static absl::StatusOr<std::unique_ptr<MappedFile>> Open(const std::string& path);

  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();

  std::span<const std::byte> bytes() const { return {data_, size_}; }

 private:
  MappedFile(const std::byte* data, size_t size) : data_(data), size_(size) {}

  const std::byte* const data_;  // null if the file is empty
  const size_t size_;
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_CHECKPOINT_FILES_H_
