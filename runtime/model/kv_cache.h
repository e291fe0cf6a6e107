// The keys and values of all running sequences, in blocks of a fixed number of positions.

#ifndef FIRESTEEL_RUNTIME_MODEL_KV_CACHE_H_
#define FIRESTEEL_RUNTIME_MODEL_KV_CACHE_H_

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/attention.h"
#include "kernels/tensor.h"
#include "runtime/checkpoint/model_config.h"

namespace firesteel {

/// How the query heads of this model read a cache whose elements are of `kv_dtype`.
kernels::AttentionShape AttentionShapeOf(const ModelConfig& config, kernels::DType kv_dtype);

class KvBlockPool;

/// The blocks of one sequence, given back to their pool on destruction. Movable. Position p of the
/// sequence lives in block p / kernels::kKvBlockTokens.
class KvLease {
 public:
  KvLease() = default;
  KvLease(KvLease&& other) noexcept;
  KvLease& operator=(KvLease&& other) noexcept;
  ~KvLease();

  /// Positions that fit.
  size_t capacity_tokens() const { return blocks_.size() * kernels::kKvBlockTokens; }
  std::span<std::byte* const> blocks() const { return blocks_; }

  /// Copies the first `tokens` positions of another lease from the same pool; they fit.
  void CopyFrom(const KvLease& other, size_t tokens);

 private:
  friend class KvBlockPool;
  KvLease(KvBlockPool* pool, std::vector<std::byte*> blocks);
  KvBlockPool* pool_ = nullptr;
  std::vector<std::byte*> blocks_;
};

/// A fixed number of blocks out of one reservation of address space; pages are backed by memory
/// when first written. Not thread-safe: the scheduler's thread owns it. Outlives its leases.
///
/// A block holds, for each layer and key/value head, what kernels::AttentionShape describes. bf16
/// halves what attention reads and doubles what fits; f32 keeps keys and values as computed.
class KvBlockPool {
 public:
  /// As many blocks as fit into `bytes`. ResourceExhausted if not one does or the address space is
  /// refused.
  static absl::StatusOr<std::unique_ptr<KvBlockPool>> Create(const ModelConfig& config,
                                                             kernels::DType kv_dtype, size_t bytes);
  ~KvBlockPool();
  KvBlockPool(const KvBlockPool&) = delete;
  KvBlockPool& operator=(const KvBlockPool&) = delete;

  static size_t BytesPerBlock(const ModelConfig& config, kernels::DType kv_dtype);
  static size_t BlocksFor(size_t tokens);

  /// Blocks for `tokens` positions. ResourceExhausted, naming both numbers, if fewer are free.
  absl::StatusOr<KvLease> Lease(size_t tokens);

  size_t total_blocks() const { return total_blocks_; }
  size_t free_blocks() const { return free_.size(); }
  double usage_ratio() const {
    return 1.0 - static_cast<double>(free_.size()) / static_cast<double>(total_blocks_);
  }

 private:
  friend class KvLease;
  KvBlockPool(std::byte* memory, size_t bytes, size_t block_bytes, size_t total_blocks);

  std::byte* const memory_;
  const size_t mapped_bytes_;
  const size_t block_bytes_;
  const size_t total_blocks_;
  std::vector<std::byte*> free_;  // a stack: the block freed last is the warmest
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_MODEL_KV_CACHE_H_
