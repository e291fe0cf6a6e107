#include "runtime/checkpoint/files.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <string>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"

namespace firesteel {
namespace {

struct OpenFile {
  int fd = -1;
  size_t size = 0;
};

absl::Status ErrnoStatus(int error, const std::string& path, absl::string_view what) {
  return absl::ErrnoToStatus(error, absl::StrCat(path, ": ", what));
}

/// Opens a regular file. O_NONBLOCK, so that a FIFO of that name is refused instead of waited for.
absl::StatusOr<OpenFile> OpenRegular(const std::string& path) {
  if (path.find('\0') != std::string::npos) {
    return absl::InvalidArgumentError(absl::StrCat("path \"", Printable(path), "\" holds a NUL"));
  }
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return ErrnoStatus(errno, path, "cannot be opened");
  struct stat info;
  if (fstat(fd, &info) != 0) {
    const int error = errno;
    close(fd);
    return ErrnoStatus(error, path, "cannot be examined");
  }
  if (!S_ISREG(info.st_mode)) {
    close(fd);
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a regular file"));
  }
  return OpenFile{fd, static_cast<size_t>(info.st_size)};
}

}  // namespace

std::string JoinPath(absl::string_view folder, absl::string_view name) {
  if (folder.empty() || folder.back() == '/') return absl::StrCat(folder, name);
  return absl::StrCat(folder, "/", name);
}

bool PathExists(const std::string& path) {
  struct stat info;
  return stat(path.c_str(), &info) == 0;
}

std::string Printable(absl::string_view text) {
  constexpr size_t kMaxBytes = 100;
  if (text.size() <= kMaxBytes) return absl::CHexEscape(text);
  return absl::StrCat(absl::CHexEscape(text.substr(0, kMaxBytes)), "...");
}

absl::StatusOr<std::unique_ptr<InputFile>> InputFile::Open(const std::string& path) {
  absl::StatusOr<OpenFile> file = OpenRegular(path);
  if (!file.ok()) return file.status();
  return std::unique_ptr<InputFile>(new InputFile(path, file->fd, file->size));
}

InputFile::~InputFile() { close(fd_); }

absl::Status InputFile::Read(uint64_t offset, size_t bytes, void* out) const {
  char* target = static_cast<char*>(out);
  while (bytes > 0) {
    const ssize_t got = pread(fd_, target, bytes, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return ErrnoStatus(errno, path_, "cannot be read");
    if (got == 0) {
      return absl::InvalidArgumentError(
          absl::StrCat(path_, ": truncated: it ends at byte ", offset));
    }
    target += got;
    offset += static_cast<uint64_t>(got);
    bytes -= static_cast<size_t>(got);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> ReadFile(const std::string& path, size_t max_bytes) {
  absl::StatusOr<OpenFile> file = OpenRegular(path);
  if (!file.ok()) return file.status();
  const absl::Cleanup closer = [fd = file->fd] { close(fd); };
  if (file->size > max_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": ", file->size, " bytes, the limit is ", max_bytes));
  }
  std::string content(file->size, '\0');
  size_t done = 0;
  while (done < content.size()) {
    const ssize_t got = read(file->fd, content.data() + done, content.size() - done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return ErrnoStatus(errno, path, "cannot be read");
    if (got == 0) break;  // cut short since fstat: what is left is judged by the caller
    done += static_cast<size_t>(got);
  }
  content.resize(done);
  return content;
}

absl::StatusOr<std::unique_ptr<MappedFile>> MappedFile::Open(const std::string& path) {
  absl::StatusOr<OpenFile> file = OpenRegular(path);
  if (!file.ok()) return file.status();
  const absl::Cleanup closer = [fd = file->fd] { close(fd); };
  if (file->size == 0) return std::unique_ptr<MappedFile>(new MappedFile(nullptr, 0));
  void* const data = mmap(nullptr, file->size, PROT_READ, MAP_PRIVATE, file->fd, 0);
  if (data == MAP_FAILED) return ErrnoStatus(errno, path, "cannot be mapped");
  // Read once from start to end: the kernel may read far ahead and drop what lies behind. A hint
  // only.
  (void)madvise(data, file->size, MADV_SEQUENTIAL);
  return std::unique_ptr<MappedFile>(
      new MappedFile(static_cast<const std::byte*>(data), file->size));
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<std::byte*>(data_), size_);
}

}  // namespace firesteel
