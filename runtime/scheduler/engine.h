// The serving engine of one model: a bounded queue, a scheduler thread and a continuously batched
// runtime.

#ifndef FIRESTEEL_RUNTIME_SCHEDULER_ENGINE_H_
#define FIRESTEEL_RUNTIME_SCHEDULER_ENGINE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kernels/tensor.h"
#include "runtime/checkpoint/model_config.h"
#include "runtime/checkpoint/weights.h"
#include "runtime/model/compute_type.h"
#include "runtime/scheduler/clock.h"
#include "runtime/scheduler/observer.h"
#include "runtime/scheduler/request.h"
#include "runtime/threading/worker_pool.h"
#include "runtime/tokenizer/tokenizer.h"

namespace firesteel {

/// Limits are checked by Engine::Create; each is at least 1 unless it says otherwise.
struct EngineOptions {
  uint32_t max_batch_size = 32;     // sequences that run at once
  uint32_t max_batch_tokens = 256;  // rows of a step, decodes and prefill chunk; ≥ max_batch_size
  uint32_t max_queue_requests = 1024;    // waiting requests; one more is refused
  uint32_t max_queue_tokens = 1u << 20;  // prompt tokens of waiting requests; more are refused
  /// A request is refused whose turn would come later than this, as estimated from what steps took.
  /// Its client's place in the queue counts, not only the queue's length. Zero: any wait will do.
  absl::Duration max_queue_wait = absl::ZeroDuration();
  size_t kv_cache_bytes = 0;                        // 0: DefaultKvCacheBytes
  kernels::DType kv_dtype = kernels::DType::kBF16;  // how the cache holds keys and values
  /// Whether prompts are kept for later ones that begin alike.
  bool prefix_cache = true;
  /// Whether requests are admitted by what they take of the cache at first, not by their worst
  /// case. More run at once; where the cache gets full, the last admitted lose their blocks and are
  /// computed anew later.
  bool optimistic_admission = false;
  /// Who has waited for so long at the head of a client's line goes before every priority; > 0.
  absl::Duration ageing = absl::Seconds(10);
  /// Steps in which sequences decode should not take longer: prefill chunks shrink to that end.
  /// Zero: in proportion to what they take without prompts, as measured (kPromptShare).
  absl::Duration target_itl = absl::ZeroDuration();
  /// Whether tokens that the largest logits decide (greedy, top-k up to SublinearHead::kMaxTopK)
  /// take an output head that reads a 2-bit copy of the embedding. Unset: where the embedding is
  /// larger than kSublinearHeadBytes.
  std::optional<bool> sublinear_head;
  const Clock* clock = Clock::Real();  // outlives the engine
};

/// Smaller embeddings fit the caches of servers, beside which a second copy gains little.
inline constexpr size_t kSublinearHeadBytes = size_t{64} << 20;

/// A running engine. Thread-safe. Destruction stops the thread and ends what runs with kCancelled.
class Engine {
 public:
  using RequestHandle = uint64_t;

  /// `pool` and `observer` outlive the engine. InvalidArgument for options out of bounds (names the
  /// option).
  static absl::StatusOr<std::unique_ptr<Engine>> Create(std::shared_ptr<const ModelWeights> weights,
                                                        std::shared_ptr<const Tokenizer> tokenizer,
                                                        ComputeType compute,
                                                        const EngineOptions& options,
                                                        WorkerPool* pool, EngineObserver* observer);
  virtual ~Engine() = default;

  /// Queues a request, or refuses it before any work and never calls the sink:
  /// InvalidArgument (prompt and limits), ResourceExhausted (queue, tokens, wait, KV), Unavailable
  /// (draining), DeadlineExceeded (at the speed measured so far its deadline can't be met; the
  /// message has the estimate). A ResourceExhausted that may pass carries the payload
  /// kRetryAfterPayload.
  virtual absl::StatusOr<RequestHandle> Submit(GenerationRequest request,
                                               std::shared_ptr<GenerationSink> sink) = 0;

  /// The request leaves the batch at the next step, with kCancelled. Unknown handles are ignored.
  virtual void Cancel(RequestHandle handle) = 0;

  /// Refuses new requests from now on; running and queued ones go on.
  virtual void BeginDrain() = 0;
  /// Waits until nothing runs or waits, or the deadline passes (then cancels what is left and waits
  /// for that). True if nothing had to be cancelled.
  virtual bool FinishDrain(absl::Time deadline) = 0;

  /// False if work waits and no step was completed for `limit`.
  virtual bool MakingProgress(absl::Duration limit) const = 0;

  virtual EngineGauges gauges() const = 0;
  virtual const ModelWeights& weights() const = 0;
  virtual const Tokenizer& tokenizer() const = 0;
  virtual const EngineOptions& options() const = 0;  // all resolved
  virtual ComputeType compute_type() const = 0;
  virtual size_t kv_capacity_tokens() const = 0;
};

/// Room for max_batch_size sequences of a whole context each, but at most a quarter of the memory
/// this process may use, and at least one context.
size_t DefaultKvCacheBytes(const ModelConfig& config, kernels::DType kv_dtype,
                           uint32_t max_batch_size);

/// Payload type URL on a ResourceExhausted status; the payload is the suggested wait in
/// milliseconds, decimal.
inline constexpr char kRetryAfterPayload[] = "firesteel/retry-after-ms";

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_SCHEDULER_ENGINE_H_
