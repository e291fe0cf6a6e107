#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
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
#include "runtime/checkpoint/weight_source.h"

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

/// What kAuto takes: bf16 only where every matrix is stored so.
DType StoredDType(const std::map<std::string, Shape>& expected, const TensorSource& source) {
  for (const auto& [name, shape] : expected) {
    const bool matrix = shape.size() == 2;
    if (matrix && source.tensors().at(name)->type != StoredType::kBF16) return DType::kF32;
  }
  return DType::kBF16;
}

/// Reads checked tensors into the layouts of the runtime.
class FolderSource final : public WeightSource {
 public:
  FolderSource(ModelConfig config, const WeightTypes& types, std::unique_ptr<TensorSource> tensors,
               size_t threads)
      : config_(std::move(config)),
        types_(types),
        tensors_(std::move(tensors)),
        threads_(threads) {}

  const ModelConfig& config() const override { return config_; }
  const WeightTypes& types() const override { return types_; }

  absl::StatusOr<std::vector<float>> ReadVector(const ModelPart& part) override {
    const std::string name = StoredNames(part)[0];
    const StoredTensor& tensor = *tensors_->tensors().at(name);
    std::vector<float> out(tensor.shape[0]);
    absl::Status status = Row(name, tensor, 0, out.size(), DType::kF32, out.data());
    if (!status.ok()) return status;
    return out;
  }

  absl::StatusOr<Matrix> ReadMatrix(const ModelPart& part) override {
    // Spark's down_proj is stored [d, F].
    if (part.kind == PartKind::kDownProj && config_.spark()) return Transposed(part);
    return Stacked(part);
  }

 private:
  /// The tensors of a checkpoint that a part consists of, one below the other.
  static std::vector<std::string> StoredNames(const ModelPart& part) {
    const auto layer = [&part](absl::string_view name) { return LayerTensor(part.layer, name); };
    switch (part.kind) {
      case PartKind::kEmbedding:
        return {kEmbedding};
      case PartKind::kFinalNorm:
        return {kFinalNorm};
      case PartKind::kInputNorm:
        return {layer("input_layernorm")};
      case PartKind::kPostAttentionNorm:
        return {layer("post_attention_layernorm")};
      case PartKind::kPreFeedforwardNorm:
        return {layer("pre_feedforward_layernorm")};
      case PartKind::kPostFeedforwardNorm:
        return {layer("post_feedforward_layernorm")};
      case PartKind::kQkvProj:
        return {layer("self_attn.q_proj"), layer("self_attn.k_proj"), layer("self_attn.v_proj")};
      case PartKind::kOProj:
        return {layer("self_attn.o_proj")};
      case PartKind::kGateProj:
        return {layer("mlp.gate_proj")};
      case PartKind::kUpProj:
        return {layer("mlp.up_proj")};
      case PartKind::kDownProj:
        return {layer("mlp.down_proj")};
    }
    return {};
  }

  absl::StatusOr<Matrix> Stacked(const ModelPart& part) const {
    const DType dtype = types_[part.role(config_.spark())];
    Matrix out(part.rows, part.cols, dtype);
    size_t above = 0;
    for (const std::string& name : StoredNames(part)) {
      const StoredTensor& tensor = *tensors_->tensors().at(name);
      absl::Status status = ForEachShare(tensor.shape[0], threads_, [&](size_t begin, size_t end) {
        std::vector<float> row(kernels::IsQuantized(dtype) ? part.cols : 0);
        for (size_t r = begin; r < end; ++r) {
          const bool quantized = !row.empty();
          void* const target = quantized ? row.data() : out.MutableRow(above + r);
          absl::Status read =
              Row(name, tensor, r, part.cols, quantized ? DType::kF32 : dtype, target);
          if (!read.ok()) return read;
          if (quantized) out.SetRow(above + r, row.data());
        }
        return absl::OkStatus();
      });
      if (!status.ok()) return status;
      above += tensor.shape[0];
    }
    return out;
  }

  /// Stored [cols, rows].
  absl::StatusOr<Matrix> Transposed(const ModelPart& part) const {
    const DType dtype = types_[part.role(config_.spark())];
    const bool quantized = kernels::IsQuantized(dtype);
    Matrix out(part.rows, part.cols, quantized ? DType::kF32 : dtype);
    const std::string name = StoredNames(part)[0];
    absl::Status status = out.dtype() == DType::kF32 ? TransposeInto<float>(name, &out)
                                                     : TransposeInto<kernels::BF16>(name, &out);
    if (!status.ok()) return status;
    if (!quantized) return out;
    Matrix rounded(part.rows, part.cols, dtype);
    status = ForEachShare(part.rows, threads_, [&](size_t begin, size_t end) {
      for (size_t r = begin; r < end; ++r) rounded.SetRow(r, out.view().Row<float>(r));
      return absl::OkStatus();
    });
    if (!status.ok()) return status;
    return rounded;
  }

  /// One row of a tensor, converted.
  static absl::Status Row(const std::string& name, const StoredTensor& tensor, size_t row,
                          size_t cols, DType dtype, void* out) {
    const std::byte* const stored = tensor.data + row * cols * StoredBytes(tensor.type);
    if (ConvertElements(tensor.type, stored, cols, dtype, out)) return absl::OkStatus();
    const size_t index = FirstNotFinite(dtype, out, cols);
    return TensorError(tensor, name,
                       absl::StrCat("the value at index ", row * cols + index,
                                    dtype == DType::kBF16 && tensor.type != StoredType::kBF16
                                        ? " is not finite or past bf16's range"
                                        : " is not finite"));
  }

  /// In strips of rows as wide as a cache line of the output: each line is written once, whole.
  template <typename T>
  absl::Status TransposeInto(const std::string& name, Matrix* out) const {
    const StoredTensor& tensor = *tensors_->tensors().at(name);
    const size_t rows = tensor.shape[0], cols = tensor.shape[1];
    constexpr size_t kStrip = kernels::kAlignment / sizeof(T);
    const size_t strips = (rows + kStrip - 1) / kStrip;
    return ForEachShare(strips, threads_, [&](size_t begin, size_t end) {
      std::vector<T> strip(kStrip * cols);  // [strip rows, cols]
      for (size_t s = begin; s < end; ++s) {
        const size_t first = s * kStrip;
        const size_t count = std::min(kStrip, rows - first);
        for (size_t r = 0; r < count; ++r) {
          absl::Status status =
              Row(name, tensor, first + r, cols, out->dtype(), strip.data() + r * cols);
          if (!status.ok()) return status;
        }
        for (size_t c = 0; c < cols; ++c) {
          T* const target = static_cast<T*>(out->MutableRow(c)) + first;
          for (size_t r = 0; r < count; ++r) target[r] = strip[r * cols + c];
        }
      }
      return absl::OkStatus();
    });
  }

  const ModelConfig config_;
  const WeightTypes types_;
  const std::unique_ptr<TensorSource> tensors_;
  const size_t threads_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<WeightSource>> OpenFolderSource(const std::string& folder,
                                                               WeightFormat format,
                                                               size_t threads) {
  absl::StatusOr<ModelConfig> config = LoadModelConfig(folder);
  if (!config.ok()) return config.status();
  absl::StatusOr<std::unique_ptr<TensorSource>> tensors = TensorSource::Open(folder);
  if (!tensors.ok()) return tensors.status();
  const std::map<std::string, Shape> expected = ExpectedTensors(*config);
  if (absl::Status status = CheckTensors(expected, **tensors); !status.ok()) return status;
  const WeightTypes types = format.TypesOf(config->spark(), StoredDType(expected, **tensors));
  if (absl::Status status = CheckWidths(*config, types); !status.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(folder, ": ", status.message()));
  }
  return std::make_unique<FolderSource>(*std::move(config), types, *std::move(tensors), threads);
}

}  // namespace firesteel
