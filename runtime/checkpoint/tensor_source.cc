#include "runtime/checkpoint/tensor_source.h"

#include <set>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include "runtime/checkpoint/files.h"
#include "runtime/checkpoint/json_text.h"

namespace firesteel {
namespace {

constexpr char kSingleFile[] = "model.safetensors";
constexpr char kIndexFile[] = "model.safetensors.index.json";
constexpr size_t kMaxIndexBytes = 100'000'000;
constexpr size_t kMaxShards = 4096;  // each is an open mapping

using ShardTensors = std::map<std::string, std::set<std::string>>;  // file name → tensor names

bool IsPlainFileName(const std::string& name) {
  return !name.empty() && name != "." && name.find("..") == std::string::npos &&
         name.find('/') == std::string::npos && name.find('\0') == std::string::npos;
}

/// The index's weight_map, turned around.
absl::StatusOr<ShardTensors> ParseIndex(const std::string& text) {
  absl::StatusOr<nlohmann::json> index = ParseJsonObject(text);
  if (!index.ok()) return index.status();
  const auto map = index->find("weight_map");
  if (map == index->end() || !map->is_object()) {
    return absl::InvalidArgumentError("no object \"weight_map\"");
  }
  ShardTensors shards;
  for (const auto& [name, file] : map->items()) {
    if (!file.is_string() || !IsPlainFileName(file.get_ref<const std::string&>())) {
      return absl::InvalidArgumentError(
          absl::StrCat("\"weight_map\": tensor \"", Printable(name), "\" is in ",
                       JsonForMessage(file), ", which is no plain file name in this folder"));
    }
    shards[file.get_ref<const std::string&>()].insert(name);
    if (shards.size() > kMaxShards) {
      return absl::InvalidArgumentError(absl::StrCat("more than ", kMaxShards, " shards"));
    }
  }
  return shards;
}

/// The tensors of a shard must be exactly those that the index puts there.
absl::Status CheckShard(const SafetensorsFile& shard, const std::set<std::string>& wanted,
                        const std::string& index_path) {
  for (const std::string& name : wanted) {
    if (shard.tensors().count(name) == 0) {
      return absl::InvalidArgumentError(absl::StrCat(shard.path(), ": tensor \"", Printable(name),
                                                     "\" is not in it, though ", index_path,
                                                     " says so"));
    }
  }
  for (const auto& [name, tensor] : shard.tensors()) {
    if (wanted.count(name) == 0) {
      return absl::InvalidArgumentError(absl::StrCat(shard.path(), ": tensor \"", Printable(name),
                                                     "\" is in it, but not by ", index_path));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status TensorSource::AddSingle(const std::string& path) {
  absl::StatusOr<std::unique_ptr<SafetensorsFile>> file = SafetensorsFile::Open(path);
  if (!file.ok()) return file.status();
  for (const auto& [name, tensor] : (*file)->tensors()) tensors_.emplace(name, &tensor);
  files_.push_back(*std::move(file));
  return absl::OkStatus();
}

absl::Status TensorSource::AddShards(const std::string& folder, const std::string& index_path) {
  absl::StatusOr<std::string> text = ReadFile(index_path, kMaxIndexBytes);
  if (!text.ok()) return text.status();
  absl::StatusOr<ShardTensors> shards = ParseIndex(*text);
  if (!shards.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(index_path, ": ", shards.status().message()));
  }
  for (const auto& [name, wanted] : *shards) {
    const std::string path = JoinPath(folder, name);
    if (!PathExists(path)) {
      return absl::NotFoundError(
          absl::StrCat(path, ": there is no such shard, though ", index_path, " names it"));
    }
    if (absl::Status status = AddSingle(path); !status.ok()) return status;
    if (absl::Status status = CheckShard(*files_.back(), wanted, index_path); !status.ok()) {
      return status;
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<TensorSource>> TensorSource::Open(const std::string& folder) {
  const std::string single = JoinPath(folder, kSingleFile);
  const std::string index = JoinPath(folder, kIndexFile);
  auto source = std::make_unique<TensorSource>();
  absl::Status status;
  if (PathExists(single)) {
    source->path_ = single;
    status = source->AddSingle(single);
  } else if (PathExists(index)) {
    source->path_ = index;
    status = source->AddShards(folder, index);
  } else {
    status = absl::NotFoundError(
        absl::StrCat(folder, ": neither ", kSingleFile, " nor ", kIndexFile, " is in it"));
  }
  if (!status.ok()) return status;
  return source;
}

}  // namespace firesteel
