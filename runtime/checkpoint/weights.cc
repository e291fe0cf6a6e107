#include "runtime/checkpoint/weights.h"

#include <memory>
#include <new>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "runtime/checkpoint/packed_file.h"
#include "runtime/checkpoint/weight_source.h"

namespace firesteel {
namespace {

absl::StatusOr<std::shared_ptr<const ModelWeights>> Load(const std::string& path,
                                                         WeightFormat format, WeightMemory memory,
                                                         size_t threads) {
  absl::StatusOr<std::unique_ptr<WeightSource>> source =
      IsPackedFile(path) ? OpenPackedSource(path, format, memory)
                         : OpenFolderSource(path, format, threads);
  if (!source.ok()) return source.status();
  return AssembleWeights(source->get(), threads);
}

}  // namespace

size_t ModelWeights::bytes() const {
  size_t total = embedding.bytes();
  for (const LayerWeights& layer : layers) {
    total += layer.qkv_proj.bytes() + layer.o_proj.bytes() + layer.gate_proj.bytes() +
             layer.up_proj.bytes() + layer.down_proj.bytes();
  }
  return total;
}

absl::StatusOr<std::shared_ptr<const ModelWeights>> LoadWeights(const std::string& path,
                                                                WeightFormat format,
                                                                WeightMemory memory,
                                                                size_t threads) {
  constexpr char kNoMemory[] = ": not enough memory to load it";
  try {
    auto weights = Load(path, format, memory, threads);
    if (absl::IsResourceExhausted(weights.status())) {
      return absl::ResourceExhaustedError(absl::StrCat(path, kNoMemory));
    }
    return weights;
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError(absl::StrCat(path, kNoMemory));
  }
}

}  // namespace firesteel
