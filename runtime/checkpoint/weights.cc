#include "runtime/checkpoint/weights.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "runtime/checkpoint/convert.h"
#include "runtime/checkpoint/files.h"
#include "runtime/checkpoint/tensor_source.h"

namespace firesteel {
namespace {

using kernels::DType;
using Shape = std::vector<size_t>;

constexpr char kEmbedding[] = "model.embed_tokens.weight";
constexpr char kFinalNorm[] = "model.norm.weight";
constexpr char kOutputHead[] = "lm_head.weight";

std::string LayerTensor(size_t layer, absl::string_view part) {
  return absl::StrCat("model.layers.", layer, ".", part, ".weight");
}

/// Name and shape of every tensor that a model of this shape has.
std::map<std::string, Shape> ExpectedTensors(const ModelConfig& c) {
  const size_t d = c.hidden_size, f = c.intermediate_size;
  const size_t queries = c.num_heads * c.head_dim, keys = c.num_kv_heads * c.head_dim;
  const size_t gate_in = c.spark() ? c.ffn_predictor_dim : d;
  const size_t up_in = c.spark() ? d - c.ffn_predictor_dim : d;
  std::map<std::string, Shape> shapes;
  shapes[kEmbedding] = {c.vocab_size, d};
  shapes[kFinalNorm] = {d};
  for (size_t i = 0; i < c.num_layers; ++i) {
    shapes[LayerTensor(i, "input_layernorm")] = {d};
    shapes[LayerTensor(i, "post_attention_layernorm")] = {d};
    shapes[LayerTensor(i, "pre_feedforward_layernorm")] = {d};
    shapes[LayerTensor(i, "post_feedforward_layernorm")] = {d};
    shapes[LayerTensor(i, "self_attn.q_proj")] = {queries, d};
    shapes[LayerTensor(i, "self_attn.k_proj")] = {keys, d};
    shapes[LayerTensor(i, "self_attn.v_proj")] = {keys, d};
    shapes[LayerTensor(i, "self_attn.o_proj")] = {d, queries};
    shapes[LayerTensor(i, "mlp.gate_proj")] = {f, gate_in};
    shapes[LayerTensor(i, "mlp.up_proj")] = {f, up_in};
    shapes[LayerTensor(i, "mlp.down_proj")] = {d, f};
  }
  return shapes;
}

absl::Status TensorError(const StoredTensor& tensor, absl::string_view name,
                         absl::string_view what) {
  return absl::InvalidArgumentError(
      absl::StrCat(*tensor.path, ": tensor \"", Printable(name), "\": ", what));
}

/// A tensor that no part of the model reads is refused, since it hints at a config.json of another
/// model. Two kinds are harmless: a copy of the tied embedding, and RoPE's frequencies, which
/// follow from rope_theta.
absl::Status CheckUnexpected(const std::string& name, const StoredTensor& tensor,
                             const StoredTensor& embedding) {
  if (absl::EndsWith(name, ".rotary_emb.inv_freq")) return absl::OkStatus();
  if (name != kOutputHead) {
    return TensorError(tensor, name, "a model of this config.json has no such tensor");
  }
  if (tensor.type != embedding.type || tensor.shape != embedding.shape ||
      std::memcmp(tensor.data, embedding.data, tensor.bytes) != 0) {
    return TensorError(tensor, name,
                       "it differs from the embedding, and only tied embeddings are supported");
  }
  return absl::OkStatus();
}

/// Presence, shape and dtype of all tensors, before anything is allocated: so memory asked for is
/// in proportion to the files.
absl::Status CheckTensors(const std::map<std::string, Shape>& expected,
                          const TensorSource& source) {
  for (const auto& [name, shape] : expected) {
    const auto it = source.tensors().find(name);
    if (it == source.tensors().end()) {
      return absl::InvalidArgumentError(
          absl::StrCat(source.path(), ": tensor \"", name, "\" is missing"));
    }
    const StoredTensor& tensor = *it->second;
    if (tensor.shape != shape) {
      return TensorError(tensor, name,
                         absl::StrCat("its shape is [", absl::StrJoin(tensor.shape, ", "),
                                      "], config.json needs [", absl::StrJoin(shape, ", "), "]"));
    }
    if (tensor.type == StoredType::kOther) {
      return TensorError(tensor, name,
                         absl::StrCat("dtype ", tensor.type_name, " is not BF16, F16 or F32"));
    }
  }
  const StoredTensor& embedding = *source.tensors().at(kEmbedding);
  for (const auto& [name, tensor] : source.tensors()) {
    if (expected.count(name) > 0) continue;
    if (absl::Status s = CheckUnexpected(name, *tensor, embedding); !s.ok()) return s;
  }
  return absl::OkStatus();
}

/// All matrices share one element type; kAuto is bf16 only where every matrix is stored so.
DType ChooseDType(WeightFormat format, const std::map<std::string, Shape>& expected,
                  const TensorSource& source) {
  switch (format) {
    case WeightFormat::kBF16:
      return DType::kBF16;
    case WeightFormat::kF32:
      return DType::kF32;
    case WeightFormat::kI8:
      return DType::kI8;
    case WeightFormat::kI4:
      return DType::kI4;
    case WeightFormat::kAuto:
      break;
  }
  for (const auto& [name, shape] : expected) {
    const bool matrix = shape.size() == 2;
    if (matrix && source.tensors().at(name)->type != StoredType::kBF16) return DType::kF32;
  }
  return DType::kBF16;
}

/// Copies checked tensors into the layouts of the runtime. Like JsonFields, it keeps the first
/// error.
class Copier {
 public:
  Copier(const TensorSource& source, DType dtype) : source_(source), dtype_(dtype) {}

  /// A vector as f32.
  std::vector<float> Vector(const std::string& name) {
    const StoredTensor& tensor = *source_.tensors().at(name);
    std::vector<float> out(tensor.shape[0]);
    Row(name, tensor, 0, out.size(), DType::kF32, out.data());
    return out;
  }

  /// Matrices of equal width, one below the other.
  Matrix Stacked(const std::vector<std::string>& names) {
    size_t rows = 0;
    for (const std::string& name : names) rows += source_.tensors().at(name)->shape[0];
    const size_t cols = source_.tensors().at(names[0])->shape[1];
    Matrix out(rows, cols, dtype_);
    size_t next = 0;
    for (const std::string& name : names) {
      const StoredTensor& tensor = *source_.tensors().at(name);
      for (size_t r = 0; r < tensor.shape[0] && status_.ok(); ++r, ++next) {
        if (kernels::IsQuantized(dtype_)) {
          row_.resize(cols);
          Row(name, tensor, r, cols, DType::kF32, row_.data());
          out.SetRow(next, row_.data());
        } else {
          Row(name, tensor, r, cols, dtype_, out.MutableRow(next));
        }
      }
    }
    return out;
  }

  /// Stored [rows, cols], returned [cols, rows].
  Matrix Transposed(const std::string& name) {
    const Shape& shape = source_.tensors().at(name)->shape;
    const bool quantized = kernels::IsQuantized(dtype_);
    Matrix out(shape[1], shape[0], quantized ? DType::kF32 : dtype_);
    if (out.dtype() == DType::kF32) {
      TransposeInto<float>(name, &out);
    } else {
      TransposeInto<kernels::BF16>(name, &out);
    }
    if (!quantized) return out;
    Matrix rounded(out.rows(), out.cols(), dtype_);
    for (size_t r = 0; r < out.rows(); ++r) rounded.SetRow(r, out.view().Row<float>(r));
    return rounded;
  }

  const absl::Status& status() const { return status_; }

 private:
  /// One row of a tensor, converted.
  void Row(const std::string& name, const StoredTensor& tensor, size_t row, size_t cols,
           DType dtype, void* out) {
    if (!status_.ok()) return;
    const std::byte* const stored = tensor.data + row * cols * StoredBytes(tensor.type);
    if (ConvertElements(tensor.type, stored, cols, dtype, out)) return;
    const size_t index = FirstNotFinite(dtype, out, cols);
    status_ = TensorError(tensor, name,
                          absl::StrCat("the value at index ", row * cols + index,
                                       dtype == DType::kBF16 && tensor.type != StoredType::kBF16
                                           ? " is not finite or past bf16's range"
                                           : " is not finite"));
  }

  /// In strips of rows as wide as a cache line of the output: each line is written once, whole.
  template <typename T>
  void TransposeInto(const std::string& name, Matrix* out) {
    const StoredTensor& tensor = *source_.tensors().at(name);
    const size_t rows = tensor.shape[0], cols = tensor.shape[1];
    constexpr size_t kStrip = kernels::kAlignment / sizeof(T);
    std::vector<T> strip(kStrip * cols);  // [strip rows, cols]
    for (size_t first = 0; first < rows && status_.ok(); first += kStrip) {
      const size_t count = std::min(kStrip, rows - first);
      for (size_t r = 0; r < count; ++r) {
        Row(name, tensor, first + r, cols, out->dtype(), strip.data() + r * cols);
      }
      for (size_t c = 0; c < cols; ++c) {
        T* const target = static_cast<T*>(out->MutableRow(c)) + first;
        for (size_t r = 0; r < count; ++r) target[r] = strip[r * cols + c];
      }
    }
  }

  const TensorSource& source_;
  const DType dtype_;
  std::vector<float> row_;  // on its way to fewer bits
  absl::Status status_;
};

LayerWeights CopyLayer(const ModelConfig& config, size_t i, Copier* copier) {
  LayerWeights layer;
  layer.input_norm = copier->Vector(LayerTensor(i, "input_layernorm"));
  layer.post_attention_norm = copier->Vector(LayerTensor(i, "post_attention_layernorm"));
  layer.pre_feedforward_norm = copier->Vector(LayerTensor(i, "pre_feedforward_layernorm"));
  layer.post_feedforward_norm = copier->Vector(LayerTensor(i, "post_feedforward_layernorm"));
  layer.qkv_proj =
      copier->Stacked({LayerTensor(i, "self_attn.q_proj"), LayerTensor(i, "self_attn.k_proj"),
                       LayerTensor(i, "self_attn.v_proj")});
  layer.o_proj = copier->Stacked({LayerTensor(i, "self_attn.o_proj")});
  layer.gate_proj = copier->Stacked({LayerTensor(i, "mlp.gate_proj")});
  layer.up_proj = copier->Stacked({LayerTensor(i, "mlp.up_proj")});
  const std::string down = LayerTensor(i, "mlp.down_proj");
  layer.down_proj = config.spark() ? copier->Transposed(down) : copier->Stacked({down});
  return layer;
}

absl::StatusOr<std::shared_ptr<const ModelWeights>> Load(const std::string& folder,
                                                         WeightFormat format) {
  absl::StatusOr<ModelConfig> config = LoadModelConfig(folder);
  if (!config.ok()) return config.status();
  absl::StatusOr<std::unique_ptr<TensorSource>> source = TensorSource::Open(folder);
  if (!source.ok()) return source.status();
  const std::map<std::string, Shape> expected = ExpectedTensors(*config);
  if (absl::Status status = CheckTensors(expected, **source); !status.ok()) return status;

  auto weights = std::make_shared<ModelWeights>();
  weights->dtype = ChooseDType(format, expected, **source);
  weights->config = *std::move(config);
  Copier copier(**source, weights->dtype);
  weights->embedding = copier.Stacked({kEmbedding});
  weights->final_norm = copier.Vector(kFinalNorm);
  for (size_t i = 0; i < weights->config.num_layers && copier.status().ok(); ++i) {
    weights->layers.push_back(CopyLayer(weights->config, i, &copier));
  }
  if (!copier.status().ok()) return copier.status();
  return weights;
}

}  // namespace

size_t ModelWeights::bytes() const {
  size_t total = embedding.bytes();
  for (const LayerWeights& layer : layers) {
    total += layer.qkv_proj.bytes() + layer.o_proj.bytes() + layer.gate_proj.bytes() +
             layer.up_proj.bytes() + layer.down_proj.bytes();
  }
  return total;
}

absl::StatusOr<std::shared_ptr<const ModelWeights>> LoadWeights(const std::string& folder,
                                                                WeightFormat format) {
  try {
    return Load(folder, format);
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError(absl::StrCat(folder, ": not enough memory to load it"));
  }
}

}  // namespace firesteel
