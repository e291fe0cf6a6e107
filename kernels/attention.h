// Spark attention (arXiv 2506.06644, section 3.2) and dense Gemma-2 attention of one query head
// over a blocked KV cache: cheap predictor scores of all positions → statistical threshold → the
// exact part of the survivors only.

#ifndef FIRESTEEL_KERNELS_ATTENTION_H_
#define FIRESTEEL_KERNELS_ATTENTION_H_

#include <cstddef>
#include <cstdint>

namespace firesteel::kernels {

/// Positions a KV block holds.
inline constexpr size_t kKvBlockTokens = 32;

/// What one KV head keeps of one block of positions, in floats, one part after the other:
///   predictor keys, transposed  [predictor_dim, kKvBlockTokens]   so that a vector holds
///   neighbouring positions the rest of the keys        [kKvBlockTokens, head_dim − predictor_dim]
///   values                      [kKvBlockTokens, head_dim]
/// Dense attention has predictor_dim == head_dim and no second part. Position p of a sequence is
/// slot p % kKvBlockTokens of its block p / kKvBlockTokens.
struct AttentionShape {
  size_t head_dim = 0;
  size_t predictor_dim = 0;  // == head_dim: dense attention
  size_t top_k = 0;          // 0: every position is kept (dense attention)
  float scale = 1.0f;        // query_pre_attn_scalar^-0.5
  float softcap = 0.0f;      // of the predictor scores; 0: none

  bool spark() const { return predictor_dim < head_dim; }
  size_t BlockFloats() const { return kKvBlockTokens * 2 * head_dim; }
};

/// Stores the key and the value of one position (key [head_dim] after RoPE, value [head_dim]) in
/// its slot of a head's block.
void StoreKeyValue(const AttentionShape& shape, const float* key, const float* value, size_t slot,
                   float* block);

/// Floats of scratch, 64-byte aligned, that Attend needs for at most `positions` visible positions.
size_t AttentionScratchFloats(size_t positions);

/// The output of one query head at a position that sees the positions [begin, end) of its sequence.
///
/// query [head_dim] after RoPE; blocks[b] + offset is where this KV head's part of the sequence's
/// block b starts; out [head_dim]. `quantile` is NormalQuantile(1 − top_k/n) with n = end − begin,
/// ignored where n ≤ top_k or top_k = 0, when every position is kept. No survivor: the first
/// largest score is kept. If `kept` is not null the kept positions (absolute, rising) are written
/// to it: room for n + kCompactionSlack. Returns how many positions were kept, ≥ 1. Requires begin
/// < end. Thread-safe for distinct scratch and out.
size_t Attend(const AttentionShape& shape, const float* query, const float* const* blocks,
              size_t offset, size_t begin, size_t end, double quantile, float* scratch, float* out,
              uint32_t* kept);

}  // namespace firesteel::kernels

#endif  // FIRESTEEL_KERNELS_ATTENTION_H_
