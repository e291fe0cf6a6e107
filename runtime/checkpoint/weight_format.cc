#include "runtime/checkpoint/weight_format.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace firesteel {
namespace {

using kernels::DType;

constexpr std::pair<const char*, WeightFormat::Base> kBases[] = {
    {"auto", WeightFormat::kAuto}, {"f32", WeightFormat::kF32}, {"bf16", WeightFormat::kBF16},
    {"int8", WeightFormat::kI8},   {"int4", WeightFormat::kI4},
};

WeightRole RoleAt(size_t i) { return static_cast<WeightRole>(i); }

DType TypeOf(WeightFormat::Base base) {
  switch (base) {
    case WeightFormat::kF32:
      return DType::kF32;
    case WeightFormat::kI8:
      return DType::kI8;
    case WeightFormat::kI4:
      return DType::kI4;
    case WeightFormat::kAuto:
    case WeightFormat::kBF16:
      break;
  }
  return DType::kBF16;
}

WeightTypes BaseTypes(WeightFormat::Base base, bool spark) {
  WeightTypes types = TypeOf(base);
  if (spark && base == WeightFormat::kI4) types[WeightRole::kFfn] = DType::kI8;
  return types;
}

absl::Status Unknown() {
  return absl::InvalidArgumentError(
      "is not auto, f32, bf16, int8 or int4, the last two with exceptions such as int4,head=int8 "
      "(roles: attention, predictor, ffn, head; types: int8, int4)");
}

}  // namespace

const char* DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "f32";
    case DType::kBF16:
      return "bf16";
    case DType::kI8:
      return "int8";
    case DType::kI4:
      return "int4";
  }
  return "";
}

const char* WeightRoleName(WeightRole role) {
  switch (role) {
    case WeightRole::kAttention:
      return "attention";
    case WeightRole::kPredictor:
      return "predictor";
    case WeightRole::kFfn:
      return "ffn";
    case WeightRole::kHead:
      return "head";
  }
  return "";
}

bool WeightTypes::Has(DType dtype) const {
  return std::find(types.begin(), types.end(), dtype) != types.end();
}

absl::Status WeightTypes::Check() const {
  for (size_t i = 1; i < kNumWeightRoles; ++i) {
    if (types[i] == types[0] || (quantized() && kernels::IsQuantized(types[i]))) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("matrices of ", WeightRoleName(RoleAt(0)), " are ", DTypeName(types[0]),
                     ", those of ", WeightRoleName(RoleAt(i)), " ", DTypeName(types[i]),
                     ": either all are int8 or int4, or all have one type"));
  }
  return absl::OkStatus();
}

absl::StatusOr<WeightFormat> WeightFormat::Parse(absl::string_view text) {
  const std::vector<absl::string_view> words = absl::StrSplit(text, ',');
  const auto* const base = std::find_if(std::begin(kBases), std::end(kBases),
                                        [&](const auto& b) { return words[0] == b.first; });
  if (base == std::end(kBases)) return Unknown();
  WeightFormat format(base->second);
  const bool quantized = kernels::IsQuantized(TypeOf(format.base_));
  for (size_t i = 1; i < words.size(); ++i) {
    const std::pair<absl::string_view, absl::string_view> exception =
        absl::StrSplit(words[i], absl::MaxSplits('=', 1));
    size_t role = 0;
    while (role < kNumWeightRoles && exception.first != WeightRoleName(RoleAt(role))) ++role;
    const bool known = exception.second == "int8" || exception.second == "int4";
    if (!quantized || role == kNumWeightRoles || !known) return Unknown();
    if (format.exceptions_[role].has_value()) {
      return absl::InvalidArgumentError(absl::StrCat("names ", exception.first, " twice"));
    }
    format.exceptions_[role] = exception.second == "int8" ? DType::kI8 : DType::kI4;
  }
  return format;
}

std::string WeightFormat::Name() const {
  std::string name;
  for (const auto& [text, base] : kBases) {
    if (base == base_) name = text;
  }
  for (size_t i = 0; i < kNumWeightRoles; ++i) {
    if (!exceptions_[i].has_value()) continue;
    absl::StrAppend(&name, ",", WeightRoleName(RoleAt(i)), "=", DTypeName(*exceptions_[i]));
  }
  return name;
}

std::string WeightFormat::NameOf(const WeightTypes& types, bool spark) {
  // The base with the fewest exceptions, the wider one if there are as many.
  std::optional<WeightFormat> best;
  size_t fewest = kNumWeightRoles + 1;
  for (const auto& [text, base] : kBases) {
    if (base == kAuto || kernels::IsQuantized(TypeOf(base)) != types.quantized()) continue;
    const WeightTypes usual = BaseTypes(base, spark);
    WeightFormat format(base);
    size_t exceptions = 0;
    for (size_t i = 0; i < kNumWeightRoles; ++i) {
      if (!spark && RoleAt(i) == WeightRole::kPredictor) continue;
      if (types.types[i] == usual.types[i]) continue;
      format.exceptions_[i] = types.types[i];
      ++exceptions;
    }
    if (exceptions >= fewest) continue;
    fewest = exceptions;
    best = format;
  }
  return best->Name();
}

WeightTypes WeightFormat::TypesOf(bool spark, const WeightTypes& stored) const {
  if (base_ == kAuto) return stored;
  WeightTypes types = BaseTypes(base_, spark);
  for (size_t i = 0; i < kNumWeightRoles; ++i) {
    types.types[i] = exceptions_[i].value_or(types.types[i]);
  }
  if (!spark) types[WeightRole::kPredictor] = types[WeightRole::kFfn];
  return types;
}

}  // namespace firesteel
