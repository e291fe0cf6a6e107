#include "runtime/tokenizer/sentencepiece_model.h"

#include <sentencepiece_processor.h>

#include <exception>

namespace firesteel {

struct SentencePieceModel::Impl {
  sentencepiece::SentencePieceProcessor processor;
};

SentencePieceModel::SentencePieceModel() : impl_(std::make_unique<Impl>()) {}
SentencePieceModel::~SentencePieceModel() = default;

bool SentencePieceModel::Load(std::string_view serialized, std::string* error) {
  try {
    const auto status = impl_->processor.LoadFromSerializedProto(serialized);
    if (status.ok()) return true;
    *error = status.ToString();
  } catch (const std::exception& e) {
    *error = e.what();
  }
  return false;
}

int SentencePieceModel::num_pieces() const { return impl_->processor.GetPieceSize(); }

SentencePieceModel::PieceKind SentencePieceModel::kind(int id) const {
  const auto& processor = impl_->processor;
  if (processor.IsUnknown(id)) return PieceKind::kUnknown;
  if (processor.IsControl(id)) return PieceKind::kControl;
  if (processor.IsUnused(id)) return PieceKind::kUnused;
  if (processor.IsByte(id)) return PieceKind::kByte;
  return PieceKind::kNormal;
}

const std::string& SentencePieceModel::piece(int id) const {
  return impl_->processor.IdToPiece(id);
}

std::string SentencePieceModel::Decode(int id) const { return impl_->processor.DecodeIds({id}); }

bool SentencePieceModel::Encode(std::string_view text, std::vector<int>* ids,
                                std::string* error) const {
  try {
    const auto status = impl_->processor.Encode(text, ids);
    if (status.ok()) return true;
    *error = status.ToString();
  } catch (const std::exception& e) {
    *error = e.what();
  }
  return false;
}

}  // namespace firesteel
