// The packed serving file (extension .firesteel): all that a server needs of a model in one file,
// its weights in the layouts that the kernels read. docs/formats.md describes every byte.

#ifndef FIRESTEEL_RUNTIME_CHECKPOINT_PACKED_FILE_H_
#define FIRESTEEL_RUNTIME_CHECKPOINT_PACKED_FILE_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/tensor.h"
#include "runtime/checkpoint/files.h"
#include "runtime/checkpoint/model_config.h"
#include "runtime/checkpoint/weight_source.h"
#include "runtime/checkpoint/weights.h"

namespace firesteel {

/// How names of packed files end. A convention: they are known by their first bytes.
inline constexpr char kPackedExtension[] = ".firesteel";
inline constexpr uint32_t kPackedVersion = 1;

/// A piece of the file: its place and the XXH3-64 of its bytes.
struct PackedSpan {
  uint64_t offset = 0;
  uint64_t bytes = 0;
  uint64_t checksum = 0;
};

/// One row of the file's table.
struct PackedPart {
  enum class Type : uint32_t { kF32 = 0, kBF16 = 1, kI8 = 2, kI4 = 3, kText = 255 };

  std::string name;
  Type type = Type::kText;
  uint64_t rows = 0;  // a vector or a text has 1
  uint64_t cols = 0;
  uint64_t stride = 0;  // elements from one row to the next
  PackedSpan data;
  PackedSpan scales;  // kI8, kI4; else all zero
};

/// "f32", "bf16", "int8", "int4" or "text".
const char* PackedTypeName(PackedPart::Type type);

/// True if `path` is there and no folder: the two kinds of path that --model takes.
bool IsPackedFile(const std::string& path);

/// An open packed file. Immutable, hence thread-safe. Nothing of it is trusted: what is handed out
/// lies in the file, has the shape that the configuration needs, and overlaps nothing.
class PackedFile {
 public:
  /// Opens a file and checks its header, its table (names, types, shapes, alignment, bounds,
  /// overlaps), its configuration and its generation defaults. It reads no weights. Errors name the
  /// file, the part, the value and the limit.
  static absl::StatusOr<std::unique_ptr<PackedFile>> Open(const std::string& path);

  const std::string& path() const { return file_->path(); }
  uint64_t size() const { return file_->size(); }
  const ModelConfig& config() const { return config_; }
  const GenerationDefaults& generation_defaults() const { return defaults_; }
  /// Of the matrices.
  const WeightTypes& types() const { return types_; }
  /// What --weights calls them.
  std::string FormatName() const { return WeightFormat::NameOf(types_, config_.spark()); }
  /// In the order of the table.
  const std::vector<PackedPart>& parts() const { return parts_; }

  /// The bytes of the tokenizer.model, checked against their checksum. NotFound where the file has
  /// none.
  absl::StatusOr<std::string> ReadTokenizer() const;
  /// A matrix in memory of its own, checked: checksums, and every value and scale is finite.
  absl::StatusOr<Matrix> ReadMatrix(const ModelPart& part) const;
  /// A vector, checked likewise.
  absl::StatusOr<std::vector<float>> ReadVector(const ModelPart& part) const;
  /// A matrix inside `mapping`, a mapping of the whole file. Its scales must be finite; nothing
  /// else of it is read.
  absl::StatusOr<Matrix> ViewMatrix(const ModelPart& part,
                                    std::shared_ptr<const std::byte> mapping) const;
  /// Maps the whole file read-only; the mapping outlives this object. The file must be neither
  /// written nor cut short meanwhile (replace it by rename, as WritePackedFile does).
  absl::StatusOr<std::shared_ptr<const std::byte>> Map() const;

  /// Reads the whole file: every checksum, every value, and that bytes between parts are zero. Work
  /// is shared by `threads` threads.
  absl::Status Verify(size_t threads) const;

 private:
  explicit PackedFile(std::unique_ptr<InputFile> file) : file_(std::move(file)) {}

  absl::Status ReadTable();
  absl::Status CheckPlaces() const;
  absl::Status ReadTexts();
  absl::Status ReadTypes(const std::vector<ModelPart>& expected);
  absl::Status CheckTensors();
  absl::Status CheckTensor(const PackedPart& part, const ModelPart& expected) const;
  const PackedPart* Find(const std::string& name) const;
  absl::StatusOr<std::string> ReadText(const PackedPart& part) const;
  absl::Status ReadSpan(const PackedPart& part, const PackedSpan& span, void* out) const;
  absl::Status CheckSpan(const PackedPart& part, bool scales) const;
  absl::Status Error(absl::string_view part, absl::string_view what) const;

  const std::unique_ptr<InputFile> file_;
  // Filled by Open.
  std::vector<PackedPart> parts_;
  std::map<std::string, size_t> index_;  // into parts_
  ModelConfig config_;
  GenerationDefaults defaults_;
  WeightTypes types_ = kernels::DType::kBF16;
};

/// The weights of a packed file. InvalidArgument unless `format` is kAuto or gives the types that
/// the file holds. Concurrent.
absl::StatusOr<std::unique_ptr<WeightSource>> OpenPackedSource(const std::string& path,
                                                               WeightFormat format,
                                                               WeightMemory memory);

/// What a packed file has besides weights.
struct PackedExtras {
  GenerationDefaults defaults;
  std::string tokenizer;  // the bytes of a tokenizer.model; empty: none
};

/// Writes the parts of `source` to a temporary file beside `path`, syncs it and renames it to
/// `path`: whatever happens, `path` is what it was or whole. One part is in memory at a time.
/// `on_temporary`, if any, is told the temporary file's name before it is made; it is removed where
/// an error is returned.
absl::Status WritePackedFile(WeightSource* source, const PackedExtras& extras,
                             const std::string& path,
                             const std::function<void(const std::string&)>& on_temporary = {});

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_CHECKPOINT_PACKED_FILE_H_
