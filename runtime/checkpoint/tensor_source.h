// The tensors of a checkpoint folder, whether they stand in one file or in shards.

#ifndef FIRESTEEL_RUNTIME_CHECKPOINT_TENSOR_SOURCE_H_
#define FIRESTEEL_RUNTIME_CHECKPOINT_TENSOR_SOURCE_H_

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/checkpoint/safetensors.h"

namespace firesteel {

/// An open checkpoint folder. Immutable, hence thread-safe. Tensors point into it.
class TensorSource {
 public:
  /// Opens FOLDER/model.safetensors or, where there is none, the shards that
  /// FOLDER/model.safetensors.index.json lists. Shards are plain file names in the folder; each
  /// tensor stands in the shard that the index says and in no other. NotFound where there is
  /// neither file.
  static absl::StatusOr<std::unique_ptr<TensorSource>> Open(const std::string& folder);

  const std::map<std::string, const StoredTensor*>& tensors() const { return tensors_; }
  /// The file that names all tensors: what an error about a missing one points at.
  const std::string& path() const { return path_; }

 private:
  absl::Status AddSingle(const std::string& path);
  absl::Status AddShards(const std::string& folder, const std::string& index_path);

  std::string path_;
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::map<std::string, const StoredTensor*> tensors_;
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_CHECKPOINT_TENSOR_SOURCE_H_
