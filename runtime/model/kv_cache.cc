#include "runtime/model/kv_cache.h"

#include <sys/mman.h>

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

KvLease::KvLease(KvBlockPool* pool, std::vector<std::byte*> blocks)
    : pool_(pool), blocks_(std::move(blocks)) {}

KvLease::KvLease(KvLease&& other) noexcept
    : pool_(std::exchange(other.pool_, nullptr)), blocks_(std::exchange(other.blocks_, {})) {}

KvLease& KvLease::operator=(KvLease&& other) noexcept {
  std::swap(pool_, other.pool_);
  std::swap(blocks_, other.blocks_);
  return *this;
}

KvLease::~KvLease() {
  if (pool_ != nullptr) pool_->free_.insert(pool_->free_.end(), blocks_.begin(), blocks_.end());
}

void KvLease::CopyFrom(const KvLease& other, size_t tokens) {
  for (size_t i = 0; i < KvBlockPool::BlocksFor(tokens); ++i) {
    std::memcpy(blocks_[i], other.blocks_[i], pool_->block_bytes_);
  }
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
    : memory_(memory),
      mapped_bytes_(bytes),
      block_bytes_(block_bytes),
      total_blocks_(total_blocks) {
  free_.reserve(total_blocks);
  for (size_t i = total_blocks; i > 0; --i) free_.push_back(memory_ + (i - 1) * block_bytes);
}

KvBlockPool::~KvBlockPool() { munmap(memory_, mapped_bytes_); }

absl::StatusOr<KvLease> KvBlockPool::Lease(size_t tokens) {
  const size_t blocks = BlocksFor(tokens);
  if (blocks > free_.size()) {
    return absl::ResourceExhaustedError(
        absl::StrCat(tokens, " tokens need ", blocks, " KV blocks, ", free_.size(), " are free"));
  }
  std::vector<std::byte*> taken(free_.end() - static_cast<ptrdiff_t>(blocks), free_.end());
  free_.resize(free_.size() - blocks);
  return KvLease(this, std::move(taken));
}

}  // namespace firesteel
