#include "runtime/scheduler/engine.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/model/kv_cache.h"
#include "runtime/scheduler/engine_core.h"
#include "runtime/scheduler/transformer_runner.h"
#include "runtime/threading/cpu_topology.h"

namespace firesteel {
namespace {

/// The loop on a thread of its own.
class ThreadedEngine final : public EngineCore {
 public:
  explicit ThreadedEngine(Parts parts) : EngineCore(std::move(parts)), thread_([this] { Run(); }) {}
  ~ThreadedEngine() override {
    Stop();
    thread_.join();
  }

 private:
  std::thread thread_;
};

absl::Status CheckAtLeastOne(absl::string_view option, uint64_t value) {
  if (value >= 1) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(option, ": ", value, " is below 1"));
}

absl::Status CheckOptions(const EngineOptions& options) {
  for (const auto& [name, value] :
       {std::pair<const char*, uint64_t>{"max-batch-size", options.max_batch_size},
        {"max-batch-tokens", options.max_batch_tokens},
        {"max-queue-requests", options.max_queue_requests},
        {"max-queue-tokens", options.max_queue_tokens}}) {
    if (absl::Status status = CheckAtLeastOne(name, value); !status.ok()) return status;
  }
  if (options.max_batch_tokens < options.max_batch_size) {
    return absl::InvalidArgumentError(absl::StrCat("max-batch-tokens: ", options.max_batch_tokens,
                                                   " is below max-batch-size ",
                                                   options.max_batch_size));
  }
  if (options.ageing <= absl::ZeroDuration()) {
    return absl::InvalidArgumentError(
        absl::StrCat("ageing-seconds: ", absl::ToDoubleSeconds(options.ageing), " is not above 0"));
  }
  for (const auto& [name, value] :
       {std::pair<const char*, absl::Duration>{"max-queue-ms", options.max_queue_wait},
        {"target-itl-ms", options.target_itl}}) {
    if (value < absl::ZeroDuration()) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, ": ", absl::ToDoubleMilliseconds(value), " is below 0"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

size_t DefaultKvCacheBytes(const ModelConfig& config, kernels::DType kv_dtype,
                           uint32_t max_batch_size) {
  const size_t context = KvBlockPool::BlocksFor(config.max_position_embeddings) *
                         KvBlockPool::BytesPerBlock(config, kv_dtype);
  return std::max(context, std::min(context * max_batch_size, MemoryLimitBytes() / 4));
}

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(std::shared_ptr<const ModelWeights> weights,
                                                       std::shared_ptr<const Tokenizer> tokenizer,
                                                       ComputeType compute,
                                                       const EngineOptions& options,
                                                       WorkerPool* pool, EngineObserver* observer) {
  if (absl::Status status = CheckOptions(options); !status.ok()) return status;
  if (auto possible = ResolveComputeType(compute, weights->types); !possible.ok()) {
    return possible.status();
  }
  EngineOptions resolved = options;
  if (resolved.kv_cache_bytes == 0) {
    resolved.kv_cache_bytes =
        DefaultKvCacheBytes(weights->config, options.kv_dtype, options.max_batch_size);
  }
  if (!resolved.sublinear_head.has_value()) {
    resolved.sublinear_head = weights->embedding.bytes() > kSublinearHeadBytes;
  }
  auto kv_pool = KvBlockPool::Create(weights->config, resolved.kv_dtype, resolved.kv_cache_bytes);
  if (!kv_pool.ok()) return kv_pool.status();
  const uint32_t logit_rows =
      std::min(resolved.max_batch_tokens, resolved.max_batch_size + EngineCore::kMaxScoredTokens);
  auto runner = std::make_unique<TransformerRunner>(weights, compute, resolved, logit_rows, pool);
  return std::make_unique<ThreadedEngine>(EngineCore::Parts{.weights = std::move(weights),
                                                            .tokenizer = std::move(tokenizer),
                                                            .compute = compute,
                                                            .options = resolved,
                                                            .kv_pool = *std::move(kv_pool),
                                                            .runner = std::move(runner),
                                                            .observer = observer});
}

}  // namespace firesteel
