#include "server/model_registry.h"

#include <utility>

#include "server/status.h"

namespace firesteel::server {

void ModelRegistry::Add(ServedModel model) {
  models_.push_back(std::make_unique<ServedModel>(std::move(model)));
}

absl::StatusOr<const ServedModel*> ModelRegistry::Find(absl::string_view name) const {
  for (const auto& model : models_) {
    if (name.empty() || name == model->name) return model.get();
  }
  return ModelNotFound(name);
}

}  // namespace firesteel::server
