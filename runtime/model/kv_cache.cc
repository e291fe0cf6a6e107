#include "runtime/model/kv_cache.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace firesteel {

kernels::AttentionShape AttentionShapeOf(const ModelConfig& config, kernels::DType kv_dtype) {
  kernels::AttentionShape shape;
  shape.head_dim = config.head_dim;
  shape.predictor_dim = config.spark() ? config.attention_predictor_dim : config.head_dim;
  shape.top_k = config.spark() ? config.attention_top_k : 0;
  shape.scale = static_cast<float>(1.0 / std::sqrt(config.query_pre_attn_scalar));
  shape.softcap = static_cast<float>(config.attn_logit_softcapping);
  shape.kv_dtype = kv_dtype;
  return shape;
}

namespace {

constexpr size_t kTokens = kernels::kKvBlockTokens;

// The key of the `index`-th block of a prompt, behind entry `before` (0 for the first, which names
// the owner instead).
std::string KeyOf(const CachedPrompt& prompt, size_t index, uint64_t before) {
  std::string key(reinterpret_cast<const char*>(&before), sizeof(before));
  key.append(reinterpret_cast<const char*>(prompt.tokens.data() + index * kTokens),
             kTokens * sizeof(int32_t));
  if (before == 0) key.append(prompt.owner.data(), prompt.owner.size());
  return key;
}

}  // namespace

KvLease::KvLease(KvLease&& other) noexcept { *this = std::move(other); }

KvLease& KvLease::operator=(KvLease&& other) noexcept {
  std::swap(pool_, other.pool_);
  std::swap(ids_, other.ids_);
  std::swap(blocks_, other.blocks_);
  std::swap(num_published_, other.num_published_);
  std::swap(last_entry_, other.last_entry_);
  return *this;
}

// The last block first: of a prompt that stays in the cache, the end is forgotten before the
// beginning, without which it could not be found.
KvLease::~KvLease() {
  for (size_t i = ids_.size(); i > 0; --i) pool_->Release(ids_[i - 1]);
}

void KvLease::Append(uint32_t block) {
  ids_.push_back(block);
  blocks_.push_back(pool_->Data(block));
}

KvLease KvLease::Share() const {
  KvLease other(pool_);
  for (const uint32_t block : ids_) {
    pool_->Hold(block);
    other.Append(block);
  }
  other.num_published_ = num_published_;
  other.last_entry_ = last_entry_;
  return other;
}

size_t KvLease::BlocksToWrite(size_t begin, size_t end) const {
  const size_t needed = KvBlockPool::BlocksFor(end);
  size_t taken = needed - std::min(needed, ids_.size());
  for (size_t i = begin / kTokens; i < std::min(needed, ids_.size()); ++i) {
    if (pool_->blocks_[ids_[i]].holders > 1) ++taken;
  }
  return taken;
}

bool KvLease::PrepareWrite(size_t begin, size_t end) {
  if (BlocksToWrite(begin, end) > pool_->available_blocks()) return false;
  const size_t needed = KvBlockPool::BlocksFor(end);
  for (size_t i = begin / kTokens; i < std::min(needed, ids_.size()); ++i) {
    if (pool_->blocks_[ids_[i]].holders == 1) continue;
    const uint32_t copy = pool_->Take();
    std::memcpy(pool_->Data(copy), blocks_[i], pool_->block_bytes_);
    pool_->Release(ids_[i]);
    ids_[i] = copy;
    blocks_[i] = pool_->Data(copy);
  }
  while (ids_.size() < needed) Append(pool_->Take());
  return true;
}

size_t KvLease::NumHeldBy(size_t holders) const {
  return static_cast<size_t>(std::count_if(ids_.begin(), ids_.end(), [&](uint32_t block) {
    return pool_->blocks_[block].holders == holders;
  }));
}

size_t KvBlockPool::BytesPerBlock(const ModelConfig& config, kernels::DType kv_dtype) {
  return config.num_layers * config.num_kv_heads * AttentionShapeOf(config, kv_dtype).BlockBytes();
}

size_t KvBlockPool::BlocksFor(size_t tokens) {
  return (tokens + kernels::kKvBlockTokens - 1) / kernels::kKvBlockTokens;
}

absl::StatusOr<std::unique_ptr<KvBlockPool>> KvBlockPool::Create(const ModelConfig& config,
                                                                 kernels::DType kv_dtype,
                                                                 size_t bytes) {
  const size_t block_bytes = BytesPerBlock(config, kv_dtype);
  const size_t blocks = bytes / block_bytes;
  if (blocks == 0) {
    return absl::ResourceExhaustedError(
        absl::StrCat("kv-cache-bytes ", bytes, " is less than one block of ",
                     kernels::kKvBlockTokens, " tokens, ", block_bytes, " bytes"));
  }
  const size_t mapped = blocks * block_bytes;
  void* memory = mmap(nullptr, mapped, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    return absl::ResourceExhaustedError(
        absl::StrCat("kv-cache-bytes ", bytes, ": the system refuses that much address space"));
  }
  madvise(memory, mapped, MADV_HUGEPAGE);  // a hint: attention gathers rows from all over the cache
  return std::unique_ptr<KvBlockPool>(
      new KvBlockPool(static_cast<std::byte*>(memory), mapped, block_bytes, blocks));
}

KvBlockPool::KvBlockPool(std::byte* memory, size_t bytes, size_t block_bytes, size_t total_blocks)
    : memory_(memory), mapped_bytes_(bytes), block_bytes_(block_bytes), blocks_(total_blocks) {
  free_.reserve(total_blocks);
  for (size_t i = total_blocks; i > 0; --i) free_.push_back(static_cast<uint32_t>(i - 1));
}

KvBlockPool::~KvBlockPool() { munmap(memory_, mapped_bytes_); }

absl::StatusOr<KvLease> KvBlockPool::Lease(size_t tokens) {
  KvLease lease(this);
  if (lease.PrepareWrite(0, tokens)) return lease;
  return absl::ResourceExhaustedError(absl::StrCat(tokens, " tokens need ", BlocksFor(tokens),
                                                   " KV blocks, ", available_blocks(),
                                                   " are available"));
}

uint32_t KvBlockPool::Take() {
  if (free_.empty()) {
    const uint32_t oldest = evictable_.front();
    evictable_.pop_front();
    Unpublish(oldest);
    free_.push_back(oldest);
  }
  const uint32_t block = free_.back();
  free_.pop_back();
  blocks_[block].holders = 1;
  return block;
}

void KvBlockPool::Hold(uint32_t block) {
  Block& b = blocks_[block];
  if (b.holders++ == 0) evictable_.erase(b.place);
}

void KvBlockPool::Release(uint32_t block) {
  Block& b = blocks_[block];
  if (--b.holders > 0) return;
  if (b.entry == 0) {
    free_.push_back(block);
  } else {
    b.place = evictable_.insert(evictable_.end(), block);
  }
}

void KvBlockPool::Unpublish(uint32_t block) {
  Block& b = blocks_[block];
  published_.erase(b.key);
  b.entry = 0;
  b.key.clear();
}

void KvBlockPool::EvictAll() {
  for (const uint32_t block : evictable_) {
    Unpublish(block);
    free_.push_back(block);
  }
  evictable_.clear();
}

template <typename Found>
void KvBlockPool::Walk(const CachedPrompt& prompt, const Found& found) const {
  uint64_t before = 0;
  for (size_t i = 0; (i + 1) * kTokens <= prompt.tokens.size(); ++i) {
    const auto it = published_.find(KeyOf(prompt, i, before));
    if (it == published_.end()) return;
    before = blocks_[it->second].entry;
    found(it->second);
  }
}

KvLease KvBlockPool::LeasePublished(const CachedPrompt& prompt) {
  KvLease lease(this);
  Walk(prompt, [&](uint32_t block) {
    Hold(block);
    lease.Append(block);
    ++lease.num_published_;
    lease.last_entry_ = blocks_[block].entry;
  });
  return lease;
}

PublishedPrefix KvBlockPool::FindPublished(const CachedPrompt& prompt) const {
  PublishedPrefix prefix;
  Walk(prompt, [&](uint32_t block) {
    ++prefix.blocks;
    if (blocks_[block].holders > 0) ++prefix.in_use;
  });
  return prefix;
}

void KvBlockPool::Publish(const CachedPrompt& prompt, size_t computed, KvLease* lease) {
  const size_t whole = std::min(computed, prompt.tokens.size()) / kTokens;
  for (size_t& i = lease->num_published_; i < whole; ++i) {
    uint32_t& id = lease->ids_[i];
    std::string key = KeyOf(prompt, i, lease->last_entry_);
    if (const auto it = published_.find(key); it != published_.end()) {
      const uint32_t same = it->second;
      Hold(same);
      Release(id);
      id = same;
      lease->blocks_[i] = Data(same);
    } else {
      Block& b = blocks_[id];
      b.entry = ++last_entry_;
      b.key = std::move(key);
      published_.emplace(b.key, id);
    }
    lease->last_entry_ = blocks_[id].entry;
  }
}

}  // namespace firesteel
