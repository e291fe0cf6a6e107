// The weights of a model, part by part in the runtime's layouts: what a folder, a packed file and a
// generator of random weights have in common, and what the memory of a server and a packed file are
// filled from.

#ifndef FIRESTEEL_RUNTIME_CHECKPOINT_WEIGHT_SOURCE_H_
#define FIRESTEEL_RUNTIME_CHECKPOINT_WEIGHT_SOURCE_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/checkpoint/model_config.h"
#include "runtime/checkpoint/weights.h"

namespace firesteel {

/// The members of ModelWeights and LayerWeights.
enum class PartKind : uint8_t {
  kEmbedding,
  kFinalNorm,
  kInputNorm,
  kPostAttentionNorm,
  kPreFeedforwardNorm,
  kPostFeedforwardNorm,
  kQkvProj,
  kOProj,
  kGateProj,
  kUpProj,
  kDownProj,
};

/// One of them: a matrix [rows, cols] of its role's element type, or a vector [cols] of f32.
struct ModelPart {
  PartKind kind = PartKind::kEmbedding;
  size_t layer = 0;  // of a layer's part
  std::string name;  // "embedding", "layers.3.qkv_proj"
  size_t rows = 1;
  size_t cols = 0;

  bool matrix() const;
  /// Of a matrix, in a Spark or a dense model.
  WeightRole role(bool spark) const;
};

/// All parts of a model, in the order in which sources are asked for them: the embedding, the final
/// norm, then layer by layer the norms and the matrices.
std::vector<ModelPart> ModelParts(const ModelConfig& config);

/// Whether every row of a model of this shape fits the arithmetic of its element types.
absl::Status CheckWidths(const ModelConfig& config, const WeightTypes& types);

/// Gives the parts of one model. Ask for them one after the other, each once, in the order of
/// ModelParts, unless the source says more.
class WeightSource {
 public:
  virtual ~WeightSource() = default;
  virtual const ModelConfig& config() const = 0;
  /// Of the matrices; they pass WeightTypes::Check.
  virtual const WeightTypes& types() const = 0;
  /// True if parts may be asked for in any order and by several threads at once.
  virtual bool concurrent() const { return false; }
  /// `part` is a matrix of ModelParts(config()).
  virtual absl::StatusOr<Matrix> ReadMatrix(const ModelPart& part) = 0;
  /// `part` is a vector of ModelParts(config()).
  virtual absl::StatusOr<std::vector<float>> ReadVector(const ModelPart& part) = 0;
};

/// A checkpoint folder, checked as LoadWeights says; matrices are converted to `format` by
/// `threads` threads. No more is in memory at a time than the part that is asked for (for a
/// transposed matrix of few bits, that and itself in f32); the files are mapped.
absl::StatusOr<std::unique_ptr<WeightSource>> OpenFolderSource(const std::string& folder,
                                                               WeightFormat format, size_t threads);

/// All parts of a source in memory; those of a concurrent source are read by `threads` threads.
absl::StatusOr<std::shared_ptr<ModelWeights>> AssembleWeights(WeightSource* source, size_t threads);

/// Calls work(begin, end) for neighbouring shares of [0, n), each on a thread of its own, and waits
/// for all. The error of the first share that has one; ResourceExhausted where memory runs out.
absl::Status ForEachShare(size_t n, size_t threads,
                          const std::function<absl::Status(size_t begin, size_t end)>& work);

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_CHECKPOINT_WEIGHT_SOURCE_H_
