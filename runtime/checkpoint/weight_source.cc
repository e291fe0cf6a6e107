#include "runtime/checkpoint/weight_source.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <system_error>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/quantized.h"

namespace firesteel {
namespace {

const char* KindName(PartKind kind) {
  switch (kind) {
    case PartKind::kEmbedding:
      return "embedding";
    case PartKind::kFinalNorm:
      return "final_norm";
    case PartKind::kInputNorm:
      return "input_norm";
    case PartKind::kPostAttentionNorm:
      return "post_attention_norm";
    case PartKind::kPreFeedforwardNorm:
      return "pre_feedforward_norm";
    case PartKind::kPostFeedforwardNorm:
      return "post_feedforward_norm";
    case PartKind::kQkvProj:
      return "qkv_proj";
    case PartKind::kOProj:
      return "o_proj";
    case PartKind::kGateProj:
      return "gate_proj";
    case PartKind::kUpProj:
      return "up_proj";
    case PartKind::kDownProj:
      return "down_proj";
  }
  return "";
}

/// Where a matrix belongs.
Matrix* MatrixOf(const ModelPart& part, ModelWeights* weights) {
  if (part.kind == PartKind::kEmbedding) return &weights->embedding;
  LayerWeights& layer = weights->layers[part.layer];
  switch (part.kind) {
    case PartKind::kQkvProj:
      return &layer.qkv_proj;
    case PartKind::kOProj:
      return &layer.o_proj;
    case PartKind::kGateProj:
      return &layer.gate_proj;
    case PartKind::kUpProj:
      return &layer.up_proj;
    default:
      return &layer.down_proj;
  }
}

/// Where a vector belongs.
std::vector<float>* VectorOf(const ModelPart& part, ModelWeights* weights) {
  if (part.kind == PartKind::kFinalNorm) return &weights->final_norm;
  LayerWeights& layer = weights->layers[part.layer];
  switch (part.kind) {
    case PartKind::kInputNorm:
      return &layer.input_norm;
    case PartKind::kPostAttentionNorm:
      return &layer.post_attention_norm;
    case PartKind::kPreFeedforwardNorm:
      return &layer.pre_feedforward_norm;
    default:
      return &layer.post_feedforward_norm;
  }
}

absl::Status ReadPart(WeightSource* source, const ModelPart& part, ModelWeights* weights) {
  if (part.matrix()) {
    absl::StatusOr<Matrix> matrix = source->ReadMatrix(part);
    if (!matrix.ok()) return matrix.status();
    *MatrixOf(part, weights) = *std::move(matrix);
  } else {
    absl::StatusOr<std::vector<float>> vector = source->ReadVector(part);
    if (!vector.ok()) return vector.status();
    *VectorOf(part, weights) = *std::move(vector);
  }
  return absl::OkStatus();
}

}  // namespace

bool ModelPart::matrix() const {
  return kind == PartKind::kEmbedding || kind >= PartKind::kQkvProj;
}

std::vector<ModelPart> ModelParts(const ModelConfig& c) {
  const size_t d = c.hidden_size, f = c.intermediate_size;
  const size_t queries = c.num_heads * c.head_dim, keys = c.num_kv_heads * c.head_dim;
  const size_t gate_in = c.spark() ? c.ffn_predictor_dim : d;
  const size_t up_in = c.spark() ? d - c.ffn_predictor_dim : d;
  std::vector<ModelPart> parts;
  parts.push_back({PartKind::kEmbedding, 0, KindName(PartKind::kEmbedding), c.vocab_size, d});
  parts.push_back({PartKind::kFinalNorm, 0, KindName(PartKind::kFinalNorm), 1, d});
  for (size_t i = 0; i < c.num_layers; ++i) {
    const auto add = [&parts, i](PartKind kind, size_t rows, size_t cols) {
      parts.push_back({kind, i, absl::StrCat("layers.", i, ".", KindName(kind)), rows, cols});
    };
    add(PartKind::kInputNorm, 1, d);
    add(PartKind::kPostAttentionNorm, 1, d);
    add(PartKind::kPreFeedforwardNorm, 1, d);
    add(PartKind::kPostFeedforwardNorm, 1, d);
    add(PartKind::kQkvProj, queries + 2 * keys, d);
    add(PartKind::kOProj, d, queries);
    add(PartKind::kGateProj, f, gate_in);
    add(PartKind::kUpProj, f, up_in);
    add(PartKind::kDownProj, c.spark() ? f : d, c.spark() ? d : f);
  }
  return parts;
}

WeightRole ModelPart::role(bool spark) const {
  switch (kind) {
    case PartKind::kEmbedding:
      return WeightRole::kHead;
    case PartKind::kGateProj:
      return spark ? WeightRole::kPredictor : WeightRole::kFfn;
    case PartKind::kUpProj:
    case PartKind::kDownProj:
      return WeightRole::kFfn;
    default:
      return WeightRole::kAttention;
  }
}

absl::Status CheckWidths(const ModelConfig& config, const WeightTypes& types) {
  if (!types.quantized()) return absl::OkStatus();
  for (const ModelPart& part : ModelParts(config)) {
    if (!part.matrix() || part.cols <= kernels::kMaxQuantizedCols) continue;
    return absl::InvalidArgumentError(absl::StrCat(
        "tensor \"", part.name, "\": its rows have ", part.cols, " elements, the limit of ",
        DTypeName(types[part.role(config.spark())]), " weights is ", kernels::kMaxQuantizedCols));
  }
  return absl::OkStatus();
}

absl::Status ForEachShare(size_t n, size_t threads,
                          const std::function<absl::Status(size_t begin, size_t end)>& work) {
  const size_t shares = std::max<size_t>(1, std::min(n, threads));
  std::vector<absl::Status> statuses(shares);
  const auto run = [&](size_t share) {
    try {
      statuses[share] = work(n * share / shares, n * (share + 1) / shares);
    } catch (const std::bad_alloc&) {
      statuses[share] = absl::ResourceExhaustedError("not enough memory");
    }
  };
  std::vector<std::thread> helpers;
  for (size_t share = 1; share < shares; ++share) {
    try {
      helpers.emplace_back(run, share);
    } catch (const std::system_error&) {
      run(share);  // the system gives no more threads
    }
  }
  run(0);
  for (std::thread& helper : helpers) helper.join();
  for (absl::Status& status : statuses) {
    if (!status.ok()) return std::move(status);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<ModelWeights>> AssembleWeights(WeightSource* source,
                                                              size_t threads) {
  auto weights = std::make_shared<ModelWeights>();
  weights->config = source->config();
  weights->types = source->types();
  weights->layers.resize(source->config().num_layers);
  const std::vector<ModelPart> parts = ModelParts(source->config());
  // Parts differ in size by a factor of a thousand: each thread takes the next one when it is free.
  const size_t readers = source->concurrent() ? std::max<size_t>(1, threads) : 1;
  std::atomic<size_t> next = 0;
  std::atomic<bool> failed = false;
  const absl::Status status = ForEachShare(readers, readers, [&](size_t, size_t) {
    for (size_t i = next++; i < parts.size() && !failed; i = next++) {
      absl::Status read = ReadPart(source, parts[i], weights.get());
      if (!read.ok()) {
        failed = true;
        return read;
      }
    }
    return absl::OkStatus();
  });
  if (!status.ok()) return status;
  return weights;
}

}  // namespace firesteel
