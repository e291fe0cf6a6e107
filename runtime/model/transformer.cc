#include "runtime/model/transformer.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <utility>

#include "kernels/attention.h"
#include "kernels/elementwise.h"
#include "kernels/matmul.h"
#include "kernels/sparse_ffn.h"
#include "kernels/statistical_topk.h"

namespace firesteel {
namespace {

using kernels::DType;
using kernels::MatView;
using kernels::TypedView;

// Shares of a matrix's rows or columns are cut at these, so that no two workers write one cache
// line.
constexpr size_t kRowGrain = 16;
constexpr size_t kColumnGrain = 32;

float* RowOf(Matrix& matrix, size_t row) { return static_cast<float*>(matrix.MutableRow(row)); }

MatView Writable(Matrix& matrix, size_t rows) {
  const TypedView view = matrix.view();
  return {RowOf(matrix, 0), rows, view.cols, view.stride};
}

}  // namespace

struct Transformer::WorkerScratch {
  Matrix attention;              // [1, AttentionScratchFloats(heads of a KV head, context)]
  std::vector<uint32_t> kept;    // [heads of a KV head, context + slack]
  std::vector<size_t> num_kept;  // [heads of a KV head]
};

Transformer::Transformer(std::shared_ptr<const ModelWeights> weights, ComputeType compute,
                         DType kv_dtype, WorkerPool* pool, size_t max_rows, size_t max_logit_rows)
    : weights_(std::move(weights)),
      config_(weights_->config),
      compute_(compute),
      pool_(pool),
      max_rows_(max_rows),
      attention_(AttentionShapeOf(config_, kv_dtype)),
      predictor_rope_(attention_.predictor_dim, config_.max_position_embeddings,
                      config_.rope_theta),
      rest_rope_(attention_.spark() ? std::make_unique<RopeTable>(
                                          config_.head_dim - attention_.predictor_dim,
                                          config_.max_position_embeddings, config_.rope_theta)
                                    : nullptr) {
  const size_t d = config_.hidden_size;
  const size_t f = config_.intermediate_size;
  const size_t context = config_.max_position_embeddings;
  const size_t qkv = (config_.num_heads + 2 * config_.num_kv_heads) * config_.head_dim;

  rows_.reserve(max_rows);
  head_rows_.reserve(max_logit_rows);
  residual_ = Matrix(max_rows, d, DType::kF32);
  normed_ = MakeInput(max_rows, d);
  qkv_ = Matrix(max_rows, qkv, DType::kF32);
  attended_ = MakeInput(max_rows, config_.num_heads * config_.head_dim);
  projected_ = Matrix(max_rows, d, DType::kF32);
  gate_ = Matrix(max_rows, f, DType::kF32);
  up_ = Matrix(max_rows, f, DType::kF32);
  head_input_ = MakeInput(max_logit_rows, d);
  logits_ = Matrix(max_logit_rows, config_.vocab_size, DType::kF32);
  kept_.resize(max_rows * config_.num_heads);
  layer_activity_.resize(config_.num_layers);
  row_activity_.resize(config_.num_layers * max_rows);
  for (size_t i = 0; i < pool->num_threads(); ++i) {
    const size_t heads = config_.num_heads / config_.num_kv_heads;
    scratch_.push_back({Matrix(1, kernels::AttentionScratchFloats(heads, context), DType::kF32),
                        std::vector<uint32_t>(heads * (context + kernels::kCompactionSlack)),
                        std::vector<size_t>(heads)});
  }

  if (!config_.spark()) {
    hidden_ = MakeInput(max_rows, f);
    return;
  }
  excess_ = Matrix(max_rows, f + kernels::kCompactionSlack, DType::kF32);
  active_.resize(max_rows * (f + kernels::kCompactionSlack));
  num_active_.resize(max_rows);
  needed_.resize(f);
  const auto quantile = [](size_t k, size_t n) {
    return kernels::NormalQuantile(1.0 - static_cast<double>(k) / static_cast<double>(n));
  };
  ffn_quantile_ = quantile(config_.ffn_top_k, f);
  attention_quantiles_.resize(context + 1);
  for (size_t n = config_.attention_top_k + 1; n <= context; ++n) {
    attention_quantiles_[n] = quantile(config_.attention_top_k, n);
  }
}

Transformer::~Transformer() = default;

void Transformer::Forward(std::span<const SequenceSlice> batch, ActivityProbe* probe) {
  ListRows(batch);
  probe_ = probe;
  pool_->Run([this](Worker& worker) {
    Embed(worker);
    for (size_t layer = 0; layer < config_.num_layers; ++layer) {
      const LayerWeights& w = weights_->layers[layer];
      Project(worker, normed_, w.qkv_proj, qkv_);
      RotateAndStore(worker, layer);
      AttendRows(worker, layer);
      Project(worker, attended_, w.o_proj, projected_);
      AddNormed(worker, layer, w.post_attention_norm, w.pre_feedforward_norm);
      if (config_.spark()) {
        SparseFeedForward(worker, layer);
      } else {
        DenseFeedForward(worker, layer);
      }
      const bool last = layer + 1 == config_.num_layers;
      AddNormed(worker, layer, w.post_feedforward_norm,
                last ? weights_->final_norm : weights_->layers[layer + 1].input_norm);
    }
    OutputHead(worker);
  });
}

std::span<float> Transformer::logits(size_t i) { return {RowOf(logits_, i), config_.vocab_size}; }

void Transformer::ListRows(std::span<const SequenceSlice> batch) {
  rows_.clear();
  head_rows_.clear();
  for (const SequenceSlice& slice : batch) {
    for (size_t i = 0; i < slice.tokens.size(); ++i) {
      const bool last = i + 1 == slice.tokens.size();
      if (slice.logits == LogitRows::kAll || (slice.logits == LogitRows::kLast && last)) {
        head_rows_.push_back(rows_.size());
      }
      rows_.push_back({slice.tokens[i], slice.position + i, slice.kv_blocks.data()});
    }
  }
  for (size_t layer = 0; layer < config_.num_layers; ++layer) {
    const std::span<RowActivity> rows(&row_activity_[layer * rows_.size()], rows_.size());
    for (size_t row = 0; row < rows_.size(); ++row) {
      const size_t position = rows_[row].position;
      rows[row].visible = static_cast<uint32_t>(position + 1 - FirstVisible(layer, position));
      rows[row].ffn_active = static_cast<uint32_t>(config_.intermediate_size);
    }
    layer_activity_[layer] = {rows, static_cast<uint32_t>(config_.intermediate_size)};
  }
}

// residual = embedding[token] · sqrt(d); normed = input_norm(residual) of the first layer.
void Transformer::Embed(Worker& worker) {
  const float scale = static_cast<float>(std::sqrt(static_cast<double>(config_.hidden_size)));
  const TypedView table = weights_->embedding.view();
  const IndexRange share = worker.Share(rows_.size());
  for (size_t row = share.begin; row < share.end; ++row) {
    float* out = RowOf(residual_, row);
    const size_t token = static_cast<size_t>(rows_[row].token);
    for (size_t i = 0; i < table.cols; ++i) {
      const float value = table.dtype == DType::kBF16
                              ? kernels::ToF32(table.Row<kernels::BF16>(token)[i])
                              : table.Row<float>(token)[i];
      out[i] = value * scale;
    }
    NormRow(row, weights_->layers[0].input_norm);
  }
  worker.Barrier();
}

// output = input · weightᵀ, shared by the rows of the weight: each is read by one worker, once.
void Transformer::Project(Worker& worker, const DenseInput& input, const Matrix& weight,
                          Matrix& output) {
  const IndexRange share = worker.Share(weight.rows(), kRowGrain);
  kernels::MatMul(View(input, 0, rows_.size(), 0, weight.cols()), weight.view(), share.begin,
                  share.end, Writable(output, rows_.size()));
  worker.Barrier();
}

// RoPE on queries and keys, on the two parts of a Spark head each on its own; keys and values to
// the cache.
void Transformer::RotateAndStore(Worker& worker, size_t layer) {
  const size_t dim = config_.head_dim;
  const size_t heads = config_.num_heads;
  const size_t kv_heads = config_.num_kv_heads;
  const size_t tasks_per_row = heads + kv_heads;
  const IndexRange share = worker.Share(rows_.size() * tasks_per_row);
  for (size_t task = share.begin; task < share.end; ++task) {
    const Row& row = rows_[task / tasks_per_row];
    const size_t head = task % tasks_per_row;  // the queries' heads, then the keys'
    float* const qkv = RowOf(qkv_, task / tasks_per_row);
    float* const vector = qkv + head * dim;
    kernels::Rope(predictor_rope_.cosines(row.position), predictor_rope_.sines(row.position),
                  predictor_rope_.dim(), vector);
    if (rest_rope_ != nullptr) {
      kernels::Rope(rest_rope_->cosines(row.position), rest_rope_->sines(row.position),
                    rest_rope_->dim(), vector + predictor_rope_.dim());
    }
    if (head < heads) continue;
    const size_t kv_head = head - heads;
    std::byte* const block = row.blocks[row.position / kernels::kKvBlockTokens] +
                             (layer * kv_heads + kv_head) * attention_.BlockBytes();
    kernels::StoreKeyValue(attention_, vector, vector + kv_heads * dim,
                           row.position % kernels::kKvBlockTokens, block);
  }
  worker.Barrier();
}

// The query heads of a KV head go together, which reads its keys once, unless that leaves workers
// without any. Tasks are dealt like cards: later rows of a chunk see more positions and cost more.
void Transformer::AttendRows(Worker& worker, size_t layer) {
  const size_t heads = rows_.size() * config_.num_kv_heads >= worker.team_size()
                           ? config_.num_heads / config_.num_kv_heads
                           : 1;
  const size_t per_row = config_.num_heads / heads;
  const size_t tasks = rows_.size() * per_row;
  for (size_t task = worker.index(); task < tasks; task += worker.team_size()) {
    AttendHeads(worker, layer, task / per_row, task % per_row * heads, heads);
  }
  worker.Barrier();
}

// Heads [first_head, first_head + heads) of a row, all of the same KV head.
void Transformer::AttendHeads(Worker& worker, size_t layer, size_t row, size_t first_head,
                              size_t heads) {
  const Row& r = rows_[row];
  const size_t dim = config_.head_dim;
  const size_t kv_head = first_head * config_.num_kv_heads / config_.num_heads;
  const size_t begin = FirstVisible(layer, r.position);
  const size_t end = r.position + 1;
  const double quantile = config_.spark() ? attention_quantiles_[end - begin] : 0.0;
  WorkerScratch& scratch = scratch_[worker.index()];
  const size_t kept_stride = end - begin + kernels::kCompactionSlack;
  kernels::Attend(attention_, RowOf(qkv_, row) + first_head * dim, heads, r.blocks,
                  (layer * config_.num_kv_heads + kv_head) * attention_.BlockBytes(), begin, end,
                  quantile, RowOf(scratch.attention, 0),
                  RowOf(attended_.f32, row) + first_head * dim, scratch.num_kept.data(),
                  probe_ != nullptr ? scratch.kept.data() : nullptr, kept_stride);
  RoundRow(attended_, row, first_head * dim, (first_head + heads) * dim);
  for (size_t i = 0; i < heads; ++i) {
    const size_t kept = scratch.num_kept[i];
    kept_[row * config_.num_heads + first_head + i] = static_cast<uint32_t>(kept);
    if (probe_ == nullptr) continue;
    probe_->OnAttended(layer, row, first_head + i, {&scratch.kept[i * kept_stride], kept});
  }
}

// residual += norm(projected); normed = next_norm(residual).
void Transformer::AddNormed(Worker& worker, size_t layer, const std::vector<float>& norm,
                            const std::vector<float>& next_norm) {
  const IndexRange share = worker.Share(rows_.size());
  for (size_t row = share.begin; row < share.end; ++row) {
    CountAttended(layer, row);
    kernels::RmsNormAdd(RowOf(projected_, row), norm.data(),
                        static_cast<float>(config_.rms_norm_eps), config_.hidden_size,
                        RowOf(residual_, row));
    NormRow(row, next_norm);
  }
  worker.Barrier();
}

// Spark FFN (arXiv 2506.06644, section 3.1): predictor, statistical top-k, then only what is
// active.
void Transformer::SparseFeedForward(Worker& worker, size_t layer) {
  const LayerWeights& w = weights_->layers[layer];
  const size_t r = config_.ffn_predictor_dim;
  const size_t stride = config_.intermediate_size + kernels::kCompactionSlack;
  Project(worker, normed_, w.gate_proj, gate_);

  const IndexRange rows = worker.Share(rows_.size());
  for (size_t row = rows.begin; row < rows.end; ++row) SelectActive(layer, row);
  worker.Barrier();

  if (worker.index() == 0) CountUnion(layer);
  for (size_t row = 0; row < rows_.size(); ++row) {
    const IndexRange share = worker.Share(num_active_[row], kRowGrain);
    float* const excess = RowOf(excess_, row);
    float* const up = RowOf(up_, row);
    kernels::MaskedMatVec(View(normed_, row, 1, r, config_.hidden_size - r), w.up_proj.view(),
                          &active_[row * stride], share.begin, share.end, up);
    kernels::GeluMul(excess + share.begin, up + share.begin, share.end - share.begin,
                     excess + share.begin);
  }
  worker.Barrier();

  const IndexRange columns = worker.Share(config_.hidden_size, kColumnGrain);
  for (size_t row = 0; row < rows_.size(); ++row) {
    kernels::SparseVecMat(RowOf(excess_, row), &active_[row * stride], num_active_[row],
                          w.down_proj.view(), columns.begin, columns.end, RowOf(projected_, row));
  }
  worker.Barrier();
}

// a = soft threshold of the row's scores at ffn_top_k, compacted.
void Transformer::SelectActive(size_t layer, size_t row) {
  const size_t f = config_.intermediate_size;
  const float* scores = RowOf(gate_, row);
  uint32_t* active = &active_[row * (f + kernels::kCompactionSlack)];
  const double theta = kernels::StatisticalThreshold(scores, f, ffn_quantile_);
  const size_t count = kernels::CompactAbove(scores, f, theta, active, RowOf(excess_, row));
  num_active_[row] = static_cast<uint32_t>(count);
  row_activity_[layer * rows_.size() + row].ffn_active = static_cast<uint32_t>(count);
  if (probe_ != nullptr) probe_->OnFfnActive(layer, row, {active, count});
  if (rows_.size() == 1) return;  // the union is the row itself
  for (size_t j = 0; j < count; ++j) {
    std::atomic_ref<uint8_t>(needed_[active[j]]).store(1, std::memory_order_relaxed);
  }
}

// Neurons that any row needs; leaves `needed_` clear for the next layer.
void Transformer::CountUnion(size_t layer) {
  uint32_t count = 0;
  if (rows_.size() == 1) {
    count = num_active_[0];
  } else {
    for (uint8_t& needed : needed_) count += std::exchange(needed, 0);
  }
  layer_activity_[layer].ffn_union = count;
}

// down_proj · (gelu(gate_proj · x) ⊙ (up_proj · x)), every neuron.
void Transformer::DenseFeedForward(Worker& worker, size_t layer) {
  const LayerWeights& w = weights_->layers[layer];
  const TypedView input = View(normed_, 0, rows_.size(), 0, config_.hidden_size);
  const IndexRange share = worker.Share(config_.intermediate_size, kRowGrain);
  kernels::MatMul(input, w.gate_proj.view(), share.begin, share.end, Writable(gate_, rows_.size()));
  kernels::MatMul(input, w.up_proj.view(), share.begin, share.end, Writable(up_, rows_.size()));
  for (size_t row = 0; row < rows_.size(); ++row) {
    kernels::GeluMul(RowOf(gate_, row) + share.begin, RowOf(up_, row) + share.begin,
                     share.end - share.begin, RowOf(hidden_.f32, row) + share.begin);
    RoundRow(hidden_, row, share.begin, share.end);
  }
  worker.Barrier();
  Project(worker, hidden_, w.down_proj, projected_);
}

// logits = softcap(embedding · final_norm(x)) of the rows that want them.
void Transformer::OutputHead(Worker& worker) {
  const IndexRange wanted = worker.Share(head_rows_.size());
  for (size_t i = wanted.begin; i < wanted.end; ++i) {
    std::memcpy(RowOf(head_input_.f32, i), RowOf(normed_.f32, head_rows_[i]),
                config_.hidden_size * sizeof(float));
    RoundRow(head_input_, i, 0, config_.hidden_size);
  }
  worker.Barrier();
  const IndexRange share = worker.Share(config_.vocab_size, kRowGrain);
  kernels::MatMul(View(head_input_, 0, head_rows_.size(), 0, config_.hidden_size),
                  weights_->embedding.view(), share.begin, share.end,
                  Writable(logits_, head_rows_.size()));
  const float cap = static_cast<float>(config_.final_logit_softcapping);
  if (cap == 0.0f) return;
  for (size_t i = 0; i < head_rows_.size(); ++i) {
    float* const row = RowOf(logits_, i) + share.begin;
    kernels::ScaleSoftCap(row, 1.0f, cap, share.end - share.begin, row);
  }
}

void Transformer::NormRow(size_t row, const std::vector<float>& norm) {
  kernels::RmsNorm(RowOf(residual_, row), norm.data(), static_cast<float>(config_.rms_norm_eps),
                   config_.hidden_size, RowOf(normed_.f32, row));
  RoundRow(normed_, row, 0, config_.hidden_size);
}

void Transformer::CountAttended(size_t layer, size_t row) {
  uint32_t attended = 0;
  for (size_t h = 0; h < config_.num_heads; ++h) attended += kept_[row * config_.num_heads + h];
  row_activity_[layer * rows_.size() + row].attended = attended;
}

TypedView Transformer::View(const DenseInput& input, size_t first_row, size_t rows,
                            size_t first_col, size_t cols) const {
  TypedView view = compute_ == ComputeType::kBF16 ? input.bf16.view() : input.f32.view();
  const size_t offset = (first_row * view.stride + first_col) * kernels::SizeOf(view.dtype);
  view.data = static_cast<const std::byte*>(view.data) + offset;
  view.rows = rows;
  view.cols = cols;
  return view;
}

Transformer::DenseInput Transformer::MakeInput(size_t rows, size_t cols) const {
  DenseInput input{Matrix(rows, cols, DType::kF32), Matrix()};
  if (compute_ == ComputeType::kBF16) input.bf16 = Matrix(rows, cols, DType::kBF16);
  return input;
}

void Transformer::RoundRow(DenseInput& input, size_t row, size_t begin, size_t end) const {
  if (compute_ != ComputeType::kBF16) return;
  kernels::RoundToBF16(RowOf(input.f32, row) + begin, end - begin,
                       static_cast<kernels::BF16*>(input.bf16.MutableRow(row)) + begin);
}

size_t Transformer::FirstVisible(size_t layer, size_t position) const {
  const bool sliding = config_.layer_types[layer] == AttentionKind::kSliding;
  return sliding && position + 1 > config_.sliding_window ? position + 1 - config_.sliding_window
                                                          : 0;
}

}  // namespace firesteel
