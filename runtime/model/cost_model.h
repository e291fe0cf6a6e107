// What a step of a model costs: FLOPs and bytes of weights, done and skipped.

#ifndef FIRESTEEL_RUNTIME_MODEL_COST_MODEL_H_
#define FIRESTEEL_RUNTIME_MODEL_COST_MODEL_H_

#include <cstddef>
#include <span>

#include "kernels/tensor.h"
#include "runtime/checkpoint/model_config.h"
#include "runtime/checkpoint/weights.h"
#include "runtime/model/activity.h"

namespace firesteel {

/// Something and what sparsity saved of it.
struct Cost {
  double performed = 0;
  double skipped = 0;

  Cost& operator+=(const Cost& other) {
    performed += other.performed;
    skipped += other.skipped;
    return *this;
  }
};

/// FLOPs are those of the matrix products (two for each multiply-add; norms, activations and
/// softmax are left out). "Skipped" is what the same model would do beyond it with every neuron and
/// every visible position computed (spec: flops_skipped_fraction). Immutable; thread-safe.
class CostModel {
 public:
  /// `kv_dtype` is that of the KV cache. `sublinear_head_bytes`: of the 2-bit copy of the
  /// embedding, 0 without a sublinear head.
  CostModel(const ModelWeights& weights, kernels::DType kv_dtype, size_t sublinear_head_bytes = 0);

  /// FLOPs of one token in one layer.
  Cost LayerFlops(const RowActivity& row) const;
  /// FLOPs of the output head for one token. A screening multiplies as often as the full head, at
  /// 2 and 8 bits, so that it saves bytes and no FLOPs.
  double HeadFlops(const HeadActivity& head) const {
    return head_flops_ + (head.screened ? head_flops_per_row_ * head.exact : 0.0);
  }

  /// Bytes of weights that one layer reads in a step, each once, with those of so many neurons.
  Cost LayerBytes(size_t ffn_read) const;
  /// Bytes of the KV cache that one token reads in one layer: what is scored once a key/value head,
  /// what is attended once a query head in a Spark model (heads of a group seldom keep the same
  /// positions) and once a key/value head in a dense one (they keep all).
  double KvBytes(const RowActivity& row) const;
  /// Which of those bytes lie scattered, in a Spark model: the rows of active neurons, and what is
  /// read of kept positions. Memory gives them more slowly.
  double ScatteredBytes(size_t ffn_union) const {
    return spark_ ? bytes_per_neuron_ * static_cast<double>(ffn_union) : 0;
  }
  double ScatteredKvBytes(const RowActivity& row) const {
    return spark_ ? kv_bytes_per_attended_ * row.attended : 0;
  }
  /// Bytes that the output head reads in a step for the tokens that need logits: the embedding once
  /// where a token takes the full head; the 2-bit copy once, and for each token its exact rows,
  /// where tokens are screened. `skipped` is what a step with the full head would read beyond that.
  Cost HeadBytes(std::span<const HeadActivity> head) const;

 private:
  bool spark_;
  double neurons_;
  double heads_;
  double dense_flops_;         // of a token and layer, whatever is active
  double flops_per_neuron_;    // up_proj row and down_proj column
  double flops_per_visible_;   // of a head and position: the scores
  double flops_per_attended_;  // of a head and position: the rest
  double dense_bytes_;
  double bytes_per_neuron_;
  double kv_bytes_per_visible_;
  double kv_bytes_per_attended_;
  double head_flops_;
  double head_flops_per_row_;
  double head_bytes_;
  double head_bytes_per_row_;
  double sublinear_head_bytes_;
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_MODEL_COST_MODEL_H_
