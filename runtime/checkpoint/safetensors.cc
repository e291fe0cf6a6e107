#include "runtime/checkpoint/safetensors.h"

#include <algorithm>
#include <cstring>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include "runtime/checkpoint/json_text.h"

namespace firesteel {
namespace {

constexpr size_t kSizeBytes = 8;
constexpr size_t kMaxHeaderBytes = 100'000'000;  // the format's own limit
constexpr size_t kMaxRank = 8;

struct TypeInfo {
  const char* name;
  StoredType type;
  size_t bytes;
};

constexpr TypeInfo kTypes[] = {
    {"BF16", StoredType::kBF16, 2},     {"F16", StoredType::kF16, 2},
    {"F32", StoredType::kF32, 4},       {"F64", StoredType::kOther, 8},
    {"BOOL", StoredType::kOther, 1},    {"U8", StoredType::kOther, 1},
    {"I8", StoredType::kOther, 1},      {"F8_E5M2", StoredType::kOther, 1},
    {"F8_E4M3", StoredType::kOther, 1}, {"I16", StoredType::kOther, 2},
    {"U16", StoredType::kOther, 2},     {"I32", StoredType::kOther, 4},
    {"U32", StoredType::kOther, 4},     {"I64", StoredType::kOther, 8},
    {"U64", StoredType::kOther, 8},
};

const TypeInfo* FindType(const std::string& name) {
  for (const TypeInfo& info : kTypes) {
    if (name == info.name) return &info;
  }
  return nullptr;
}

absl::Status Bad(absl::string_view what) { return absl::InvalidArgumentError(what); }

/// The JSON text between the size and the data.
absl::StatusOr<absl::string_view> HeaderText(std::span<const std::byte> file) {
  if (file.size() < kSizeBytes) {
    return Bad(
        absl::StrCat("truncated: ", file.size(), " bytes, a header size takes ", kSizeBytes));
  }
  uint64_t size = 0;
  for (size_t i = 0; i < kSizeBytes; ++i) size |= static_cast<uint64_t>(file[i]) << (8 * i);
  if (size > kMaxHeaderBytes) {
    return Bad(absl::StrCat("the header size is ", size, ", the limit is ", kMaxHeaderBytes));
  }
  if (size > file.size() - kSizeBytes) {
    return Bad(absl::StrCat("truncated: the header size is ", size, ", the file has ",
                            file.size() - kSizeBytes, " bytes after it"));
  }
  return absl::string_view(reinterpret_cast<const char*>(file.data()) + kSizeBytes, size);
}

absl::StatusOr<std::vector<size_t>> ParseShape(const nlohmann::json& value) {
  if (!value.is_array() || value.size() > kMaxRank) {
    return Bad(absl::StrCat("\"shape\" must be a list of at most ", kMaxRank, " integers"));
  }
  std::vector<size_t> shape;
  for (const nlohmann::json& item : value) {
    if (!item.is_number_unsigned()) {
      return Bad(absl::StrCat("\"shape\" has ", JsonForMessage(item), ", not an integer from 0"));
    }
    shape.push_back(item.get<uint64_t>());
  }
  return shape;
}

/// Bytes of `shape`; an error where the product does not fit in 64 bits.
absl::StatusOr<size_t> BytesOf(const std::vector<size_t>& shape, size_t element_bytes) {
  size_t bytes = element_bytes;
  for (const size_t dim : shape) {
    if (__builtin_mul_overflow(bytes, dim, &bytes)) return Bad("\"shape\" overflows");
  }
  return bytes;
}

absl::StatusOr<std::pair<size_t, size_t>> ParseOffsets(const nlohmann::json& value,
                                                       size_t data_bytes) {
  if (!value.is_array() || value.size() != 2 || !value[0].is_number_unsigned() ||
      !value[1].is_number_unsigned()) {
    return Bad("\"data_offsets\" must be two integers from 0");
  }
  const size_t begin = value[0].get<uint64_t>(), end = value[1].get<uint64_t>();
  if (begin > end || end > data_bytes) {
    return Bad(absl::StrCat("\"data_offsets\" are ", begin, " and ", end, ", the file has ",
                            data_bytes, " bytes of data"));
  }
  return std::make_pair(begin, end);
}

absl::StatusOr<StoredTensor> ParseTensor(const nlohmann::json& entry,
                                         std::span<const std::byte> data) {
  for (const char* key : {"dtype", "shape", "data_offsets"}) {
    if (!entry.is_object() || !entry.contains(key)) return Bad(absl::StrCat("no \"", key, "\""));
  }
  const TypeInfo* const type =
      entry["dtype"].is_string() ? FindType(entry["dtype"].get_ref<const std::string&>()) : nullptr;
  if (type == nullptr) {
    return Bad(absl::StrCat("dtype ", JsonForMessage(entry["dtype"]), " is unknown"));
  }
  StoredTensor tensor;
  tensor.type = type->type;
  tensor.type_name = type->name;

  absl::StatusOr<std::vector<size_t>> shape = ParseShape(entry["shape"]);
  if (!shape.ok()) return shape.status();
  absl::StatusOr<size_t> bytes = BytesOf(*shape, type->bytes);
  if (!bytes.ok()) return bytes.status();
  auto offsets = ParseOffsets(entry["data_offsets"], data.size());
  if (!offsets.ok()) return offsets.status();
  if (offsets->second - offsets->first != *bytes) {
    return Bad(absl::StrCat("shape and dtype need ", *bytes, " bytes, \"data_offsets\" give ",
                            offsets->second - offsets->first));
  }
  tensor.shape = *std::move(shape);
  tensor.data = data.data() + offsets->first;
  tensor.bytes = *bytes;
  return tensor;
}

absl::Status CheckMetadata(const nlohmann::json& metadata) {
  if (!metadata.is_object()) return Bad("\"__metadata__\" is not an object");
  for (const auto& [key, value] : metadata.items()) {
    if (!value.is_string()) {
      return Bad(absl::StrCat("\"__metadata__\": \"", Printable(key), "\" is not a string"));
    }
  }
  return absl::OkStatus();
}

/// The tensors, in the order of their data, must follow each other from the first byte to the last.
absl::Status CheckCoverage(const std::map<std::string, StoredTensor>& tensors,
                           std::span<const std::byte> data) {
  using Entry = std::pair<const StoredTensor*, const std::string*>;
  std::vector<Entry> order;
  for (const auto& [name, tensor] : tensors) order.emplace_back(&tensor, &name);
  // An empty tensor goes before the one that starts where it stands.
  std::sort(order.begin(), order.end(), [](const Entry& a, const Entry& b) {
    if (a.first->data != b.first->data) return a.first->data < b.first->data;
    return a.first->bytes < b.first->bytes;
  });
  size_t covered = 0;
  for (const auto& [tensor, name] : order) {
    const size_t begin = static_cast<size_t>(tensor->data - data.data());
    if (begin < covered) {
      return Bad(
          absl::StrCat("tensor \"", Printable(*name), "\" overlaps another at byte ", begin));
    }
    if (begin > covered) {
      return Bad(absl::StrCat("bytes ", covered, " to ", begin, " before tensor \"",
                              Printable(*name), "\" belong to no tensor"));
    }
    covered = begin + tensor->bytes;
  }
  if (covered != data.size()) {
    return Bad(absl::StrCat(data.size() - covered, " bytes after the last tensor"));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::map<std::string, StoredTensor>> ParseFile(std::span<const std::byte> file) {
  absl::StatusOr<absl::string_view> text = HeaderText(file);
  if (!text.ok()) return text.status();
  absl::StatusOr<nlohmann::json> header = ParseJsonObject(*text);
  if (!header.ok()) return Bad(absl::StrCat("header: ", header.status().message()));
  const std::span<const std::byte> data = file.subspan(kSizeBytes + text->size());

  std::map<std::string, StoredTensor> tensors;
  for (const auto& [name, entry] : header->items()) {
    if (name == "__metadata__") {
      if (absl::Status status = CheckMetadata(entry); !status.ok()) return status;
      continue;
    }
    absl::StatusOr<StoredTensor> tensor = ParseTensor(entry, data);
    if (!tensor.ok()) {
      return Bad(absl::StrCat("tensor \"", Printable(name), "\": ", tensor.status().message()));
    }
    tensors.emplace(name, *std::move(tensor));
  }
  if (absl::Status status = CheckCoverage(tensors, data); !status.ok()) return status;
  return tensors;
}

}  // namespace

absl::StatusOr<std::unique_ptr<SafetensorsFile>> SafetensorsFile::Open(const std::string& path) {
  absl::StatusOr<std::unique_ptr<MappedFile>> file = MappedFile::Open(path);
  if (!file.ok()) return file.status();
  auto tensors = ParseFile((*file)->bytes());
  if (!tensors.ok()) return Bad(absl::StrCat(path, ": ", tensors.status().message()));
  std::unique_ptr<SafetensorsFile> result(new SafetensorsFile(path, *std::move(file)));
  result->tensors_ = *std::move(tensors);
  for (auto& [name, tensor] : result->tensors_) tensor.path = &result->path_;
  return result;
}

}  // namespace firesteel
