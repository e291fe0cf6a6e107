// Spark attention (arXiv 2506.06644, section 3.2) and dense Gemma-2 attention of the query
// heads of one KV head over a blocked KV cache: cheap predictor scores of all positions →
// statistical threshold → the exact part of the survivors only.

#ifndef FIRESTEEL_KERNELS_ATTENTION_H_
#define FIRESTEEL_KERNELS_ATTENTION_H_

#include <cstddef>
#include <cstdint>

#include "kernels/tensor.h"

namespace firesteel::kernels {

/// Positions a KV block holds.
inline constexpr size_t kKvBlockTokens = 32;

/// What one KV head keeps of one block of positions, in elements of `kv_dtype`, one part after the
/// other:
///   predictor keys, transposed  [predictor_dim, kKvBlockTokens]   so that a vector holds
///   neighbouring positions
///   the rest of the keys        [kKvBlockTokens, head_dim − predictor_dim]
///   values                      [kKvBlockTokens, head_dim]
/// Dense attention has predictor_dim == head_dim and no second part. Position p of a sequence is
/// slot p % kKvBlockTokens of its block p / kKvBlockTokens. Slot s of a row of predictor keys is
/// its element PredictorColumn(s).
struct AttentionShape {
  size_t head_dim = 0;
  size_t predictor_dim = 0;  // == head_dim: dense attention
  size_t top_k = 0;          // 0: every position is kept (dense attention)
  float scale = 1.0f;        // query_pre_attn_scalar^-0.5
  float softcap = 0.0f;      // of the predictor scores; 0: none
  DType kv_dtype = DType::kF32;

  bool spark() const { return predictor_dim < head_dim; }
  size_t BlockBytes() const { return kKvBlockTokens * 2 * head_dim * BytesOf(kv_dtype, 1); }

  /// In bf16 the slots s and s + kKvBlockTokens / 2 are neighbours: a 32-bit lane holds both, and a
  /// shift or a mask makes it one or the other in f32, where neighbouring slots cost a shuffle.
  size_t PredictorColumn(size_t slot) const {
    constexpr size_t kHalf = kKvBlockTokens / 2;
    return kv_dtype == DType::kBF16 ? slot % kHalf * 2 + slot / kHalf : slot;
  }
};

/// Stores the key and the value of one position (key [head_dim] after RoPE, value [head_dim]) in
/// its slot of a head's block [BlockBytes], aligned to the element; in bf16 rounded to nearest,
/// ties to even. Thread-safe for distinct slots.
void StoreKeyValue(const AttentionShape& shape, const float* key, const float* value, size_t slot,
                   std::byte* block);

/// Floats of scratch, 64-byte aligned, that Attend needs for `heads` query heads and at most
/// `positions` visible positions.
size_t AttentionScratchFloats(size_t heads, size_t positions);

/// The output of query heads that share a KV head, at a position that sees the positions
/// [begin, end) of its sequence.
///
/// queries [heads, head_dim] after RoPE; blocks[b] + offset (bytes) is where this KV head's part of
/// the sequence's block b starts; out [heads, head_dim]. `quantile` is NormalQuantile(1 − top_k/n)
/// with n = end − begin, ignored where n ≤ top_k or top_k = 0, when every position is kept. No
/// survivor: the first largest score is kept. num_kept [heads] is how many positions each head
/// kept, ≥ 1. If `kept` is not null those of head h (absolute, rising) are written to
/// kept + h · kept_stride: room for n + kCompactionSlack each.
///
/// Keys and values are promoted exactly to f32. The bits of a head's output do not depend on which
/// heads it is computed with; several at once share the reading of the predictor keys and, where
/// every position is kept, of the values. Requires begin < end. Thread-safe for distinct scratch
/// and outputs.
void Attend(const AttentionShape& shape, const float* queries, size_t heads,
            const std::byte* const* blocks, size_t offset, size_t begin, size_t end,
            double quantile, float* scratch, float* out, size_t* num_kept, uint32_t* kept,
            size_t kept_stride);

/// Neighbouring positions of a prompt, and where their queries and outputs are: those of position
/// `first` + i at i · query_stride and i · out_stride floats, [heads, head_dim] each.
struct PromptRows {
  size_t first = 0;
  size_t count = 0;   // at most kMaxPromptRows
  size_t window = 0;  // positions that one sees, itself among them; 0: all up to itself
  const float* queries = nullptr;
  size_t query_stride = 0;
  float* out = nullptr;
  size_t out_stride = 0;
  size_t* num_kept = nullptr;  // [count, heads]

  size_t Begin(size_t i) const {
    const size_t end = first + i + 1;
    return window != 0 && end > window ? end - window : 0;
  }
};
inline constexpr size_t kMaxPromptRows = 64;

/// Whether AttendPrompt may be called: on a CPU with AMX, for a cache of bf16 and heads whose parts
/// are multiples of 32.
bool AttendsPrompts(const AttentionShape& shape, size_t heads);

/// Bytes of scratch, 64-byte aligned, that AttendPrompt needs where at most `positions` are
/// visible.
size_t PromptScratchBytes(const AttentionShape& shape, size_t positions);

/// What Attend gives for each of `rows`, on the matrix unit (kernels/amx_attention.h): products to
/// within 2^-16 of their factors, in an order of sums of their own. blocks, offset, kept (of row i
/// and head h at (i · heads + h) · kept_stride) and thread safety as there; quantiles[n] is
/// NormalQuantile(1 − top_k/n). The bits of an output depend on its query and on what it sees, not
/// on the rows that it is computed with. All rows' keys and values must have been stored.
void AttendPrompt(const AttentionShape& shape, size_t heads, const PromptRows& rows,
                  const std::byte* const* blocks, size_t offset, const double* quantiles,
                  std::byte* scratch, uint32_t* kept, size_t kept_stride);

}  // namespace firesteel::kernels

#endif  // FIRESTEEL_KERNELS_ATTENTION_H_
