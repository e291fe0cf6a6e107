#include "server/model_registry.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/status.h"

namespace firesteel::server {

ModelRegistry::Model ModelRegistry::Put(ServedModel model) {
  auto added = std::make_shared<const ServedModel>(std::move(model));
  MutexLock lock(&mutex_);
  for (Model& present : models_) {
    if (present->name == added->name) return std::exchange(present, std::move(added));
  }
  models_.push_back(std::move(added));
  return nullptr;
}

absl::StatusOr<ModelRegistry::Model> ModelRegistry::Replace(ServedModel model) {
  auto added = std::make_shared<const ServedModel>(std::move(model));
  MutexLock lock(&mutex_);
  for (Model& present : models_) {
    if (present->name == added->name) return std::exchange(present, std::move(added));
  }
  return ModelNotFound(added->name);
}

absl::StatusOr<ModelRegistry::Model> ModelRegistry::Remove(absl::string_view name) {
  MutexLock lock(&mutex_);
  const auto entry = std::find_if(models_.begin(), models_.end(),
                                  [&](const Model& model) { return name == model->name; });
  if (entry == models_.end()) return ModelNotFound(name);
  if (models_.size() == 1) {
    return Refusal(kLastModel, absl::StrCat("model: ", Quoted(name),
                                            " is the last one; load another one first"));
  }
  Model removed = std::move(*entry);
  models_.erase(entry);
  return removed;
}

absl::StatusOr<ModelRegistry::Model> ModelRegistry::Find(absl::string_view name) const {
  MutexLock lock(&mutex_);
  for (const Model& model : models_) {
    if (name.empty() || name == model->name) return model;
  }
  return ModelNotFound(name);
}

std::vector<ModelRegistry::Model> ModelRegistry::models() const {
  MutexLock lock(&mutex_);
  return models_;
}

}  // namespace firesteel::server
