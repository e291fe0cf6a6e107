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
#include "runtime/checkpoint/weight_format.h"

namespace firesteel {

/// Where the weights of a packed file are: kCopy in memory of our own, backed by huge pages where
/// the system has them; kShared in the file itself, mapped read-only, so that all processes of a
/// machine that serve it share one copy in the page cache.
enum class WeightMemory : uint8_t { kCopy, kShared };

/// A matrix [rows, cols] of weights; rows are 64-byte aligned and padded to a multiple of 64 bytes
/// with what stands for zero. It owns its memory, or keeps alive whoever does. Movable, not
/// copyable. Read-only once built, so safe to share between threads.
class Matrix {
 public:
  /// Whether new memory is filled with zeros; kNone is for who writes every byte of DataBytes().
  enum class Fill : uint8_t { kZeros, kNone };

  Matrix() = default;
  Matrix(size_t rows, size_t cols, kernels::DType dtype, Fill fill = Fill::kZeros);
  /// A matrix in memory that `owner` keeps valid and unchanged. view.stride is StrideOf(view.cols,
  /// view.dtype). Such a matrix can't be written.
  Matrix(const kernels::TypedView& view, std::shared_ptr<const void> owner);

  /// Elements from one row of a matrix to the next: `cols` padded to 64 bytes.
  static size_t StrideOf(size_t cols, kernels::DType dtype);

  kernels::TypedView view() const;
  /// The raw bytes of a row, for writing while it is built.
  void* MutableRow(size_t row);
  /// Rounds `values` [cols] to the matrix's type. Thread-safe for distinct rows.
  void SetRow(size_t row, const float* values);
  /// All scales, for writing while it is built: kI8 one float a row, kI4 one BF16 a block, else
  /// null.
  void* MutableScales();
  /// Of elements, padding included, and scales.
  size_t bytes() const { return DataBytes() + ScaleBytes(); }
  size_t DataBytes() const;
  size_t ScaleBytes() const;
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
  // Instead of the three above where the memory is somebody else's.
  kernels::TypedView borrowed_;
  std::shared_ptr<const void> owner_;
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
  WeightTypes types = kernels::DType::kBF16;  // of the matrices

  /// Bytes of all matrices.
  size_t bytes() const;
  /// What --weights calls such types.
  std::string FormatName() const { return WeightFormat::NameOf(types, config.spark()); }
};

/// Loads a checkpoint folder (config.json, model.safetensors or shards with their index) or a
/// packed file (packed_file.h). Of a folder, every tensor's name, dtype, shape and bounds are
/// checked, and every value must be finite. Of a packed file, `format` must be kAuto or what the
/// file holds; its header and table are always checked, its weights' checksums and values where
/// they are copied. `memory` is for packed files; a folder's weights are always copied. Work is
/// shared by `threads` threads. Errors name the file and the tensor.
absl::StatusOr<std::shared_ptr<const ModelWeights>> LoadWeights(
    const std::string& path, WeightFormat format, WeightMemory memory = WeightMemory::kCopy,
    size_t threads = 1);

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_CHECKPOINT_WEIGHTS_H_
