// Reads .safetensors files: an 8-byte little-endian header size, a JSON header, then the tensors'
// bytes.
//
// Everything in the header is checked before any tensor is handed out, so that a view always lies
// in the file and has as many bytes as its shape and dtype need.

#ifndef FIRESTEEL_RUNTIME_CHECKPOINT_SAFETENSORS_H_
#define FIRESTEEL_RUNTIME_CHECKPOINT_SAFETENSORS_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "runtime/checkpoint/files.h"

namespace firesteel {

/// How a tensor's elements are stored, little-endian. kOther: a type that safetensors knows and no
/// model here uses (integers, F64, F8); such a tensor may stand in a file but can't be loaded.
enum class StoredType : uint8_t { kBF16, kF16, kF32, kOther };

/// One tensor inside a mapped file: valid as long as the file is open, and at any alignment, so
/// read it by memcpy.
struct StoredTensor {
  StoredType type = StoredType::kOther;
  std::string type_name;      // as the header has it, for messages
  std::vector<size_t> shape;  // row-major
  const std::byte* data = nullptr;
  size_t bytes = 0;
  const std::string* path = nullptr;  // of the file that holds it
};

/// One open .safetensors file. Immutable, hence thread-safe.
class SafetensorsFile {
 public:
  /// Maps and checks a file: the sizes, the JSON (no duplicate names), every dtype, shape and
  /// offset. The tensors must fill the data without overlap, hole or trailing bytes. Errors name
  /// the file and the tensor.
  static absl::StatusOr<std::unique_ptr<SafetensorsFile>> Open(const std::string& path);

  const std::map<std::string, StoredTensor>& tensors() const { return tensors_; }
  const std::string& path() const { return path_; }

 private:
  SafetensorsFile(std::string path, std::unique_ptr<MappedFile> file)
      : path_(std::move(path)), file_(std::move(file)) {}

  const std::string path_;
  const std::unique_ptr<MappedFile> file_;
  std::map<std::string, StoredTensor> tensors_;  // filled by Open
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_CHECKPOINT_SAFETENSORS_H_
