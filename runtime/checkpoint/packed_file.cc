#include "runtime/checkpoint/packed_file.h"

#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "runtime/checkpoint/packed_format.h"

// Linux 5.14; the C library's headers may be older than the kernel.
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

namespace firesteel {
namespace {

using kernels::DType;
using packed::FileHeader;
using packed::TableEntry;
using Type = PackedPart::Type;

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kChunk = size_t{256} << 10;  // stays in the L2 cache between copy and checksum

std::optional<DType> DTypeOf(Type type) {
  switch (type) {
    case Type::kF32:
      return DType::kF32;
    case Type::kBF16:
      return DType::kBF16;
    case Type::kI8:
      return DType::kI8;
    case Type::kI4:
      return DType::kI4;
    case Type::kText:
      break;
  }
  return std::nullopt;
}

bool KnownType(uint32_t type) { return type <= static_cast<uint32_t>(Type::kI4) || type == 255; }

bool TextName(absl::string_view name) {
  return name == packed::kConfigName || name == packed::kDefaultsName ||
         name == packed::kTokenizerName;
}

/// What the elements of a span are, where they have a value that may not be stored.
enum class Values : uint8_t { kAny, kF32, kBF16, kI8 };

Values ValuesOf(Type type, bool scales) {
  switch (type) {
    case Type::kF32:
      return Values::kF32;
    case Type::kBF16:
      return Values::kBF16;
    case Type::kI8:
      return scales ? Values::kF32 : Values::kI8;
    case Type::kI4:
      return scales ? Values::kBF16 : Values::kAny;
    case Type::kText:
      break;
  }
  return Values::kAny;
}

bool Allowed(uint32_t f32_bits) { return (f32_bits & 0x7F800000u) != 0x7F800000u; }
bool Allowed(uint16_t bf16_bits) { return (bf16_bits & 0x7F80u) != 0x7F80u; }
bool Allowed(int8_t value) { return value != INT8_MIN; }

/// Index of the first element that is not allowed; n if all are. The common case has no branch, and
/// flags as wide as elements, so that compilers make vectors of it.
template <typename T>
size_t FirstBadOf(const std::byte* bytes, size_t n) {
  const T* const values = reinterpret_cast<const T*>(bytes);
  T bad = 0;
  for (size_t i = 0; i < n; ++i) bad = static_cast<T>(bad | (Allowed(values[i]) ? 0 : 1));
  if (bad == 0) return n;
  return static_cast<size_t>(std::find_if(values, values + n, [](T v) { return !Allowed(v); }) -
                             values);
}

/// `bytes` is aligned and holds whole elements. The offset of the first that is not allowed, or
/// nothing.
std::optional<size_t> FirstBad(Values values, const std::byte* data, size_t bytes) {
  size_t size = 1, at = bytes;
  switch (values) {
    case Values::kF32:
      size = 4;
      at = FirstBadOf<uint32_t>(data, bytes / size);
      break;
    case Values::kBF16:
      size = 2;
      at = FirstBadOf<uint16_t>(data, bytes / size);
      break;
    case Values::kI8:
      at = FirstBadOf<int8_t>(data, bytes);
      break;
    case Values::kAny:
      break;
  }
  if (at == bytes / size) return std::nullopt;
  return at * size;
}

absl::Status BadHeader(const std::string& path, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat(path, ": header: ", what));
}

absl::Status CheckHeader(const std::string& path, const FileHeader& header, uint64_t file_bytes) {
  if (std::memcmp(header.magic, packed::kMagic, sizeof(header.magic)) != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        path, ": not a packed file (firesteel-convert makes them); a checkpoint is a folder"));
  }
  if (header.version != kPackedVersion) {
    return BadHeader(path, absl::StrCat("the format version is ", header.version,
                                        ", this program reads ", kPackedVersion));
  }
  const uint64_t checksum = packed::ChecksumOf(&header, offsetof(FileHeader, header_checksum));
  if (header.header_checksum != checksum) return BadHeader(path, "its checksum is wrong: damaged");
  if (header.reserved != 0) return BadHeader(path, "reserved bytes are not zero");
  if (header.file_bytes != file_bytes) {
    return BadHeader(
        path, absl::StrCat(header.file_bytes > file_bytes ? "truncated: " : "", "the file has ",
                           file_bytes, " bytes, it should have ", header.file_bytes));
  }
  if (header.entries == 0 || header.entries > packed::kMaxEntries) {
    return BadHeader(path, absl::StrCat("the table has ", header.entries,
                                        " rows, the limits are 1 and ", packed::kMaxEntries));
  }
  if (header.table_offset != sizeof(FileHeader)) {
    return BadHeader(path, absl::StrCat("the table's offset is ", header.table_offset, ", not ",
                                        sizeof(FileHeader)));
  }
  const uint64_t table_bytes = uint64_t{header.entries} * sizeof(TableEntry);
  if (header.table_bytes != table_bytes) {
    return BadHeader(path, absl::StrCat("the table has ", header.table_bytes, " bytes, ",
                                        header.entries, " rows need ", table_bytes));
  }
  if (table_bytes > file_bytes - sizeof(FileHeader)) {
    return BadHeader(path, absl::StrCat("the table ends at byte ", sizeof(FileHeader) + table_bytes,
                                        ", the file at ", file_bytes));
  }
  return absl::OkStatus();
}

PackedSpan SpanOf(const packed::FileSpan& span) { return {span.offset, span.bytes, span.checksum}; }

/// All spans of a file, in the order of their offsets.
std::vector<std::pair<const PackedSpan*, const PackedPart*>> SortedSpans(
    const std::vector<PackedPart>& parts) {
  std::vector<std::pair<const PackedSpan*, const PackedPart*>> spans;
  for (const PackedPart& part : parts) {
    spans.emplace_back(&part.data, &part);
    if (part.scales.bytes > 0) spans.emplace_back(&part.scales, &part);
  }
  std::sort(spans.begin(), spans.end(),
            [](const auto& a, const auto& b) { return a.first->offset < b.first->offset; });
  return spans;
}

/// Parts of an open packed file as a source of weights.
class PackedSource final : public WeightSource {
 public:
  PackedSource(std::unique_ptr<PackedFile> file, std::shared_ptr<const std::byte> mapping)
      : file_(std::move(file)), mapping_(std::move(mapping)) {}

  const ModelConfig& config() const override { return file_->config(); }
  const WeightTypes& types() const override { return file_->types(); }
  bool concurrent() const override { return true; }
  absl::StatusOr<Matrix> ReadMatrix(const ModelPart& part) override {
    return mapping_ != nullptr ? file_->ViewMatrix(part, mapping_) : file_->ReadMatrix(part);
  }
  absl::StatusOr<std::vector<float>> ReadVector(const ModelPart& part) override {
    return file_->ReadVector(part);
  }

 private:
  const std::unique_ptr<PackedFile> file_;
  const std::shared_ptr<const std::byte> mapping_;  // null: weights are copied
};

}  // namespace

const char* PackedTypeName(Type type) {
  const std::optional<DType> dtype = DTypeOf(type);
  return dtype.has_value() ? DTypeName(*dtype) : "text";
}

bool IsPackedFile(const std::string& path) {
  struct stat info;
  return stat(path.c_str(), &info) == 0 && !S_ISDIR(info.st_mode);
}

absl::Status PackedFile::Error(absl::string_view part, absl::string_view what) const {
  return absl::InvalidArgumentError(absl::StrCat(path(), ": ", TextName(part) ? "part" : "tensor",
                                                 " \"", Printable(part), "\": ", what));
}

absl::StatusOr<std::unique_ptr<PackedFile>> PackedFile::Open(const std::string& path) {
  absl::StatusOr<std::unique_ptr<InputFile>> input = InputFile::Open(path);
  if (!input.ok()) return input.status();
  std::unique_ptr<PackedFile> file(new PackedFile(*std::move(input)));
  for (const auto step : {&PackedFile::ReadTable, &PackedFile::ReadTexts}) {
    if (absl::Status status = (file.get()->*step)(); !status.ok()) return status;
  }
  if (absl::Status status = file->CheckTensors(); !status.ok()) return status;
  return file;
}

absl::Status PackedFile::ReadTable() {
  FileHeader header;
  if (size() < sizeof(header)) {
    return BadHeader(path(), absl::StrCat("truncated: the file has ", size(),
                                          " bytes, a header takes ", sizeof(header)));
  }
  absl::Status status = file_->Read(0, sizeof(header), &header);
  if (status.ok()) status = CheckHeader(path(), header, size());
  if (!status.ok()) return status;
  std::vector<TableEntry> table(header.entries);
  status = file_->Read(header.table_offset, header.table_bytes, table.data());
  if (!status.ok()) return status;
  if (packed::ChecksumOf(table.data(), header.table_bytes) != header.table_checksum) {
    return absl::InvalidArgumentError(
        absl::StrCat(path(), ": the table's checksum is wrong: damaged"));
  }
  for (const TableEntry& entry : table) {
    const size_t length = strnlen(entry.name, sizeof(entry.name));
    const absl::string_view name(entry.name, length);
    if (length == 0 || length == sizeof(entry.name) ||
        absl::string_view(entry.name, sizeof(entry.name)).find_first_not_of('\0', length) !=
            absl::string_view::npos) {
      return Error(name, absl::StrCat("its name is not 1 to ", sizeof(entry.name) - 1,
                                      " bytes, filled up with NUL"));
    }
    if (!KnownType(entry.type))
      return Error(name, absl::StrCat("type ", entry.type, " is unknown"));
    if (entry.reserved != 0) return Error(name, "reserved bytes are not zero");
    if (!index_.emplace(std::string(name), parts_.size()).second) {
      return Error(name, "it stands in the table twice");
    }
    parts_.push_back({std::string(name), static_cast<Type>(entry.type), entry.rows, entry.cols,
                      entry.stride, SpanOf(entry.data), SpanOf(entry.scales)});
  }
  return CheckPlaces();
}

/// Every span lies behind the table and in the file, is aligned and overlaps no other.
absl::Status PackedFile::CheckPlaces() const {
  for (const PackedPart& part : parts_) {
    const bool matrix = part.type != Type::kText && part.rows != 1;
    for (const PackedSpan* span : {&part.data, &part.scales}) {
      const char* const what = span == &part.data ? "data" : "scales";
      const bool may_be_empty = span == &part.scales;
      if (may_be_empty && span->bytes == 0 && span->offset == 0 && span->checksum == 0) continue;
      if (span->bytes == 0) return Error(part.name, absl::StrCat("its ", what, " has no bytes"));
      const size_t alignment =
          matrix && span == &part.data ? packed::kMatrixAlignment : packed::kAlignment;
      if (span->offset % alignment != 0) {
        return Error(part.name, absl::StrCat("the offset of its ", what, " is ", span->offset,
                                             ", not a multiple of ", alignment));
      }
      if (span->offset > size() || span->bytes > size() - span->offset) {
        return Error(part.name, absl::StrCat("its ", what, " has ", span->bytes, " bytes from ",
                                             span->offset, " on, the file ends at ", size()));
      }
    }
  }
  uint64_t end = sizeof(FileHeader) + parts_.size() * sizeof(TableEntry);
  for (const auto& [span, part] : SortedSpans(parts_)) {
    if (span->offset < end) {
      return Error(part->name, absl::StrCat("its bytes from ", span->offset,
                                            " on overlap others, which end at ", end));
    }
    end = span->offset + span->bytes;
  }
  return absl::OkStatus();
}

const PackedPart* PackedFile::Find(const std::string& name) const {
  const auto it = index_.find(name);
  return it == index_.end() ? nullptr : &parts_[it->second];
}

absl::StatusOr<std::string> PackedFile::ReadText(const PackedPart& part) const {
  const uint64_t limit =
      part.name == packed::kTokenizerName ? packed::kMaxTokenizerBytes : packed::kMaxJsonBytes;
  if (part.type != Type::kText) {
    return Error(part.name, absl::StrCat("its type is ", PackedTypeName(part.type), ", not text"));
  }
  if (part.data.bytes > limit) {
    return Error(part.name,
                 absl::StrCat("it has ", part.data.bytes, " bytes, the limit is ", limit));
  }
  std::string text(part.data.bytes, '\0');
  absl::Status status = ReadSpan(part, part.data, text.data());
  if (!status.ok()) return status;
  return text;
}

/// config.json and generation_config.json, parsed by the code that reads a folder's.
absl::Status PackedFile::ReadTexts() {
  for (const PackedPart& part : parts_) {
    if (part.type != Type::kText) continue;
    if (!TextName(part.name)) return Error(part.name, "a text of this name is unknown");
    if (part.rows != 1 || part.cols != part.data.bytes || part.stride != part.data.bytes ||
        part.scales.bytes != 0) {
      return Error(part.name,
                   absl::StrCat("a text of ", part.data.bytes, " bytes is not [", part.rows, ", ",
                                part.cols, "] with stride ", part.stride));
    }
  }
  const PackedPart* const config_part = Find(packed::kConfigName);
  if (config_part == nullptr) return Error(packed::kConfigName, "it is missing");
  absl::StatusOr<std::string> text = ReadText(*config_part);
  if (!text.ok()) return text.status();
  absl::StatusOr<ModelConfig> config = ParseModelConfig(*text);
  if (!config.ok()) return Error(packed::kConfigName, config.status().message());
  config_ = *std::move(config);

  const PackedPart* const defaults_part = Find(packed::kDefaultsName);
  if (defaults_part == nullptr) return absl::OkStatus();
  text = ReadText(*defaults_part);
  if (!text.ok()) return text.status();
  absl::StatusOr<GenerationDefaults> defaults = ParseGenerationDefaults(*text);
  if (!defaults.ok()) return Error(packed::kDefaultsName, defaults.status().message());
  defaults_ = *defaults;
  return absl::OkStatus();
}

/// The type of each role: that of the first matrix that has it.
absl::Status PackedFile::ReadTypes(const std::vector<ModelPart>& expected) {
  std::array<bool, kNumWeightRoles> known{};
  for (const ModelPart& part : expected) {
    if (!part.matrix()) continue;
    const WeightRole role = part.role(config_.spark());
    if (std::exchange(known[static_cast<size_t>(role)], true)) continue;
    const PackedPart* const found = Find(part.name);
    if (found == nullptr) return Error(part.name, "it is missing");
    const std::optional<DType> dtype = DTypeOf(found->type);
    if (!dtype.has_value()) return Error(part.name, "its type is text, not that of weights");
    types_[role] = *dtype;
  }
  if (!config_.spark()) types_[WeightRole::kPredictor] = types_[WeightRole::kFfn];
  if (absl::Status status = types_.Check(); !status.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(path(), ": ", status.message()));
  }
  return absl::OkStatus();
}

/// The tensors are those of the configuration, each in its layout, and no others.
absl::Status PackedFile::CheckTensors() {
  const std::vector<ModelPart> expected = ModelParts(config_);
  if (absl::Status status = ReadTypes(expected); !status.ok()) return status;
  for (const ModelPart& part : expected) {
    const PackedPart* const found = Find(part.name);
    if (found == nullptr) return Error(part.name, "it is missing");
    if (absl::Status status = CheckTensor(*found, part); !status.ok()) return status;
  }
  size_t tensors = 0;
  for (const PackedPart& part : parts_) tensors += part.type != Type::kText;
  if (tensors != expected.size()) {
    for (const PackedPart& part : parts_) {
      if (part.type == Type::kText) continue;
      const bool known = std::any_of(expected.begin(), expected.end(),
                                     [&part](const ModelPart& e) { return e.name == part.name; });
      if (!known) return Error(part.name, "a model of this config.json has no such tensor");
    }
  }
  if (absl::Status status = CheckWidths(config_, types_); !status.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(path(), ": ", status.message()));
  }
  return absl::OkStatus();
}

absl::Status PackedFile::CheckTensor(const PackedPart& part, const ModelPart& expected) const {
  const DType dtype = expected.matrix() ? types_[expected.role(config_.spark())] : DType::kF32;
  if (DTypeOf(part.type) != dtype) {
    return Error(part.name, absl::StrCat("its type is ", PackedTypeName(part.type), ", not ",
                                         DTypeName(dtype)));
  }
  const size_t stride = expected.matrix() ? Matrix::StrideOf(expected.cols, dtype) : expected.cols;
  if (part.rows != expected.rows || part.cols != expected.cols || part.stride != stride) {
    return Error(part.name,
                 absl::StrCat("its shape is [", part.rows, ", ", part.cols, "] with stride ",
                              part.stride, ", config.json needs [", expected.rows, ", ",
                              expected.cols, "] with stride ", stride));
  }
  // The limits of the configuration keep these products within 64 bits.
  const uint64_t bytes = kernels::BytesOf(dtype, expected.rows * stride);
  if (part.data.bytes != bytes) {
    return Error(part.name,
                 absl::StrCat("its data has ", part.data.bytes, " bytes, its shape needs ", bytes));
  }
  uint64_t scale_bytes = 0;
  if (dtype == DType::kI8) scale_bytes = expected.rows * sizeof(float);
  if (dtype == DType::kI4) scale_bytes = expected.rows * stride / kernels::kI4Block * 2;
  if (part.scales.bytes != scale_bytes) {
    return Error(part.name, absl::StrCat("its scales have ", part.scales.bytes,
                                         " bytes, its shape needs ", scale_bytes));
  }
  if (expected.matrix() && part.data.offset % packed::kMatrixAlignment != 0) {
    return Error(part.name, absl::StrCat("the offset of its data is ", part.data.offset,
                                         ", not a multiple of ", packed::kMatrixAlignment));
  }
  return absl::OkStatus();
}

/// Copies a span to `out`, or only looks at it where that is null; checks checksum and values.
absl::Status PackedFile::ReadSpan(const PackedPart& part, const PackedSpan& span, void* out) const {
  const bool scales = &span == &part.scales;
  const Values values = ValuesOf(part.type, scales);
  packed::Checksum checksum;
  std::vector<std::byte> scratch(out == nullptr ? std::min<uint64_t>(kChunk, span.bytes) : 0);
  for (uint64_t at = 0; at < span.bytes; at += kChunk) {
    const size_t bytes = std::min<uint64_t>(kChunk, span.bytes - at);
    std::byte* const target = out == nullptr ? scratch.data() : static_cast<std::byte*>(out) + at;
    if (absl::Status status = file_->Read(span.offset + at, bytes, target); !status.ok()) {
      return status;
    }
    checksum.Add(target, bytes);
    if (const std::optional<size_t> bad = FirstBad(values, target, bytes); bad.has_value()) {
      return Error(part.name, absl::StrCat("the ", scales ? "scale" : "value", " at byte ",
                                           span.offset + at + *bad, " is not allowed (",
                                           values == Values::kI8 ? "-128" : "not finite", ")"));
    }
  }
  if (checksum.Value() != span.checksum) {
    return Error(part.name,
                 absl::StrFormat("the checksum of its %s is %016x, not %016x: damaged",
                                 scales ? "scales" : "data", checksum.Value(), span.checksum));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> PackedFile::ReadTokenizer() const {
  const PackedPart* const part = Find(packed::kTokenizerName);
  if (part != nullptr) return ReadText(*part);
  return absl::NotFoundError(absl::StrCat(path(), ": it holds no ", packed::kTokenizerName));
}

absl::StatusOr<Matrix> PackedFile::ReadMatrix(const ModelPart& expected) const {
  const PackedPart& part = *Find(expected.name);
  Matrix matrix(expected.rows, expected.cols, types_[expected.role(config_.spark())],
                Matrix::Fill::kNone);
  absl::Status status = ReadSpan(part, part.data, matrix.MutableRow(0));
  if (status.ok() && part.scales.bytes > 0) {
    status = ReadSpan(part, part.scales, matrix.MutableScales());
  }
  if (!status.ok()) return status;
  return matrix;
}

absl::StatusOr<std::vector<float>> PackedFile::ReadVector(const ModelPart& expected) const {
  const PackedPart& part = *Find(expected.name);
  std::vector<float> vector(expected.cols);
  absl::Status status = ReadSpan(part, part.data, vector.data());
  if (!status.ok()) return status;
  return vector;
}

absl::StatusOr<Matrix> PackedFile::ViewMatrix(const ModelPart& expected,
                                              std::shared_ptr<const std::byte> mapping) const {
  const PackedPart& part = *Find(expected.name);
  const std::byte* const scales = mapping.get() + part.scales.offset;
  if (part.scales.bytes > 0) {
    const auto bad = FirstBad(ValuesOf(part.type, true), scales, part.scales.bytes);
    if (bad.has_value()) {
      return Error(part.name, absl::StrCat("the scale at byte ", part.scales.offset + *bad,
                                           " is not allowed (not finite)"));
    }
  }
  kernels::TypedView view;
  view.data = mapping.get() + part.data.offset;
  view.dtype = types_[expected.role(config_.spark())];
  view.rows = expected.rows;
  view.cols = expected.cols;
  view.stride = part.stride;
  if (view.dtype == DType::kI8) view.row_scales = reinterpret_cast<const float*>(scales);
  if (view.dtype == DType::kI4) view.block_scales = reinterpret_cast<const kernels::BF16*>(scales);
  return Matrix(view, std::move(mapping));
}

absl::StatusOr<std::shared_ptr<const std::byte>> PackedFile::Map() const {
  // The address is a multiple of a huge page as offset 0 is: the kernel may then map huge pages of
  // the page cache whole, where the file system has such.
  const size_t bytes = size();
  const size_t reserved = bytes + kHugePage;
  void* const space =
      mmap(nullptr, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  const auto failed = [this](int error) {
    return absl::ErrnoToStatus(error, absl::StrCat(path(), ": cannot be mapped"));
  };
  if (space == MAP_FAILED) return failed(errno);
  const uintptr_t aligned = packed::AlignUp(reinterpret_cast<uintptr_t>(space), kHugePage);
  void* const data = mmap(reinterpret_cast<void*>(aligned), bytes, PROT_READ,
                          MAP_SHARED | MAP_FIXED, file_->fd(), 0);
  if (data == MAP_FAILED) {
    const int error = errno;
    munmap(space, reserved);
    return failed(error);
  }
  // Hints: the pages come in before the first request, not during it.
  (void)madvise(data, bytes, MADV_HUGEPAGE);
  (void)madvise(data, bytes, MADV_POPULATE_READ);
  return std::shared_ptr<const std::byte>(
      static_cast<const std::byte*>(data),
      [space, reserved](const std::byte*) { munmap(space, reserved); });
}

absl::Status PackedFile::Verify(size_t threads) const {
  std::atomic<size_t> next = 0;
  std::vector<absl::Status> statuses(parts_.size());
  const absl::Status status = ForEachShare(threads, threads, [&](size_t, size_t) {
    for (size_t i = next++; i < parts_.size(); i = next++) {
      const PackedPart& part = parts_[i];
      statuses[i] = ReadSpan(part, part.data, nullptr);
      if (statuses[i].ok() && part.scales.bytes > 0) {
        statuses[i] = ReadSpan(part, part.scales, nullptr);
      }
    }
    return absl::OkStatus();
  });
  if (!status.ok()) return status;
  for (absl::Status& part : statuses) {
    if (!part.ok()) return std::move(part);
  }
  // What belongs to no part is padding.
  uint64_t end = sizeof(FileHeader) + parts_.size() * sizeof(TableEntry);
  std::vector<char> gap(kChunk);
  const auto check_gap = [&](uint64_t until) -> absl::Status {
    for (; end < until; end += std::min<uint64_t>(kChunk, until - end)) {
      const size_t bytes = std::min<uint64_t>(kChunk, until - end);
      if (absl::Status read = file_->Read(end, bytes, gap.data()); !read.ok()) return read;
      const auto nonzero = std::find_if(gap.begin(), gap.begin() + static_cast<ptrdiff_t>(bytes),
                                        [](char c) { return c != 0; });
      if (nonzero == gap.begin() + static_cast<ptrdiff_t>(bytes)) continue;
      return absl::InvalidArgumentError(
          absl::StrCat(path(), ": byte ", end + static_cast<uint64_t>(nonzero - gap.begin()),
                       " belongs to no part and is not zero: damaged"));
    }
    return absl::OkStatus();
  };
  for (const auto& [span, part] : SortedSpans(parts_)) {
    if (absl::Status checked = check_gap(span->offset); !checked.ok()) return checked;
    end = span->offset + span->bytes;
  }
  return check_gap(size());
}

absl::StatusOr<std::unique_ptr<WeightSource>> OpenPackedSource(const std::string& path,
                                                               WeightFormat format,
                                                               WeightMemory memory) {
  absl::StatusOr<std::unique_ptr<PackedFile>> file = PackedFile::Open(path);
  if (!file.ok()) return file.status();
  const WeightTypes& held = (*file)->types();
  if (format.TypesOf((*file)->config().spark(), held) != held) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": it holds ", (*file)->FormatName(), " weights, not ", format.Name(),
                     ": a packed file is served as it is (auto), or converted "
                     "from its checkpoint anew"));
  }
  std::shared_ptr<const std::byte> mapping;
  if (memory == WeightMemory::kShared) {
    auto mapped = (*file)->Map();
    if (!mapped.ok()) return mapped.status();
    mapping = *std::move(mapped);
  }
  return std::make_unique<PackedSource>(*std::move(file), std::move(mapping));
}

}  // namespace firesteel
