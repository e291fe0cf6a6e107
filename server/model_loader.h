// From checkpoint folders and packed files to engines that are ready to serve.

#ifndef FIRESTEEL_SERVER_MODEL_LOADER_H_
#define FIRESTEEL_SERVER_MODEL_LOADER_H_

#include <memory>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "runtime/threading/worker_pool.h"
#include "server/metrics.h"
#include "server/model_registry.h"
#include "server/options.h"

namespace firesteel::server {

/// What a server serves; each outlives what stands below it.
struct LoadedModels {
  std::unique_ptr<WorkerPool> pool;
  std::unique_ptr<ServerMetrics> metrics;
  std::unique_ptr<ModelRegistry> registry;
};

/// Loads one model, with the options that its name has in `options`; its time series join
/// `metrics`. The status names the option and the model.
/// `pool` and `metrics` outlive it.
absl::StatusOr<ServedModel> LoadModel(const ModelSpec& spec, const ServerOptions& options,
                                      WorkerPool* pool, ServerMetrics* metrics);

/// Loads every model of the options onto one pool of threads. The status names the option and the
/// model.
absl::StatusOr<LoadedModels> LoadModels(const ServerOptions& options);

/// Generates `max_tokens` greedily after a bos token and waits for it. How long it took.
absl::StatusOr<absl::Duration> GenerateOnce(const ServedModel& model, uint32_t max_tokens);

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_MODEL_LOADER_H_
