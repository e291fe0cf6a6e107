#include "runtime/model/cost_model.h"

#include <algorithm>

namespace firesteel {

CostModel::CostModel(const ModelWeights& weights, kernels::DType kv_dtype,
                     size_t sublinear_head_bytes) {
  const ModelConfig& c = weights.config;
  const double d = static_cast<double>(c.hidden_size);
  const LayerWeights& layer = weights.layers[0];
  spark_ = c.spark();
  neurons_ = static_cast<double>(c.intermediate_size);
  heads_ = static_cast<double>(c.num_heads);

  const double gate_in = spark_ ? static_cast<double>(c.ffn_predictor_dim) : d;
  const double up_in = spark_ ? d - gate_in : d;
  const double head_dim = static_cast<double>(c.head_dim);
  const double scored = spark_ ? static_cast<double>(c.attention_predictor_dim) : head_dim;
  const double projections =
      d * head_dim * (2 * heads_ + 2 * static_cast<double>(c.num_kv_heads));  // q, o, k, v

  const double dense_parameters = projections + neurons_ * gate_in;
  dense_flops_ = 2 * dense_parameters;
  dense_bytes_ =
      static_cast<double>(layer.qkv_proj.bytes() + layer.o_proj.bytes() + layer.gate_proj.bytes());
  flops_per_neuron_ = 2 * (up_in + d);
  bytes_per_neuron_ =
      static_cast<double>(layer.up_proj.bytes() + layer.down_proj.bytes()) / neurons_;
  flops_per_visible_ = 2 * scored;
  flops_per_attended_ = 2 * (head_dim - scored + head_dim);  // rest of the key, value
  const double kv_element = static_cast<double>(kernels::BytesOf(kv_dtype, 1));
  const double kv_heads = static_cast<double>(c.num_kv_heads);
  kv_bytes_per_visible_ = kv_element * scored * kv_heads;
  kv_bytes_per_attended_ =
      kv_element * (head_dim - scored + head_dim) * (spark_ ? 1 : kv_heads / heads_);
  head_flops_per_row_ = 2 * d;
  head_flops_ = head_flops_per_row_ * static_cast<double>(c.vocab_size);
  head_bytes_ = static_cast<double>(weights.embedding.bytes());
  head_bytes_per_row_ = head_bytes_ / static_cast<double>(c.vocab_size);
  sublinear_head_bytes_ = static_cast<double>(sublinear_head_bytes);
}

Cost CostModel::LayerFlops(const RowActivity& row) const {
  const double visible = heads_ * row.visible;
  return {.performed = dense_flops_ + flops_per_neuron_ * row.ffn_active +
                       flops_per_visible_ * visible + flops_per_attended_ * row.attended,
          .skipped = flops_per_neuron_ * (neurons_ - row.ffn_active) +
                     flops_per_attended_ * (visible - row.attended)};
}

Cost CostModel::LayerBytes(size_t ffn_read) const {
  const double read = static_cast<double>(ffn_read);
  return {.performed = dense_bytes_ + bytes_per_neuron_ * read,
          .skipped = bytes_per_neuron_ * (neurons_ - read)};
}

Cost CostModel::HeadBytes(std::span<const HeadActivity> head) const {
  if (head.empty()) return {};
  bool full = false, screened = false;
  double exact = 0;
  for (const HeadActivity& row : head) {
    (row.screened ? screened : full) = true;
    exact += row.exact;
  }
  const double performed = (full ? head_bytes_ : 0.0) + (screened ? sublinear_head_bytes_ : 0.0) +
                           exact * head_bytes_per_row_;
  return {.performed = performed, .skipped = std::max(0.0, head_bytes_ - performed)};
}

double CostModel::KvBytes(const RowActivity& row) const {
  return kv_bytes_per_visible_ * row.visible + kv_bytes_per_attended_ * row.attended;
}

}  // namespace firesteel
