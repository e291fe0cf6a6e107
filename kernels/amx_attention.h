// The products of attention for many queries at once on AMX: queries with keys, and weights with
// values.
//
// Keys and values are brought into the order that the unit wants, block by block, once for all
// queries of a prompt's chunk. What is multiplied with them is split into two bf16, a rounded value
// and the rounded rest: the sums are those of f32 factors to within 2^-16 of each.

#ifndef FIRESTEEL_KERNELS_AMX_ATTENTION_H_
#define FIRESTEEL_KERNELS_AMX_ATTENTION_H_

#include <cstddef>
#include <cstdint>

#include "kernels/attention.h"
#include "kernels/tensor.h"

namespace firesteel::kernels {

/// Queries that are multiplied together.
inline constexpr size_t kTileQueries = 32;

/// Factors [kTileQueries, stride] as two bf16 each, their sum.
struct SplitRows {
  BF16* high = nullptr;
  BF16* low = nullptr;
  size_t stride = 0;  // elements, a multiple of 32
};

/// Bytes of a block's keys or values in the order of tiles, for `dims` dimensions, a multiple
/// of 32.
constexpr size_t BlockTileBytes(size_t dims) { return kKvBlockTokens * dims * sizeof(BF16); }

/// high + low ≈ x: x [n] rounded to bf16, nearest and ties to even, and what that leaves. Denormals
/// become zero. Requires AmxAvailable(), as all that follows.
void SplitToBF16(const float* x, size_t n, BF16* high, BF16* low);

/// Puts the predictor keys of a block of bf16 (see AttentionShape) in the order of tiles,
/// aligned to kAlignment. Thread-safe for distinct `out`.
void TilePredictorKeys(const AttentionShape& shape, const std::byte* block, std::byte* out);
/// The same with the rest of the keys.
void TileRestOfKeys(const AttentionShape& shape, const std::byte* block, std::byte* out);
/// The same with the values of the first `slots` positions; those of the others count as zero.
void TileValues(const AttentionShape& shape, const std::byte* block, size_t slots, std::byte* out);

/// out[q, p] = Σ_j x[q, j] · key[p, j] for all queries and the positions p of `blocks` blocks, in
/// f32. `tiles` [blocks, BlockTileBytes(dims)]. Denormals count as zero. What a query gets does not
/// depend on the others, nor a position's product on the others.
void AmxDots(const SplitRows& x, const std::byte* tiles, size_t blocks, size_t dims,
             const MatView& out);

/// out[q, c] = Σ_p x[q, p] · value[p, c] for all queries, in f32, p rising through `blocks` blocks.
/// `tiles` [blocks, BlockTileBytes(dims)]. Blocks for which a query's factors are zero leave its
/// sums as they are, to the bit.
void AmxValues(const SplitRows& x, const std::byte* tiles, size_t blocks, size_t dims,
               const MatView& out);

}  // namespace firesteel::kernels

#endif  // FIRESTEEL_KERNELS_AMX_ATTENTION_H_
