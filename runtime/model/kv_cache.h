// The keys and values of all running sequences and of prompts seen before, in blocks of a fixed
// number of positions.

#ifndef FIRESTEEL_RUNTIME_MODEL_KV_CACHE_H_
#define FIRESTEEL_RUNTIME_MODEL_KV_CACHE_H_

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/attention.h"
#include "kernels/tensor.h"
#include "runtime/checkpoint/model_config.h"

namespace firesteel {

/// How the query heads of this model read a cache whose elements are of `kv_dtype`.
kernels::AttentionShape AttentionShapeOf(const ModelConfig& config, kernels::DType kv_dtype);

class KvBlockPool;

/// A prompt, as the pool knows it: nothing is shared between prompts that differ in `owner`, so
/// that who asks finds out nothing, by timing, about what others asked.
struct CachedPrompt {
  absl::string_view owner;
  std::span<const int32_t> tokens;
};

/// How much of a prompt is in the prefix cache.
struct PublishedPrefix {
  size_t blocks = 0;
  size_t in_use = 0;  // blocks that leases hold: taking those over costs the pool nothing
};

/// The blocks of one sequence, given back to their pool on destruction. Movable. Position p of the
/// sequence lives in block p / kernels::kKvBlockTokens. Blocks may be shared with other leases;
/// shared ones are only read.
class KvLease {
 public:
  KvLease() = default;
  KvLease(KvLease&& other) noexcept;
  KvLease& operator=(KvLease&& other) noexcept;
  ~KvLease();

  /// Positions that fit.
  size_t capacity_tokens() const { return blocks_.size() * kernels::kKvBlockTokens; }
  std::span<std::byte* const> blocks() const { return blocks_; }

  /// Another sequence that begins with the same blocks.
  KvLease Share() const;

  /// Blocks that PrepareWrite(begin, end) would take from the pool.
  size_t BlocksToWrite(size_t begin, size_t end) const;
  /// Makes positions [begin, end) writable: a shared block among them is copied, missing ones are
  /// added. All before `begin` are there. False, and nothing changes, if the pool has too few.
  bool PrepareWrite(size_t begin, size_t end);
  /// Blocks that so many leases hold, this one among them.
  size_t NumHeldBy(size_t holders) const;

 private:
  friend class KvBlockPool;
  explicit KvLease(KvBlockPool* pool) : pool_(pool) {}
  void Append(uint32_t block);

  KvBlockPool* pool_ = nullptr;
  std::vector<uint32_t> ids_;
  std::vector<std::byte*> blocks_;  // of ids_
  // The first num_published_ blocks are in the prefix cache; the entry of the last one.
  size_t num_published_ = 0;
  uint64_t last_entry_ = 0;
};

/// A fixed number of blocks out of one reservation of address space; pages are backed by memory
/// when first written. Not thread-safe: the scheduler's thread owns it. Outlives its leases.
///
/// A block holds, for each layer and key/value head, what kernels::AttentionShape describes. bf16
/// halves what attention reads and doubles what fits; f32 keeps keys and values as computed.
///
/// Whole blocks of prompts can be published: they stay when their leases are gone, until the pool
/// needs them for something else (least recently used first), and a later prompt that begins with
/// the same tokens takes them over. An entry's key is the entry before it and its own tokens, all
/// of them: what is found is the same prompt, not one with the same hash.
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

  /// Blocks for `tokens` positions. ResourceExhausted, naming both numbers, if fewer are available.
  absl::StatusOr<KvLease> Lease(size_t tokens);

  /// The longest published beginning of a prompt, in whole blocks.
  KvLease LeasePublished(const CachedPrompt& prompt);
  /// What LeasePublished would find.
  PublishedPrefix FindPublished(const CachedPrompt& prompt) const;
  /// Publishes the whole blocks among the first `computed` positions of the lease, which hold the
  /// beginning of `prompt`. Where the same content was published meanwhile, the lease takes over
  /// that block and gives its own back.
  void Publish(const CachedPrompt& prompt, size_t computed, KvLease* lease);
  /// Forgets all published blocks that nobody holds.
  void EvictAll();

  size_t total_blocks() const { return blocks_.size(); }
  /// Blocks that no lease holds. Some of them may be published.
  size_t available_blocks() const { return free_.size() + evictable_.size(); }
  /// Of those, the published ones.
  size_t cached_blocks() const { return evictable_.size(); }
  double usage_ratio() const {
    return 1.0 - static_cast<double>(available_blocks()) / static_cast<double>(total_blocks());
  }

 private:
  friend class KvLease;
  struct Block {
    uint32_t holders = 0;                 // leases
    uint64_t entry = 0;                   // of the prefix cache; 0: not published
    std::string key;                      // of the entry; does not move while it is published
    std::list<uint32_t>::iterator place;  // in evictable_, where published and without holders
  };
  KvBlockPool(std::byte* memory, size_t bytes, size_t block_bytes, size_t total_blocks);

  std::byte* Data(uint32_t block) const { return memory_ + block * block_bytes_; }
  uint32_t Take();  // available_blocks() > 0
  void Hold(uint32_t block);
  void Release(uint32_t block);
  void Unpublish(uint32_t block);
  // Calls found(block) for each published block from the beginning of a prompt on.
  template <typename Found>
  void Walk(const CachedPrompt& prompt, const Found& found) const;

  std::byte* const memory_;
  const size_t mapped_bytes_;
  const size_t block_bytes_;
  std::vector<Block> blocks_;
  std::vector<uint32_t> free_;     // a stack: the block freed last is the warmest
  std::list<uint32_t> evictable_;  // published, without holders; least recently used first
  absl::flat_hash_map<absl::string_view, uint32_t> published_;  // by key, which the block owns
  uint64_t last_entry_ = 0;  // entries are numbered, and no number is used twice
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_MODEL_KV_CACHE_H_
