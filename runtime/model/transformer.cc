#include "runtime/model/transformer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "kernels/amx.h"
#include "kernels/attention.h"
#include "kernels/elementwise.h"
#include "kernels/integer_rows.h"
#include "kernels/matmul.h"
#include "kernels/quantized.h"
#include "kernels/sparse_ffn.h"
#include "kernels/statistical_topk.h"

namespace firesteel {
namespace {

using kernels::DType;
using kernels::MatView;
using kernels::TypedView;

// Shares of a matrix's rows or columns are cut at these, so that no two workers write one cache
// line.
constexpr size_t kRowGrain = 64;

// From so many rows on, products with 8-bit weights take tiles (kernels/amx.h).
constexpr size_t kMinTileRows = 3;

float* RowOf(Matrix& matrix, size_t row) { return static_cast<float*>(matrix.MutableRow(row)); }

MatView Writable(Matrix& matrix, IndexRange rows) {
  const TypedView view = matrix.view();
  return {RowOf(matrix, rows.begin), rows.end - rows.begin, view.cols, view.stride};
}
MatView Writable(Matrix& matrix, size_t rows) { return Writable(matrix, IndexRange{0, rows}); }

}  // namespace

struct Transformer::WorkerScratch {
  Matrix attention;              // [1, AttentionScratchFloats(heads of a KV head, context)]
  std::vector<uint32_t> kept;    // [heads of a KV head, context + slack]
  std::vector<size_t> num_kept;  // [kMaxPromptRows, heads of a KV head]
  Matrix prompt_attention;       // bytes: PromptScratchBytes(context), where tiles attend
};

Transformer::Transformer(std::shared_ptr<const ModelWeights> weights, ComputeType compute,
                         DType kv_dtype, WorkerPool* pool, size_t max_rows, size_t max_logit_rows,
                         const std::optional<SublinearHeadOptions>& head)
    : weights_(std::move(weights)),
      config_(weights_->config),
      compute_(compute),
      pool_(pool),
      max_rows_(max_rows),
      tiles_((compute_ == ComputeType::kBF16 || weights_->types.Has(DType::kI8)) &&
             kernels::AmxAvailable()),
      attention_(AttentionShapeOf(config_, kv_dtype)),
      prompt_attention_(
          tiles_ && kernels::AttendsPrompts(attention_, config_.num_heads / config_.num_kv_heads)),
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
  runs_.reserve(max_rows);
  head_rows_.reserve(max_logit_rows);
  head_top_k_.reserve(max_logit_rows);
  head_slots_.reserve(max_logit_rows);
  screened_top_k_.reserve(max_logit_rows);
  head_activity_.reserve(max_logit_rows);
  residual_ = Matrix(max_rows, d, DType::kF32);
  normed_ = MakeInput(max_rows, d);
  qkv_ = Matrix(max_rows, qkv, DType::kF32);
  attended_ = MakeInput(max_rows, config_.num_heads * config_.head_dim);
  projected_ = Matrix(max_rows, kernels::SumCols(d), DType::kF32);
  gate_ = Matrix(max_rows, f, DType::kF32);
  up_ = Matrix(max_rows, f, DType::kF32);
  head_input_ = MakeInput(max_logit_rows, d);
  head_input_.tiles = Matrix();  // its rows are not those of the step
  logits_ = Matrix(max_logit_rows, config_.vocab_size, DType::kF32);
  if (head.has_value()) {
    head_ = std::make_unique<SublinearHead>(weights_->embedding, config_.final_logit_softcapping,
                                            pool, max_logit_rows, *head);
    exact_inputs_.resize(max_logit_rows * d);
  }
  kept_.resize(max_rows * config_.num_heads);
  layer_activity_.resize(config_.num_layers);
  row_activity_.resize(config_.num_layers * max_rows);
  for (size_t i = 0; i < pool->num_threads(); ++i) {
    const size_t heads = config_.num_heads / config_.num_kv_heads;
    scratch_.push_back({Matrix(1, kernels::AttentionScratchFloats(heads, context), DType::kF32),
                        std::vector<uint32_t>(heads * (context + kernels::kCompactionSlack)),
                        std::vector<size_t>(kernels::kMaxPromptRows * heads), Matrix()});
    if (!prompt_attention_) continue;
    const size_t bytes = kernels::PromptScratchBytes(attention_, context);
    scratch_.back().prompt_attention = Matrix(1, bytes, DType::kI8);
  }

  if (!config_.spark()) {
    hidden_ = MakeInput(max_rows, f);
    return;
  }
  if (compute_ == ComputeType::kInteger) {
    predictor_input_ = MakeIntegers(max_rows, config_.ffn_predictor_dim);
    rest_input_ = MakeIntegers(max_rows, d - config_.ffn_predictor_dim);
  }
  // Words of tiles are pairs of neighbours.
  const bool tiles =
      tiles_ && (compute_ == ComputeType::kInteger || config_.ffn_predictor_dim % 2 == 0);
  ffn_ = std::make_unique<SparkFfn>(config_, weights_->types[WeightRole::kFfn], tiles,
                                    pool->num_threads(), max_rows);
  if (compute_ == ComputeType::kBF16 && ffn_->MayBeDense(1, true)) {
    const size_t rest = d - config_.ffn_predictor_dim;
    rest_tiles_ = Matrix(1, kernels::TileColumns::Words(max_rows, (rest + 1) / 2), DType::kF32);
  }
  const auto quantile = [](size_t k, size_t n) {
    return kernels::NormalQuantile(1.0 - static_cast<double>(k) / static_cast<double>(n));
  };
  attention_quantiles_.resize(context + 1);
  for (size_t n = config_.attention_top_k + 1; n <= context; ++n) {
    attention_quantiles_[n] = quantile(config_.attention_top_k, n);
  }
}

Transformer::~Transformer() = default;

void Transformer::Forward(std::span<const SequenceSlice> batch, ActivityProbe* probe) {
  ListRows(batch);
  probe_ = probe;
  phase_start_ = std::chrono::steady_clock::now();
  pool_->Run([this](Worker& worker) {
    Embed(worker);
    EndPhase(worker, Phase::kRest);
    for (size_t layer = 0; layer < config_.num_layers; ++layer) {
      const LayerWeights& w = weights_->layers[layer];
      Project(worker, normed_, w.qkv_proj, qkv_);
      EndPhase(worker, Phase::kProjections);
      RotateAndStore(worker, layer);
      EndPhase(worker, Phase::kRest);
      AttendRows(worker, layer);
      EndPhase(worker, Phase::kAttention);
      RoundAttended(worker);
      Project(worker, attended_, w.o_proj, projected_);
      EndPhase(worker, Phase::kProjections);
      AddNormed(worker, layer, w.post_attention_norm, w.pre_feedforward_norm, Block::kFeedForward);
      EndPhase(worker, Phase::kRest);
      if (config_.spark()) {
        SparseFeedForward(worker, layer);
      } else {
        DenseFeedForward(worker, layer);
        EndPhase(worker, Phase::kDenseFfn);
      }
      const bool last = layer + 1 == config_.num_layers;
      AddNormed(worker, layer, w.post_feedforward_norm,
                last ? weights_->final_norm : weights_->layers[layer + 1].input_norm,
                Block::kAttentionOrHead);
      EndPhase(worker, Phase::kRest);
    }
    OutputHead(worker);
  });
  const auto end = std::chrono::steady_clock::now();
  phase_seconds_[static_cast<size_t>(Phase::kHead)] +=
      std::chrono::duration<double>(end - phase_start_).count();
}

void Transformer::SetFfnWay(FfnWay way) {
  if (ffn_ != nullptr) ffn_->SetWay(way);
}

// Behind a barrier: the time since the last call belongs to `phase`.
void Transformer::EndPhase(Worker& worker, Phase phase) {
  if (worker.index() != 0) return;
  const auto now = std::chrono::steady_clock::now();
  phase_seconds_[static_cast<size_t>(phase)] +=
      std::chrono::duration<double>(now - phase_start_).count();
  phase_start_ = now;
}

std::span<float> Transformer::logits(size_t i) {
  const size_t slot = head_slots_[i];
  if (slot >= num_full_slots_) return {};
  return {RowOf(logits_, slot), config_.vocab_size};
}

LogitCandidates Transformer::candidates(size_t i) const {
  const size_t slot = head_slots_[i];
  if (slot < num_full_slots_) return {};
  const auto ids = head_->ids(slot - num_full_slots_);
  return {ids, {logits_.view().Row<float>(slot), ids.size()}};
}

void Transformer::ListRows(std::span<const SequenceSlice> batch) {
  rows_.clear();
  runs_.clear();
  head_rows_.clear();
  head_top_k_.clear();
  for (const SequenceSlice& slice : batch) {
    if (runs_.empty() || runs_.back().prompt != slice.prompt) {
      runs_.push_back({{rows_.size(), rows_.size()}, slice.prompt});
    }
    runs_.back().rows.end += slice.tokens.size();
    for (size_t i = 0; i < slice.tokens.size(); ++i) {
      const bool last = i + 1 == slice.tokens.size();
      if (slice.logits == LogitRows::kAll || (slice.logits == LogitRows::kLast && last)) {
        head_rows_.push_back(rows_.size());
        head_top_k_.push_back(head_ != nullptr && head_->Takes(slice.top_k) ? slice.top_k : 0);
      }
      rows_.push_back({slice.tokens[i], slice.position + i, slice.kv_blocks.data(), slice.prompt});
    }
  }
  head_slots_.resize(head_rows_.size());
  screened_top_k_.clear();
  num_full_slots_ = static_cast<size_t>(std::count(head_top_k_.begin(), head_top_k_.end(), 0u));
  size_t full = 0;
  for (size_t i = 0; i < head_rows_.size(); ++i) {
    const bool screened = head_top_k_[i] > 0;
    head_slots_[i] = screened ? num_full_slots_ + screened_top_k_.size() : full++;
    if (screened) screened_top_k_.push_back(head_top_k_[i]);
  }
  head_activity_.assign(head_rows_.size(), HeadActivity());
  const auto neurons = static_cast<uint32_t>(config_.intermediate_size);
  for (size_t layer = 0; layer < config_.num_layers; ++layer) {
    const std::span<RowActivity> rows(&row_activity_[layer * rows_.size()], rows_.size());
    for (size_t row = 0; row < rows_.size(); ++row) {
      const size_t position = rows_[row].position;
      rows[row].visible = static_cast<uint32_t>(position + 1 - FirstVisible(layer, position));
      rows[row].ffn_active = neurons;
    }
    layer_activity_[layer] = {rows, neurons, neurons};
  }
}

// residual = embedding[token] · sqrt(d); normed = input_norm(residual) of the first layer.
void Transformer::Embed(Worker& worker) {
  const float scale = static_cast<float>(std::sqrt(static_cast<double>(config_.hidden_size)));
  const TypedView table = weights_->embedding.view();
  const size_t d = config_.hidden_size;
  const IndexRange share = worker.Share(rows_.size());
  for (size_t row = share.begin; row < share.end; ++row) {
    float* out = RowOf(residual_, row);
    const size_t token = static_cast<size_t>(rows_[row].token);
    kernels::Dequantize(table, token, 0, d, out);
    for (size_t i = 0; i < d; ++i) out[i] *= scale;
    NormRow(row, weights_->layers[0].input_norm, Block::kAttentionOrHead);
  }
  worker.Barrier();
}

// output = input · weightᵀ, shared by the rows of the weight: each is read by one worker, once.
void Transformer::Project(Worker& worker, DenseInput& input, const Matrix& weight, Matrix& output) {
  Multiply(worker, input, weight, worker.Share(weight.rows(), kRowGrain), output);
  worker.Barrier();
}

// The rows `share` of output = input · weightᵀ, for all rows of the step. In bf16 what is of a
// prompt takes the matrix units, however few rows the step has of it.
void Transformer::Multiply(const Worker& worker, DenseInput& input, const Matrix& weight,
                           IndexRange share, Matrix& output) {
  TellRows(probe_, worker, weight, share, {0, weight.cols()});
  if (compute_ == ComputeType::kInteger) {
    return MultiplyIntegers(input.integer, rows_.size(), weight, share, output);
  }
  if (input.tiles.rows() == 0) {
    return MultiplyFloats(input, {0, rows_.size()}, weight, share, output);
  }
  for (const RowRun& run : runs_) {
    if (run.prompt) {
      MultiplyPrompt(input, run.rows, weight, share, output);
    } else {
      MultiplyFloats(input, run.rows, weight, share, output);
    }
  }
}

void Transformer::MultiplyFloats(const DenseInput& input, IndexRange rows, const Matrix& weight,
                                 IndexRange share, Matrix& output) const {
  const size_t count = rows.end - rows.begin;
  kernels::MatMul(View(input, rows.begin, count, 0, weight.cols()), weight.view(), share.begin,
                  share.end, Writable(output, rows));
}

void Transformer::MultiplyPrompt(DenseInput& input, IndexRange rows, const Matrix& weight,
                                 IndexRange share, Matrix& output) const {
  kernels::AmxMatMul(Tiles(input), rows.begin, rows.end, weight.view(), share.begin, share.end,
                     Writable(output, rows_.size()));
}

// The same with integers. Sums of products are exact, so that both ways give the same bits: which
// one a step takes changes its speed alone.
void Transformer::MultiplyIntegers(QuantizedInput& integers, size_t rows, const Matrix& weight,
                                   IndexRange share, Matrix& output) {
  const TypedView w = weight.view();
  const kernels::QuantizedRows input = integers.view().From(0, rows);
  const MatView y = Writable(output, rows);
  if (w.dtype == DType::kI8 && UsesTiles(rows)) {
    kernels::AmxMatMul(input, integers.tiles(), w, share.begin, share.end, y);
  } else {
    kernels::QuantizedMatMul(input, w, share.begin, share.end, y);
  }
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

// Tasks are dealt like cards: later rows of a chunk see more positions and cost more.
void Transformer::AttendRows(Worker& worker, size_t layer) {
  size_t turn = 0;  // of the workers
  const auto is_mine = [&] { return turn++ % worker.team_size() == worker.index(); };
  if (prompt_attention_) {
    const size_t most = probe_ != nullptr ? 1 : MostPromptRows(worker.team_size());
    for (size_t row = 0; row < rows_.size();) {
      const size_t count = PromptRowsFrom(row, most);
      for (size_t head = 0; count > 0 && head < config_.num_kv_heads; ++head) {
        if (is_mine()) AttendPromptRows(worker, layer, row, count, head);
      }
      row += std::max<size_t>(count, 1);
    }
  }
  // The query heads of a KV head go together, which reads its keys once, unless that leaves workers
  // without any.
  const size_t heads = rows_.size() * config_.num_kv_heads >= worker.team_size()
                           ? config_.num_heads / config_.num_kv_heads
                           : 1;
  for (size_t row = 0; row < rows_.size(); ++row) {
    if (prompt_attention_ && rows_[row].prompt) continue;
    for (size_t head = 0; head < config_.num_heads; head += heads) {
      if (is_mine()) AttendHeads(worker, layer, row, head, heads);
    }
  }
  worker.Barrier();
}

// How many rows of a prompt make a task: many, as all need the same keys in the order of tiles, but
// few enough for every worker to have some.
size_t Transformer::MostPromptRows(size_t num_workers) const {
  constexpr size_t kLeast = 8;
  const size_t share = rows_.size() * config_.num_kv_heads / (2 * num_workers);
  return std::clamp(share, kLeast, kernels::kMaxPromptRows);
}

// How many rows from `row` on, at most `most`, are neighbours in one prompt; 0 if that one is not
// of a prompt.
size_t Transformer::PromptRowsFrom(size_t row, size_t most) const {
  const Row& first = rows_[row];
  size_t count = 0;
  while (count < most && row + count < rows_.size()) {
    const Row& next = rows_[row + count];
    if (!next.prompt || next.blocks != first.blocks || next.position != first.position + count) {
      break;
    }
    ++count;
  }
  return count;
}

// The query heads of a KV head at neighbouring positions of a prompt.
void Transformer::AttendPromptRows(const Worker& worker, size_t layer, size_t row, size_t count,
                                   size_t kv_head) {
  const size_t heads = config_.num_heads / config_.num_kv_heads;
  const size_t first_head = kv_head * heads;
  const size_t offset = first_head * config_.head_dim;
  const bool sliding = config_.layer_types[layer] == AttentionKind::kSliding;
  WorkerScratch& scratch = scratch_[worker.index()];
  const kernels::PromptRows rows{.first = rows_[row].position,
                                 .count = count,
                                 .window = sliding ? config_.sliding_window : 0,
                                 .queries = RowOf(qkv_, row) + offset,
                                 .query_stride = qkv_.view().stride,
                                 .out = RowOf(attended_.f32, row) + offset,
                                 .out_stride = attended_.f32.view().stride,
                                 .num_kept = scratch.num_kept.data()};
  const size_t kept_stride = config_.max_position_embeddings + kernels::kCompactionSlack;
  kernels::AttendPrompt(attention_, heads, rows, rows_[row].blocks,
                        (layer * config_.num_kv_heads + kv_head) * attention_.BlockBytes(),
                        config_.spark() ? attention_quantiles_.data() : nullptr,
                        static_cast<std::byte*>(scratch.prompt_attention.MutableRow(0)),
                        probe_ != nullptr ? scratch.kept.data() : nullptr, kept_stride);
  for (size_t i = 0; i < count; ++i) {
    for (size_t h = 0; h < heads; ++h) {
      ReportKept(layer, row + i, first_head + h, scratch.num_kept[i * heads + h],
                 &scratch.kept[h * kept_stride]);
    }
  }
}

// Notes how many positions a query head kept; a probe sees which.
void Transformer::ReportKept(size_t layer, size_t row, size_t head, size_t count,
                             const uint32_t* kept) {
  kept_[row * config_.num_heads + head] = static_cast<uint32_t>(count);
  if (probe_ != nullptr) probe_->OnAttended(layer, row, head, {kept, count});
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
  for (size_t i = 0; i < heads; ++i) {
    ReportKept(layer, row, first_head + i, scratch.num_kept[i], &scratch.kept[i * kept_stride]);
  }
}

// The heads of a row have different workers, and share one scale.
void Transformer::RoundAttended(Worker& worker) {
  if (compute_ == ComputeType::kF32) return;
  const IndexRange share = worker.Share(rows_.size());
  for (size_t row = share.begin; row < share.end; ++row) RoundRow(attended_, row, rows_.size());
  worker.Barrier();
}

// residual += norm(projected); normed = next_norm(residual).
void Transformer::AddNormed(Worker& worker, size_t layer, const std::vector<float>& norm,
                            const std::vector<float>& next_norm, Block next) {
  const IndexRange share = worker.Share(rows_.size());
  for (size_t row = share.begin; row < share.end; ++row) {
    CountAttended(layer, row);
    kernels::RmsNormAdd(RowOf(projected_, row), norm.data(),
                        static_cast<float>(config_.rms_norm_eps), config_.hidden_size,
                        RowOf(residual_, row));
    NormRow(row, next_norm, next);
  }
  worker.Barrier();
}

// Spark FFN (arXiv 2506.06644, section 3.1): predictor, statistical top-k, then only what is
// active.
void Transformer::SparseFeedForward(Worker& worker, size_t layer) {
  const LayerWeights& w = weights_->layers[layer];
  const size_t num_rows = rows_.size();
  const IndexRange neurons = worker.Share(config_.intermediate_size, kRowGrain);
  if (compute_ == ComputeType::kInteger) {
    TellRows(probe_, worker, w.gate_proj, neurons, {0, w.gate_proj.cols()});
    MultiplyIntegers(predictor_input_, num_rows, w.gate_proj, neurons, gate_);
  } else {
    Multiply(worker, normed_, w.gate_proj, neurons, gate_);  // its columns are fewer
  }
  worker.Barrier();
  EndPhase(worker, Phase::kPredictor);

  ffn_->Select(worker, Writable(gate_, num_rows), runs_);
  const IndexRange share = worker.Share(num_rows);
  for (size_t row = share.begin; row < share.end; ++row) {
    const std::span<const uint32_t> active = ffn_->active(row);
    row_activity_[layer * num_rows + row].ffn_active = static_cast<uint32_t>(active.size());
    if (probe_ != nullptr) probe_->OnFfnActive(layer, row, active);
  }
  worker.Barrier();
  EndPhase(worker, Phase::kThreshold);

  SparkFfn::Input input{.probe = probe_};
  if (compute_ == ComputeType::kInteger) {
    input.integers = rest_input_.view();
    input.tiles = rest_input_.tiles();
  } else {
    const size_t r = config_.ffn_predictor_dim;
    input.floats = View(normed_, 0, num_rows, r, config_.hidden_size - r);
    if (rest_tiles_.rows() > 0) input.tiles = RestTiles();
  }
  ffn_->Run(worker, w, input, Writable(up_, num_rows), Writable(projected_, num_rows));
  if (worker.index() == 0) {
    layer_activity_[layer].ffn_union = ffn_->union_size(num_rows);
    layer_activity_[layer].ffn_read = ffn_->num_read(num_rows);
  }
  EndPhase(worker, Phase::kSparseFfn);
  // AddNormed takes the same share of the rows: what it reads was written by the same worker.
}

// down_proj · (gelu(gate_proj · x) ⊙ (up_proj · x)), every neuron.
void Transformer::DenseFeedForward(Worker& worker, size_t layer) {
  const LayerWeights& w = weights_->layers[layer];
  const IndexRange share = worker.Share(config_.intermediate_size, kRowGrain);
  Multiply(worker, normed_, w.gate_proj, share, gate_);
  Multiply(worker, normed_, w.up_proj, share, up_);
  for (size_t row = 0; row < rows_.size(); ++row) {
    kernels::GeluMul(RowOf(gate_, row) + share.begin, RowOf(up_, row) + share.begin,
                     share.end - share.begin, RowOf(hidden_.f32, row) + share.begin);
  }
  worker.Barrier();
  if (compute_ != ComputeType::kF32) {
    const IndexRange rows = worker.Share(rows_.size());
    for (size_t row = rows.begin; row < rows.end; ++row) RoundRow(hidden_, row, rows_.size());
    worker.Barrier();
  }
  Project(worker, hidden_, w.down_proj, projected_);
}

// logits = softcap(embedding · final_norm(x)) of the rows that want them. Which head a row takes is
// its own affair, so that no other row of the step can change what it gets.
void Transformer::OutputHead(Worker& worker) {
  const IndexRange wanted = worker.Share(head_rows_.size());
  for (size_t i = wanted.begin; i < wanted.end; ++i) PutHeadInput(i);
  worker.Barrier();
  if (num_full_slots_ > 0) {
    const IndexRange share = worker.Share(config_.vocab_size, kRowGrain);
    if (compute_ == ComputeType::kInteger) {
      MultiplyIntegers(head_input_.integer, num_full_slots_, weights_->embedding, share, logits_);
    } else {
      MultiplyFloats(head_input_, {0, num_full_slots_}, weights_->embedding, share, logits_);
    }
    const float cap = static_cast<float>(config_.final_logit_softcapping);
    for (size_t i = 0; cap != 0.0f && i < num_full_slots_; ++i) {
      float* const row = RowOf(logits_, i) + share.begin;
      kernels::ScaleSoftCap(row, 1.0f, cap, share.end - share.begin, row);
    }
  }
  if (screened_top_k_.empty()) return;
  const TypedView logits = logits_.view();
  head_->Run(worker, screened_top_k_,
             {RowOf(logits_, num_full_slots_), screened_top_k_.size(), logits.cols, logits.stride},
             [this](size_t row, const uint32_t* ids, size_t begin, size_t end, float* out) {
               ExactLogits(num_full_slots_ + row, ids, begin, end, out);
             });
  if (worker.index() != 0) return;
  for (size_t i = 0; i < head_rows_.size(); ++i) {
    if (head_slots_[i] < num_full_slots_) continue;
    const size_t exact = head_->num_exact(head_slots_[i] - num_full_slots_);
    head_activity_[i] = {.screened = true, .exact = static_cast<uint32_t>(exact)};
  }
}

// The i-th row that wants logits, rounded, to its place in head_input_ and to the sublinear head.
void Transformer::PutHeadInput(size_t i) {
  const size_t d = config_.hidden_size;
  const size_t slot = head_slots_[i];
  std::memcpy(RowOf(head_input_.f32, slot), RowOf(normed_.f32, head_rows_[i]), d * sizeof(float));
  // Only the full head multiplies all of its rows at once.
  RoundRow(head_input_, slot, slot < num_full_slots_ ? num_full_slots_ : 1);
  if (slot < num_full_slots_) return;
  // Estimates are of what the exact head multiplies: the rounded input.
  float* const exact = &exact_inputs_[slot * d];
  switch (compute_) {
    case ComputeType::kF32:
      std::memcpy(exact, RowOf(head_input_.f32, slot), d * sizeof(float));
      break;
    case ComputeType::kBF16:
      kernels::Dequantize(head_input_.bf16.view(), slot, 0, d, exact);
      break;
    case ComputeType::kInteger: {
      const kernels::QuantizedRows x = head_input_.integer.view();
      for (size_t k = 0; k < d; ++k) {
        exact[k] = x.scales[slot] * static_cast<float>(256 * x.High(slot)[k] + x.Low(slot)[k]);
      }
      break;
    }
  }
  head_->SetInput(slot - num_full_slots_, exact);
}

// out[j] = the logit of ids[j] for a row of head_input_, j in [begin, end).
void Transformer::ExactLogits(size_t slot, const uint32_t* ids, size_t begin, size_t end,
                              float* out) {
  if (begin == end) return;
  if (compute_ == ComputeType::kInteger) {
    const kernels::TypedView w = weights_->embedding.view();
    kernels::RowFetcher fetcher;
    fetcher.Add(w, ids + begin, end - begin, 0, kernels::BytesOf(w.dtype, w.stride));
    fetcher.Fetch(kernels::RowFetcher::kLead);
    kernels::QuantizedMaskedMatVec(head_input_.integer.view().From(slot, 1), w, ids, begin, end,
                                   fetcher, out);
  } else {
    kernels::MaskedMatVec(View(head_input_, slot, 1, 0, config_.hidden_size),
                          weights_->embedding.view(), ids, begin, end, out);
  }
  const float cap = static_cast<float>(config_.final_logit_softcapping);
  if (cap != 0.0f) kernels::ScaleSoftCap(out + begin, 1.0f, cap, end - begin, out + begin);
}

void Transformer::NormRow(size_t row, const std::vector<float>& norm, Block next) {
  float* const normed = RowOf(normed_.f32, row);
  kernels::RmsNorm(RowOf(residual_, row), norm.data(), static_cast<float>(config_.rms_norm_eps),
                   config_.hidden_size, normed);
  if (compute_ == ComputeType::kInteger && config_.spark() && next == Block::kFeedForward) {
    RoundToIntegers(normed, row, rows_.size(), predictor_input_);
    kernels::QuantizeActivations(normed + config_.ffn_predictor_dim, rest_input_.view(), row);
    if (ffn_->MayBeDense(rows_.size(), rows_[row].prompt)) rest_input_.Tile(row);
    return;
  }
  RoundRow(normed_, row, rows_.size());
  if (rest_tiles_.rows() > 0 && next == Block::kFeedForward && rows_[row].prompt) {
    const size_t r = config_.ffn_predictor_dim;
    kernels::SetTileColumn(normed_.bf16.view().Row<kernels::BF16>(row) + r, config_.hidden_size - r,
                           row, RestTiles());
  }
}

void Transformer::CountAttended(size_t layer, size_t row) {
  uint32_t attended = 0;
  for (size_t h = 0; h < config_.num_heads; ++h) attended += kept_[row * config_.num_heads + h];
  row_activity_[layer * rows_.size() + row].attended = attended;
}

TypedView Transformer::View(const DenseInput& input, size_t first_row, size_t rows,
                            size_t first_col, size_t cols) const {
  TypedView view = compute_ == ComputeType::kBF16 ? input.bf16.view() : input.f32.view();
  const size_t offset = (first_row * view.stride + first_col) * kernels::BytesOf(view.dtype, 1);
  view.data = static_cast<const std::byte*>(view.data) + offset;
  view.rows = rows;
  view.cols = cols;
  return view;
}

Transformer::DenseInput Transformer::MakeInput(size_t rows, size_t cols) const {
  DenseInput input{Matrix(rows, cols, DType::kF32), Matrix(), Matrix(), QuantizedInput()};
  if (compute_ == ComputeType::kBF16) {
    input.bf16 = Matrix(rows, cols, DType::kBF16);
    const size_t words = kernels::TileColumns::Words(rows, (cols + 1) / 2);
    if (tiles_) input.tiles = Matrix(1, words, DType::kF32);
  }
  if (compute_ == ComputeType::kInteger) input.integer = MakeIntegers(rows, cols);
  return input;
}

// What of `input` is of a prompt, in the order of tiles.
kernels::TileColumns Transformer::Tiles(DenseInput& input) {
  return {static_cast<int32_t*>(input.tiles.MutableRow(0)),
          kernels::TileColumns::Depth((input.bf16.cols() + 1) / 2)};
}

// The second part of what is of a prompt in normed_, for an FFN on the matrix unit.
kernels::TileColumns Transformer::RestTiles() {
  const size_t cols = config_.hidden_size - config_.ffn_predictor_dim;
  return {static_cast<int32_t*>(rest_tiles_.MutableRow(0)),
          kernels::TileColumns::Depth((cols + 1) / 2)};
}

QuantizedInput Transformer::MakeIntegers(size_t rows, size_t cols) const {
  return QuantizedInput(rows, cols, tiles_ ? rows : 0);
}

// A row of an input that has `num_rows` of them.
void Transformer::RoundToIntegers(const float* values, size_t row, size_t num_rows,
                                  QuantizedInput& input) const {
  kernels::QuantizeActivations(values, input.view(), row);
  if (UsesTiles(num_rows)) input.Tile(row);
}

bool Transformer::UsesTiles(size_t rows) const { return tiles_ && rows >= kMinTileRows; }

void Transformer::RoundRow(DenseInput& input, size_t row, size_t num_rows) const {
  switch (compute_) {
    case ComputeType::kF32:
      break;
    case ComputeType::kBF16:
      kernels::RoundToBF16(RowOf(input.f32, row), input.f32.cols(),
                           static_cast<kernels::BF16*>(input.bf16.MutableRow(row)));
      if (input.tiles.rows() > 0 && rows_[row].prompt) {
        kernels::SetTileColumn(input.bf16.view().Row<kernels::BF16>(row), input.bf16.cols(), row,
                               Tiles(input));
      }
      break;
    case ComputeType::kInteger:
      RoundToIntegers(RowOf(input.f32, row), row, num_rows, input.integer);
      break;
  }
}

size_t Transformer::FirstVisible(size_t layer, size_t position) const {
  const bool sliding = config_.layer_types[layer] == AttentionKind::kSliding;
  return sliding && position + 1 > config_.sliding_window ? position + 1 - config_.sliding_window
                                                          : 0;
}

}  // namespace firesteel
