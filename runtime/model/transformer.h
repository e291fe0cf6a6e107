// The forward pass: tokens of several sequences in, logits and activity out.

#ifndef FIRESTEEL_RUNTIME_MODEL_TRANSFORMER_H_
#define FIRESTEEL_RUNTIME_MODEL_TRANSFORMER_H_

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "kernels/tensor.h"
#include "runtime/checkpoint/weights.h"
#include "runtime/model/activity.h"
#include "runtime/model/compute_type.h"
#include "runtime/model/kv_cache.h"
#include "runtime/model/quantized_input.h"
#include "runtime/model/rope_table.h"
#include "runtime/model/spark_ffn.h"
#include "runtime/model/sublinear_head.h"
#include "runtime/threading/worker_pool.h"

namespace firesteel {

/// For which rows of a slice logits are wanted.
enum class LogitRows : uint8_t { kNone, kLast, kAll };

/// Consecutive tokens of one sequence: a chunk of its prompt, or the one token to decode from.
struct SequenceSlice {
  std::span<const int32_t> tokens;        // ids < vocab_size, at least one
  size_t position = 0;                    // of tokens[0]; all before it are in the cache
  std::span<std::byte* const> kv_blocks;  // of the sequence, with room for all its positions
  LogitRows logits = LogitRows::kLast;
  /// How many of the largest logits are enough for each row that wants logits; 0: all of them.
  uint32_t top_k = 0;
  /// Whether the tokens are of a prompt, rather than generated one by one. The matrix units compute
  /// attention over a cache of bf16 for what is of a prompt and, with ComputeType::kBF16, all of
  /// its products; their sums have other bits.
  bool prompt = false;
};

/// The logits of some tokens, exactly as the full head gives them.
struct LogitCandidates {
  std::span<const uint32_t> ids;  // rising
  std::span<const float> logits;  // of ids
};

/// Parts of a step, by what a layer does, for measurements.
enum class Phase : uint8_t {
  kProjections,  // q, k, v, o
  kAttention,
  kPredictor,  // gate_proj of a Spark FFN
  kThreshold,
  kSparseFfn,
  kDenseFfn,
  kRest,  // embedding, norms, RoPE, rounding
  kHead,
};
inline constexpr size_t kNumPhases = 8;

/// Executes one model (spec: "Layer (Gemma-2)"), Spark or dense. Owns every buffer it needs, sized
/// when it is made: Forward allocates nothing once its lists have grown to the batch.
///
/// The bits of a row's logits depend on the row's sequence (tokens and positions up to it, and
/// which of them are of the prompt), the weights, the compute type, the cache's type, the SIMD
/// target and the matrix units only: not on the other slices, the chunking, or the number of
/// threads. Nor does it depend on those whether a row has logits or candidates. One caller at a
/// time.
class Transformer {
 public:
  /// Steps have at most `max_rows` tokens, of which at most `max_logit_rows` want logits. The cache
  /// that Forward is given is of `kv_dtype`. `pool` outlives this. `compute` is kInteger exactly
  /// where the weights are quantized, and kBF16 needs bf16 weights. With `head`, rows whose `top_k`
  /// is small get candidates from a sublinear head, which takes a quarter of a byte more memory for
  /// each weight of the embedding.
  Transformer(std::shared_ptr<const ModelWeights> weights, ComputeType compute,
              kernels::DType kv_dtype, WorkerPool* pool, size_t max_rows, size_t max_logit_rows,
              const std::optional<SublinearHeadOptions>& head = std::nullopt);
  ~Transformer();

  /// Runs all slices as one batch and writes their keys and values to the cache. Slices are of
  /// different sequences. `probe` may be null.
  void Forward(std::span<const SequenceSlice> batch, ActivityProbe* probe = nullptr);

  /// Of the last Forward: logits [vocab_size] of the i-th row that wanted them, in the order of the
  /// batch. Empty where it has candidates instead.
  std::span<float> logits(size_t i);
  /// Of the last Forward: the candidates of the i-th row that wanted logits, among them its top_k
  /// largest logits and all that equal the last of those, but for a probability of top_k · 10⁻⁹
  /// (sublinear_head.h). Empty where it has all logits: without a sublinear head, for top_k 0 or
  /// above SublinearHead::kMaxTopK, and in vocabularies that are no larger than that.
  LogitCandidates candidates(size_t i) const;
  size_t num_logit_rows() const { return head_rows_.size(); }
  /// Of the last Forward, one entry a row that wanted logits.
  std::span<const HeadActivity> head_activity() const { return head_activity_; }
  /// Bytes of the sublinear head's copy of the embedding; 0 without one.
  size_t sublinear_head_bytes() const { return head_ != nullptr ? head_->bytes() : 0; }

  /// Of the last Forward, one entry a layer; rows in the order of the batch. Valid until the next
  /// one.
  std::span<const LayerActivity> activity() const { return layer_activity_; }

  /// How a Spark model's FFN is computed for prompts, where there is a choice; the bits are the
  /// same. Not during a Forward.
  void SetFfnWay(FfnWay way);

  size_t max_rows() const { return max_rows_; }

  /// Seconds that each Phase has taken, summed over all Forwards.
  const std::array<double, kNumPhases>& phase_seconds() const { return phase_seconds_; }

 private:
  // One token of the step.
  struct Row {
    int32_t token;
    size_t position;
    std::byte* const* blocks;
    bool prompt;
  };
  // An input of dense products: always in f32, and rounded to what the compute type says.
  struct DenseInput {
    Matrix f32;
    Matrix bf16;
    Matrix tiles;  // one row: bf16 in the order of kernels/amx.h, where prompts need it
    QuantizedInput integer;
  };
  struct WorkerScratch;
  // What reads a normed row next: attention and the head take it whole, a Spark FFN in two parts.
  enum class Block : uint8_t { kAttentionOrHead, kFeedForward };

  void ListRows(std::span<const SequenceSlice> batch);

  // The steps of a layer. Every member of the team runs each on its share; each ends in a barrier.
  void Embed(Worker& worker);
  void Project(Worker& worker, DenseInput& input, const Matrix& weight, Matrix& output);
  void RotateAndStore(Worker& worker, size_t layer);
  void AttendRows(Worker& worker, size_t layer);
  void RoundAttended(Worker& worker);
  void AddNormed(Worker& worker, size_t layer, const std::vector<float>& norm,
                 const std::vector<float>& next_norm, Block next);
  void SparseFeedForward(Worker& worker, size_t layer);
  void DenseFeedForward(Worker& worker, size_t layer);
  void OutputHead(Worker& worker);
  void PutHeadInput(size_t i);
  void ExactLogits(size_t slot, const uint32_t* ids, size_t begin, size_t end, float* out);

  // What one row needs inside those steps.
  void NormRow(size_t row, const std::vector<float>& norm, Block next);
  void AttendHeads(Worker& worker, size_t layer, size_t row, size_t first_head, size_t heads);
  size_t MostPromptRows(size_t num_workers) const;
  size_t PromptRowsFrom(size_t row, size_t most) const;
  void AttendPromptRows(const Worker& worker, size_t layer, size_t row, size_t count,
                        size_t kv_head);
  void ReportKept(size_t layer, size_t row, size_t head, size_t count, const uint32_t* kept);
  void CountAttended(size_t layer, size_t row);

  void EndPhase(Worker& worker, Phase phase);
  void Multiply(const Worker& worker, DenseInput& input, const Matrix& weight, IndexRange share,
                Matrix& output);
  void MultiplyFloats(const DenseInput& input, IndexRange rows, const Matrix& weight,
                      IndexRange share, Matrix& output) const;
  void MultiplyPrompt(DenseInput& input, IndexRange rows, const Matrix& weight, IndexRange share,
                      Matrix& output) const;
  void MultiplyIntegers(QuantizedInput& input, size_t rows, const Matrix& weight, IndexRange share,
                        Matrix& output);
  QuantizedInput MakeIntegers(size_t rows, size_t cols) const;
  void RoundToIntegers(const float* values, size_t row, size_t num_rows,
                       QuantizedInput& input) const;
  bool UsesTiles(size_t rows) const;
  kernels::TypedView View(const DenseInput& input, size_t first_row, size_t rows, size_t first_col,
                          size_t cols) const;
  DenseInput MakeInput(size_t rows, size_t cols) const;
  static kernels::TileColumns Tiles(DenseInput& input);
  kernels::TileColumns RestTiles();
  void RoundRow(DenseInput& input, size_t row, size_t num_rows) const;
  size_t FirstVisible(size_t layer, size_t position) const;

  const std::shared_ptr<const ModelWeights> weights_;
  const ModelConfig& config_;
  const ComputeType compute_;
  WorkerPool* const pool_;
  const size_t max_rows_;
  const bool tiles_;  // whether the CPU and the weights allow kernels/amx.h
  const kernels::AttentionShape attention_;
  const bool prompt_attention_;     // what is of a prompt attends on the matrix unit
  const RopeTable predictor_rope_;  // of the first predictor_dim of a head
  const std::unique_ptr<const RopeTable> rest_rope_;  // of the rest; null in a dense model
  std::vector<double> attention_quantiles_;  // [context + 1], by the number of visible positions

  // The step under way.
  std::vector<Row> rows_;
  std::vector<RowRun> runs_;          // of rows_
  std::vector<size_t> head_rows_;     // rows that want logits
  std::vector<uint32_t> head_top_k_;  // [head_rows_]
  std::vector<size_t> head_slots_;    // [head_rows_]: rows of head_input_ and logits_, those that
                                      // take all logits first
  size_t num_full_slots_ = 0;
  std::vector<uint32_t> screened_top_k_;  // of the other slots
  ActivityProbe* probe_ = nullptr;

  // Buffers. R = max_rows.
  Matrix residual_;                 // [R, d]
  DenseInput normed_;               // [R, d]
  QuantizedInput predictor_input_;  // [R, r], Spark with integers: normed[:r]
  QuantizedInput rest_input_;       // [R, d − r]: normed[r:]
  Matrix rest_tiles_;    // bf16, what is of a prompt: one row, in the order of kernels/amx.h
  Matrix qkv_;           // [R, (H + 2G)·A]
  DenseInput attended_;  // [R, H·A]
  Matrix projected_;     // [R, SumCols(d)]: what an attention or FFN block gives
  Matrix gate_;          // [R, F]: scores, then (dense) the hidden layer
  Matrix up_;            // [R, F]: in a Spark model compacted to the active neurons
  DenseInput hidden_;    // [R, F], dense model
  std::unique_ptr<SparkFfn> ffn_;        // null in a dense model
  DenseInput head_input_;                // [max_logit_rows, d]
  Matrix logits_;                        // [max_logit_rows, vocab]
  std::unique_ptr<SublinearHead> head_;  // null: all logits always
  std::vector<float> exact_inputs_;      // [max_logit_rows, d], with a sublinear head
  std::vector<HeadActivity> head_activity_;
  std::vector<uint32_t> kept_;  // [R, H]
  std::vector<WorkerScratch> scratch_;

  std::array<double, kNumPhases> phase_seconds_{};
  std::chrono::steady_clock::time_point phase_start_;  // of the first worker

  std::vector<RowActivity> row_activity_;  // [layers, rows of the step]
  std::vector<LayerActivity> layer_activity_;
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_MODEL_TRANSFORMER_H_
