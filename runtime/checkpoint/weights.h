// The weights of a model in memory, in the layouts that the kernels read.

#ifndef FIRESTEEL_RUNTIME_CHECKPOINT_WEIGHTS_H_
#define FIRESTEEL_RUNTIME_CHECKPOINT_WEIGHTS_H_

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/tensor.h"
#include "runtime/checkpoint/model_config.h"

namespace firesteel {

/// How weights are held: kAuto keeps bf16 as bf16 and everything else as f32; the others round all
/// matrices to that type (kernels::DType says what 8 and 4 bits are).
enum class WeightFormat : uint8_t { kAuto, kBF16, kF32, kI8, kI4 };

/// "f32", "bf16", "int8" or "int4".
const char* DTypeName(kernels::DType dtype);

/// An owned matrix [rows, cols] of weights; rows are 64-byte aligned and padded to a multiple of 64
/// bytes with what stands for zero. Movable, not copyable. Read-only once built, so safe to share
/// between threads.
class Matrix {
 public:
  Matrix() = default;
  Matrix(size_t rows, size_t cols, kernels::DType dtype);

  kernels::TypedView view() const;
  /// The raw bytes of a row, for writing while it is built.
  void* MutableRow(size_t row);
  /// Rounds `values` [cols] to the matrix's type. Thread-safe for distinct rows.
  void SetRow(size_t row, const float* values);
  /// Of elements and scales.
  size_t bytes() const;
  size_t rows() const { return rows_; }
  size_t cols() const { return cols_; }
  kernels::DType dtype() const { return dtype_; }

 private:
  struct Free {
    void operator()(std::byte* p) const;
  };
  std::unique_ptr<std::byte[], Free> data_;
  std::vector<float> row_scales_;            // kI8
  std::vector<kernels::BF16> block_scales_;  // kI4
  size_t rows_ = 0;
  size_t cols_ = 0;
  size_t stride_ = 0;  // elements
  kernels::DType dtype_ = kernels::DType::kF32;
};

/// One layer. d hidden_size, F intermediate_size, H heads, G key/value heads, A head_dim, r
/// predictor dim.
struct LayerWeights {
  std::vector<float> input_norm;             // [d]
  std::vector<float> post_attention_norm;    // [d]
  std::vector<float> pre_feedforward_norm;   // [d]
  std::vector<float> post_feedforward_norm;  // [d]
  Matrix qkv_proj;   // [(H + 2G)·A, d]: the rows of q_proj, then k_proj, then v_proj
  Matrix o_proj;     // [d, H·A]
  Matrix gate_proj;  // Spark [F, r]; dense [F, d]
  Matrix up_proj;    // Spark [F, d − r]; dense [F, d]
  Matrix
      down_proj;  // Spark [F, d], transposed: an active neuron's weights are one row; dense [d, F]
};

/// A whole model. Immutable after loading; share it by std::shared_ptr<const ModelWeights>.
struct ModelWeights {
  ModelConfig config;
  Matrix embedding;               // [vocab, d], tied: also the output head
  std::vector<float> final_norm;  // [d]
  std::vector<LayerWeights> layers;
  kernels::DType dtype = kernels::DType::kBF16;  // of the matrices

  /// Bytes of all matrices.
  size_t bytes() const;
};

/// Loads a checkpoint folder (config.json, model.safetensors or shards with their index). Every
/// tensor's name, dtype, shape and bounds are checked, and every value must be finite. Errors name
/// the file and the tensor.
absl::StatusOr<std::shared_ptr<const ModelWeights>> LoadWeights(const std::string& folder,
                                                                WeightFormat format);

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_CHECKPOINT_WEIGHTS_H_
