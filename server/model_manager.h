// Models that come, go and are replaced while a server serves.

#ifndef FIRESTEEL_SERVER_MODEL_MANAGER_H_
#define FIRESTEEL_SERVER_MODEL_MANAGER_H_

#include <cstdint>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "runtime/threading/mutex.h"
#include "server/model_registry.h"
#include "server/options.h"
#include "server/periodic_thread.h"

namespace firesteel::server {

/// From files to a model that is ready to serve.
using LoadFunction = std::function<absl::StatusOr<ServedModel>(const ModelSpec& spec)>;

/// Makes one change at a time, by a thread of its own: loading takes seconds to minutes, in which
/// everything else goes on. A model that was replaced or taken out finishes what it has begun.
/// Thread-safe. Destruction waits for the change under way.
class ModelManager {
 public:
  /// Called once, by the manager's thread, when the change is made or has failed.
  using Done = std::function<void(const absl::StatusOr<ModelRegistry::Model>&)>;

  /// `registry` outlives it. `changed` is called after every change. A retired model may run for
  /// `drain`.
  ModelManager(ModelRegistry* registry, LoadFunction load, std::function<void()> changed,
               absl::Duration drain);
  ~ModelManager();
  ModelManager(const ModelManager&) = delete;
  ModelManager& operator=(const ModelManager&) = delete;

  /// Each begins a change and calls `done` later, or refuses it at once: InvalidArgument, NotFound,
  /// FailedPrecondition, or Aborted while another change is under way.
  absl::Status Load(ModelSpec spec, Done done) ABSL_LOCKS_EXCLUDED(mutex_);
  absl::Status Reload(const std::string& name, Done done) ABSL_LOCKS_EXCLUDED(mutex_);

  /// Takes a model out at once.
  absl::Status Unload(const std::string& name) ABSL_LOCKS_EXCLUDED(mutex_);

  /// Has retired models finish what they have begun, or cancels it when `deadline` passes.
  void FinishRetired(absl::Time deadline) ABSL_LOCKS_EXCLUDED(mutex_);

  /// Loads all models again from where they came from, one after another; says in the log how that
  /// went.
  /// Where something is being loaded already, it comes after that; however often it is asked for
  /// meanwhile, once.
  absl::Status ReloadAll() ABSL_LOCKS_EXCLUDED(mutex_);

  /// From now on changes are refused with Unavailable, and a model that is being loaded will not be
  /// put in: a server that drains takes no new one.
  void Close() ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  struct Retired {
    ModelRegistry::Model model;
    absl::Time deadline;
    bool cancelled = false;
  };
  using Job = std::function<void()>;
  // Whether a name may be new, or must still be there when its model has been loaded.
  enum class LoadKind : uint8_t { kNew, kAgain };

  absl::Status Begin(Job job) ABSL_LOCKS_EXCLUDED(mutex_);
  void Main() ABSL_LOCKS_EXCLUDED(mutex_);
  absl::Status BeginLoad(ModelSpec spec, LoadKind kind, Done done) ABSL_LOCKS_EXCLUDED(mutex_);
  absl::StatusOr<ModelRegistry::Model> LoadNow(const ModelSpec& spec, LoadKind kind)
      ABSL_LOCKS_EXCLUDED(mutex_);
  void ReloadNow() ABSL_LOCKS_EXCLUDED(mutex_);
  // Whether another one was replaced.
  absl::StatusOr<bool> PutIn(ServedModel model, LoadKind kind) ABSL_LOCKS_EXCLUDED(mutex_);
  void Retire(ModelRegistry::Model model) ABSL_LOCKS_EXCLUDED(mutex_);
  void FreeRetired() ABSL_LOCKS_EXCLUDED(mutex_);

  ModelRegistry* const registry_;
  const LoadFunction load_;
  const std::function<void()> changed_;
  const absl::Duration drain_;

  Mutex mutex_;
  CondVar work_;
  Job job_ ABSL_GUARDED_BY(mutex_);
  bool busy_ ABSL_GUARDED_BY(mutex_) = false;
  bool reload_again_ ABSL_GUARDED_BY(mutex_) = false;  // once nothing is being loaded
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<Retired> retired_ ABSL_GUARDED_BY(mutex_);
  PeriodicThread reaper_;
  std::thread thread_;  // last: it uses the others
};

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_MODEL_MANAGER_H_
