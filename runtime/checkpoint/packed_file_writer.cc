#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <functional>
#include <new>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "runtime/checkpoint/packed_file.h"
#include "runtime/checkpoint/packed_format.h"

namespace firesteel {
namespace {

using packed::FileHeader;
using packed::FileSpan;
using packed::TableEntry;

absl::Status ErrnoStatus(int error, const std::string& path, absl::string_view what) {
  return absl::ErrnoToStatus(error, absl::StrCat(path, ": ", what));
}

/// A new file that becomes `path` when it is whole, and else goes away with the object.
class ReplacementFile {
 public:
  explicit ReplacementFile(std::string path) : path_(std::move(path)) {}
  ~ReplacementFile() {
    if (fd_ >= 0) close(fd_);
    if (made_) unlink(temporary_.c_str());
  }
  ReplacementFile(const ReplacementFile&) = delete;
  ReplacementFile& operator=(const ReplacementFile&) = delete;

  absl::Status Open(const std::function<void(const std::string&)>& on_temporary) {
    struct stat info;
    if (stat(path_.c_str(), &info) == 0 && !S_ISREG(info.st_mode)) {
      return absl::InvalidArgumentError(
          absl::StrCat(path_, ": it is there and no regular file: not replaced"));
    }
    std::random_device random;
    temporary_ = absl::StrFormat("%s.tmp-%08x", path_, random());
    if (on_temporary) on_temporary(temporary_);
    // O_EXCL: never through a link that somebody else left there.
    fd_ = open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd_ < 0) return ErrnoStatus(errno, temporary_, "cannot be made");
    made_ = true;
    return absl::OkStatus();
  }

  /// Sets the size. Asks for the disk space first, so that a full disk shows before the work.
  absl::Status Resize(uint64_t bytes) {
    const off_t size = static_cast<off_t>(bytes);
    if (fallocate(fd_, 0, 0, size) == 0) return absl::OkStatus();
    if (errno != EOPNOTSUPP && errno != ENOSYS) {
      return ErrnoStatus(errno, temporary_, absl::StrCat("no room for ", bytes, " bytes"));
    }
    if (ftruncate(fd_, size) == 0) return absl::OkStatus();
    return ErrnoStatus(errno, temporary_, absl::StrCat("cannot have ", bytes, " bytes"));
  }

  absl::Status Write(uint64_t offset, const void* data, size_t bytes) {
    const char* source = static_cast<const char*>(data);
    while (bytes > 0) {
      // In pieces: one write takes at most 2 GiB.
      const ssize_t wrote =
          pwrite(fd_, source, std::min(bytes, size_t{64} << 20), static_cast<off_t>(offset));
      if (wrote < 0 && errno == EINTR) continue;
      if (wrote < 0) return ErrnoStatus(errno, temporary_, "cannot be written");
      source += wrote;
      offset += static_cast<uint64_t>(wrote);
      bytes -= static_cast<size_t>(wrote);
    }
    return absl::OkStatus();
  }

  /// Content first, then the name, then the folder: a name never stands for less than the content.
  absl::Status Commit() {
    if (fsync(fd_) != 0) return ErrnoStatus(errno, temporary_, "cannot be synced");
    if (rename(temporary_.c_str(), path_.c_str()) != 0) {
      return ErrnoStatus(errno, path_, absl::StrCat("cannot be made from ", temporary_));
    }
    made_ = false;
    const size_t slash = path_.rfind('/');
    const std::string folder = slash == std::string::npos ? "." : path_.substr(0, slash + 1);
    const int folder_fd = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder_fd < 0) return absl::OkStatus();  // not readable: the system syncs it in its time
    const bool synced = fsync(folder_fd) == 0 || errno == EINVAL;
    const int error = errno;
    close(folder_fd);
    return synced ? absl::OkStatus() : ErrnoStatus(error, folder, "cannot be synced");
  }

 private:
  const std::string path_;
  std::string temporary_;
  int fd_ = -1;
  bool made_ = false;
};

static_assert(static_cast<int>(kernels::DType::kF32) == static_cast<int>(PackedPart::Type::kF32) &&
              static_cast<int>(kernels::DType::kBF16) ==
                  static_cast<int>(PackedPart::Type::kBF16) &&
              static_cast<int>(kernels::DType::kI8) == static_cast<int>(PackedPart::Type::kI8) &&
              static_cast<int>(kernels::DType::kI4) == static_cast<int>(PackedPart::Type::kI4));

/// The table of a file: the places of everything, in the order of the table, without checksums.
class Layout {
 public:
  TableEntry* AddText(const char* name, size_t bytes) {
    TableEntry* const entry = Add(name, PackedPart::Type::kText, 1, bytes, bytes);
    entry->data.bytes = bytes;
    return entry;
  }

  void AddTensor(const ModelPart& part, kernels::DType type) {
    const size_t stride = part.matrix() ? Matrix::StrideOf(part.cols, type) : part.cols;
    TableEntry* const entry =
        Add(part.name, static_cast<PackedPart::Type>(type), part.rows, part.cols, stride);
    entry->data.bytes = kernels::BytesOf(type, part.rows * stride);
    if (type == kernels::DType::kI8) entry->scales.bytes = part.rows * sizeof(float);
    if (type == kernels::DType::kI4) {
      entry->scales.bytes = part.rows * stride / kernels::kI4Block * sizeof(kernels::BF16);
    }
    matrix_.back() = part.matrix();
  }

  /// Gives everything its place. Returns the size of the file.
  uint64_t Place() {
    uint64_t end = sizeof(FileHeader) + table_.size() * sizeof(TableEntry);
    for (size_t i = 0; i < table_.size(); ++i) {
      end = packed::AlignUp(end, matrix_[i] ? packed::kMatrixAlignment : packed::kAlignment);
      table_[i].data.offset = end;
      end += table_[i].data.bytes;
      if (table_[i].scales.bytes == 0) continue;
      end = packed::AlignUp(end, packed::kAlignment);
      table_[i].scales.offset = end;
      end += table_[i].scales.bytes;
    }
    return end;
  }

  std::vector<TableEntry>& table() { return table_; }

 private:
  TableEntry* Add(const std::string& name, PackedPart::Type type, size_t rows, size_t cols,
                  size_t stride) {
    TableEntry entry = {};
    std::memcpy(entry.name, name.data(), std::min(name.size(), sizeof(entry.name) - 1));
    entry.type = static_cast<uint32_t>(type);
    entry.rows = rows;
    entry.cols = cols;
    entry.stride = stride;
    table_.push_back(entry);
    matrix_.push_back(false);
    return &table_.back();
  }

  std::vector<TableEntry> table_;
  std::vector<bool> matrix_;
};

absl::Status WriteSpan(ReplacementFile* file, const void* data, size_t bytes, FileSpan* span) {
  if (bytes != span->bytes) {
    return absl::InternalError(
        absl::StrCat("a part has ", bytes, " bytes, its shape ", span->bytes));
  }
  // The checksum is of what the memory holds: a disk that writes something else is found out.
  span->checksum = packed::ChecksumOf(data, bytes);
  return file->Write(span->offset, data, bytes);
}

absl::Status WritePart(WeightSource* source, const ModelPart& part, ReplacementFile* file,
                       TableEntry* entry) {
  if (!part.matrix()) {
    absl::StatusOr<std::vector<float>> vector = source->ReadVector(part);
    if (!vector.ok()) return vector.status();
    return WriteSpan(file, vector->data(), vector->size() * sizeof(float), &entry->data);
  }
  absl::StatusOr<Matrix> matrix = source->ReadMatrix(part);
  if (!matrix.ok()) return matrix.status();
  const kernels::TypedView view = matrix->view();
  absl::Status status = WriteSpan(file, view.data, matrix->DataBytes(), &entry->data);
  if (!status.ok() || matrix->ScaleBytes() == 0) return status;
  const void* const scales = view.dtype == kernels::DType::kI8
                                 ? static_cast<const void*>(view.row_scales)
                                 : static_cast<const void*>(view.block_scales);
  return WriteSpan(file, scales, matrix->ScaleBytes(), &entry->scales);
}

absl::Status Write(WeightSource* source, const PackedExtras& extras, const std::string& path,
                   const std::function<void(const std::string&)>& on_temporary) {
  const std::string config = ModelConfigToJson(source->config());
  // A configuration that was made by hand (a shape of ours) has not been through the parser.
  absl::StatusOr<ModelConfig> parsed = ParseModelConfig(config);
  if (!parsed.ok()) return parsed.status();
  if (*parsed != source->config()) return absl::InternalError("the configuration is not kept");
  if (extras.tokenizer.size() > packed::kMaxTokenizerBytes) {
    return absl::InvalidArgumentError(absl::StrCat("the tokenizer has ", extras.tokenizer.size(),
                                                   " bytes, the limit is ",
                                                   packed::kMaxTokenizerBytes));
  }
  if (absl::Status s = CheckWidths(source->config(), source->types()); !s.ok()) return s;
  std::vector<std::pair<const char*, std::string>> texts = {
      {packed::kConfigName, config},
      {packed::kDefaultsName, GenerationDefaultsToJson(extras.defaults)}};
  if (!extras.tokenizer.empty()) texts.emplace_back(packed::kTokenizerName, extras.tokenizer);

  Layout layout;
  for (const auto& [name, text] : texts) layout.AddText(name, text.size());
  const std::vector<ModelPart> parts = ModelParts(source->config());
  for (const ModelPart& part : parts) {
    layout.AddTensor(part, part.matrix() ? source->types()[part.role(source->config().spark())]
                                         : kernels::DType::kF32);
  }
  const uint64_t file_bytes = layout.Place();

  ReplacementFile file(path);
  absl::Status status = file.Open(on_temporary);
  if (status.ok()) status = file.Resize(file_bytes);
  std::vector<TableEntry>& table = layout.table();
  for (size_t i = 0; i < texts.size() && status.ok(); ++i) {
    status = WriteSpan(&file, texts[i].second.data(), texts[i].second.size(), &table[i].data);
  }
  for (size_t i = 0; i < parts.size() && status.ok(); ++i) {
    status = WritePart(source, parts[i], &file, &table[texts.size() + i]);
  }
  if (!status.ok()) return status;

  FileHeader header = {};
  std::memcpy(header.magic, packed::kMagic, sizeof(header.magic));
  header.version = kPackedVersion;
  header.entries = static_cast<uint32_t>(table.size());
  header.file_bytes = file_bytes;
  header.table_offset = sizeof(FileHeader);
  header.table_bytes = table.size() * sizeof(TableEntry);
  header.table_checksum = packed::ChecksumOf(table.data(), header.table_bytes);
  header.header_checksum = packed::ChecksumOf(&header, offsetof(FileHeader, header_checksum));
  status = file.Write(header.table_offset, table.data(), header.table_bytes);
  if (status.ok()) status = file.Write(0, &header, sizeof(header));
  if (status.ok()) status = file.Commit();
  return status;
}

}  // namespace

absl::Status WritePackedFile(WeightSource* source, const PackedExtras& extras,
                             const std::string& path,
                             const std::function<void(const std::string&)>& on_temporary) {
  try {
    return Write(source, extras, path, on_temporary);
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError(absl::StrCat(path, ": not enough memory to write it"));
  }
}

}  // namespace firesteel
