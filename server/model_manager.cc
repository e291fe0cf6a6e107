#include "server/model_manager.h"

#include <exception>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/logging.h"
#include "server/status.h"

namespace firesteel::server {
namespace {

constexpr absl::Duration kReapPeriod = absl::Milliseconds(100);
// How long a load takes depends on the model; this is when to ask again.
constexpr absl::Duration kBusyRetry = absl::Seconds(5);

absl::Status CheckModelSpec(const ModelSpec& spec) {
  FieldViolations violations;
  if (!IsModelName(spec.name)) {
    violations.Add("name", absl::StrCat("is ", Quoted(spec.name),
                                        "; must be of letters, digits and -_.:/, at most 128"));
  }
  if (spec.path.empty()) violations.Add("path", "is empty; a folder or a packed file is needed");
  return violations.ToStatus();
}

}  // namespace

ModelManager::ModelManager(ModelRegistry* registry, LoadFunction load,
                           std::function<void()> changed, absl::Duration drain)
    : registry_(registry),
      load_(std::move(load)),
      changed_(std::move(changed)),
      drain_(drain),
      reaper_(kReapPeriod, [this] { FreeRetired(); }),
      thread_([this] { Main(); }) {}

ModelManager::~ModelManager() {
  Close();
  thread_.join();
}

void ModelManager::Close() {
  MutexLock lock(&mutex_);
  stopping_ = true;
  work_.NotifyAll();
}

absl::Status ModelManager::Begin(Job job) {
  MutexLock lock(&mutex_);
  if (stopping_) return Refusal(kDraining, "the server is shutting down");
  if (busy_) {
    return WithRetryDelay(Refusal(kLoadInProgress, "another model is being loaded"), kBusyRetry);
  }
  busy_ = true;
  job_ = std::move(job);
  work_.NotifyAll();
  return absl::OkStatus();
}

void ModelManager::Main() {
  while (true) {
    Job job;
    {
      MutexLock lock(&mutex_);
      while (!stopping_ && job_ == nullptr) work_.Wait(&mutex_);
      if (job_ == nullptr) return;
      job = std::exchange(job_, nullptr);
    }
    job();
    MutexLock lock(&mutex_);
    if (!reload_again_ || busy_ || stopping_) continue;
    reload_again_ = false;
    busy_ = true;
    job_ = [this] { ReloadNow(); };
  }
}

absl::StatusOr<bool> ModelManager::PutIn(ServedModel model, LoadKind kind) {
  ModelRegistry::Model old;
  {
    MutexLock lock(&mutex_);
    if (stopping_) return Refusal(kDraining, "the server is shutting down");
    if (kind == LoadKind::kNew) {
      old = registry_->Put(std::move(model));
    } else {
      auto replaced = registry_->Replace(std::move(model));  // unless it was unloaded meanwhile
      if (!replaced.ok()) return replaced.status();
      old = *std::move(replaced);
    }
  }
  if (old == nullptr) return false;
  Retire(std::move(old));
  return true;
}

absl::StatusOr<ModelRegistry::Model> ModelManager::LoadNow(const ModelSpec& spec, LoadKind kind) {
  absl::StatusOr<ServedModel> loaded;
  try {
    loaded = load_(spec);
  } catch (const std::exception& e) {
    loaded = absl::InternalError(e.what());
  }
  if (!loaded.ok()) {
    Log(LogLevel::kError, "model not loaded",
        {{"model", spec.name}, {"error", std::string(loaded.status().message())}});
    return Refusal(kModelNotLoadable, loaded.status().message());
  }
  const auto replaced = PutIn(*std::move(loaded), kind);
  if (!replaced.ok()) return replaced.status();
  changed_();
  Log(LogLevel::kInfo, *replaced ? "model replaced" : "model added",
      {{"model", spec.name}, {"path", spec.path}});
  return registry_->Find(spec.name);
}

absl::Status ModelManager::Load(ModelSpec spec, Done done) {
  if (absl::Status status = CheckModelSpec(spec); !status.ok()) return status;
  return BeginLoad(std::move(spec), LoadKind::kNew, std::move(done));
}

absl::Status ModelManager::BeginLoad(ModelSpec spec, LoadKind kind, Done done) {
  return Begin([this, spec = std::move(spec), kind, done = std::move(done)] {
    const auto model = LoadNow(spec, kind);
    {
      MutexLock lock(&mutex_);
      busy_ = false;
    }
    done(model);
  });
}

absl::Status ModelManager::Reload(const std::string& name, Done done) {
  const auto model = registry_->Find(name);
  if (!model.ok()) return model.status();
  return BeginLoad({.name = (*model)->name, .path = (*model)->path}, LoadKind::kAgain,
                   std::move(done));
}

absl::Status ModelManager::ReloadAll() {
  {
    MutexLock lock(&mutex_);
    // Files may have changed behind what is being loaded now.
    if (busy_ && !stopping_) {
      reload_again_ = true;
      return absl::OkStatus();
    }
  }
  return Begin([this] { ReloadNow(); });
}

void ModelManager::ReloadNow() {
  for (const auto& model : registry_->models()) {
    // What went wrong is in the log; the old one serves on.
    const auto ignored = LoadNow({.name = model->name, .path = model->path}, LoadKind::kAgain);
  }
  MutexLock lock(&mutex_);
  busy_ = false;
}

absl::Status ModelManager::Unload(const std::string& name) {
  if (name.empty()) return InvalidField("name", "is empty; the model to unload must be named");
  absl::StatusOr<ModelRegistry::Model> removed;
  {
    MutexLock lock(&mutex_);
    if (stopping_) return Refusal(kDraining, "the server is shutting down");
    removed = registry_->Remove(name);
  }
  if (!removed.ok()) return removed.status();
  Retire(*std::move(removed));
  changed_();
  Log(LogLevel::kInfo, "model unloaded", {{"model", name}});
  return absl::OkStatus();
}

// A request on its way to the model may still find it draining; it then goes to its successor.
void ModelManager::Retire(ModelRegistry::Model model) {
  model->engine->BeginDrain();
  MutexLock lock(&mutex_);
  retired_.push_back({std::move(model), absl::Now() + drain_});
}

void ModelManager::FinishRetired(absl::Time deadline) {
  std::vector<ModelRegistry::Model> models;
  {
    MutexLock lock(&mutex_);
    for (const Retired& retired : retired_) models.push_back(retired.model);
  }
  for (const auto& model : models) model->engine->FinishDrain(deadline);
}

// A model is freed here and nowhere else: an engine must not end on its own thread, on which the
// last of its requests may let go of it.
void ModelManager::FreeRetired() {
  std::vector<ModelRegistry::Model> unused;
  std::vector<ModelRegistry::Model> overdue;
  {
    MutexLock lock(&mutex_);
    std::erase_if(retired_, [&unused](Retired& retired) {
      if (retired.model.use_count() > 1) return false;
      unused.push_back(std::move(retired.model));
      return true;
    });
    for (Retired& retired : retired_) {
      if (retired.cancelled || absl::Now() < retired.deadline) continue;
      retired.cancelled = true;
      overdue.push_back(retired.model);
    }
  }
  for (const auto& model : overdue) model->engine->FinishDrain(absl::InfinitePast());
}

}  // namespace firesteel::server
