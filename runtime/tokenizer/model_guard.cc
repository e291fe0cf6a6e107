#include "runtime/tokenizer/model_guard.h"

#include <cstdint>

namespace firesteel {
namespace {

// Field numbers of sentencepiece_model.proto.
constexpr uint32_t kNormalizerSpec = 3;
constexpr uint32_t kDenormalizerSpec = 5;
constexpr uint32_t kPrecompiledCharsmap = 2;

/// One field of a message in protobuf's wire format; `bytes` only for length-delimited ones.
struct Field {
  uint32_t number = 0;
  bool delimited = false;
  absl::string_view bytes;
};

bool TakeVarint(absl::string_view* in, uint64_t* value) {
  *value = 0;
  for (int shift = 0; shift < 64; shift += 7) {
    if (in->empty()) return false;
    const uint8_t byte = static_cast<uint8_t>(in->front());
    in->remove_prefix(1);
    *value |= static_cast<uint64_t>(byte & 127u) << shift;
    if (byte < 128) return true;
  }
  return false;
}

/// False where no field can be read: then the library must not see the rest. Groups, which nothing
/// writes any more, count as such.
bool TakeField(absl::string_view* in, Field* field) {
  uint64_t tag = 0, value = 0;
  if (!TakeVarint(in, &tag) || tag > UINT32_MAX || (tag >> 3) == 0) return false;
  field->number = static_cast<uint32_t>(tag >> 3);
  field->delimited = false;
  size_t skip = 0;
  switch (tag & 7) {
    case 0:
      return TakeVarint(in, &value);
    case 1:
      skip = 8;
      break;
    case 2:
      if (!TakeVarint(in, &value) || value > in->size()) return false;
      skip = static_cast<size_t>(value);
      field->delimited = true;
      field->bytes = in->substr(0, skip);
      break;
    case 5:
      skip = 4;
      break;
    default:
      return false;
  }
  if (skip > in->size()) return false;
  in->remove_prefix(skip);
  return true;
}

absl::Status NotAMessage() { return absl::InvalidArgumentError("not a protobuf message"); }

absl::Status CheckNormalizer(absl::string_view spec) {
  Field field;
  while (!spec.empty()) {
    if (!TakeField(&spec, &field)) return NotAMessage();
    if (field.number == kPrecompiledCharsmap && field.delimited && !field.bytes.empty()) {
      return absl::InvalidArgumentError(
          "it has normalization rules (precompiled_charsmap), only identity is supported");
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckTokenizerModel(absl::string_view serialized) {
  Field field;
  while (!serialized.empty()) {
    if (!TakeField(&serialized, &field)) return NotAMessage();
    if (!field.delimited) continue;
    if (field.number != kNormalizerSpec && field.number != kDenormalizerSpec) continue;
    if (absl::Status status = CheckNormalizer(field.bytes); !status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace firesteel
