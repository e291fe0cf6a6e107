#include "runtime/tokenizer/tokenizer.h"

#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "runtime/checkpoint/files.h"
#include "runtime/tokenizer/model_guard.h"
#include "runtime/tokenizer/sentencepiece_model.h"

namespace firesteel {
namespace {

constexpr size_t kMaxModelBytes = size_t{256} << 20;
constexpr char kEscapedSpace[] = "\xE2\x96\x81";  // ▁, how a piece writes a space

/// What a piece adds to a text.
std::string BytesOfPiece(const SentencePieceModel& model, int id) {
  using Kind = SentencePieceModel::PieceKind;
  switch (model.kind(id)) {
    case Kind::kControl:
    case Kind::kUnused:
      return "";
    case Kind::kUnknown:
      return model.Decode(id);
    case Kind::kByte: {  // "<0x0A>"
      const std::string& piece = model.piece(id);
      uint32_t byte = 0;
      if (piece.size() == 6 && absl::SimpleHexAtoi(piece.substr(3, 2), &byte)) {
        return std::string(1, static_cast<char>(byte));
      }
      return "";
    }
    case Kind::kNormal:
      break;
  }
  return absl::StrReplaceAll(model.piece(id), {{kEscapedSpace, " "}});
}

class SentencePieceTokenizer : public Tokenizer {
 public:
  SentencePieceTokenizer(std::unique_ptr<const SentencePieceModel> model, int32_t bos)
      : model_(std::move(model)), bos_(bos) {
    const int pieces = model_->num_pieces();
    bytes_.reserve(static_cast<size_t>(pieces));
    for (int id = 0; id < pieces; ++id) bytes_.push_back(BytesOfPiece(*model_, id));
  }

  absl::StatusOr<std::vector<int32_t>> EncodePrompt(absl::string_view text) const override {
    std::vector<int> pieces;
    std::string error;
    if (!model_->Encode(std::string_view(text.data(), text.size()), &pieces, &error)) {
      return absl::InternalError(absl::StrCat("tokenizing ", text.size(), " bytes: ", error));
    }
    std::vector<int32_t> ids;
    ids.reserve(pieces.size() + 1);
    ids.push_back(bos_);
    ids.insert(ids.end(), pieces.begin(), pieces.end());
    return ids;
  }

  const std::string& TokenBytes(int32_t token_id) const override {
    static const std::string* const nothing = new std::string;
    if (token_id < 0 || static_cast<size_t>(token_id) >= bytes_.size()) return *nothing;
    return bytes_[static_cast<size_t>(token_id)];
  }

 private:
  const std::unique_ptr<const SentencePieceModel> model_;
  const int32_t bos_;
  std::vector<std::string> bytes_;  // [pieces], filled by the constructor
};

}  // namespace

absl::StatusOr<std::shared_ptr<const Tokenizer>> Tokenizer::Load(const std::string& folder,
                                                                 size_t vocab_size,
                                                                 int32_t bos_token_id) {
  const std::string path = JoinPath(folder, "tokenizer.model");
  absl::StatusOr<std::string> content = ReadFile(path, kMaxModelBytes);
  if (!content.ok()) return content.status();
  if (absl::Status status = CheckTokenizerModel(*content); !status.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", status.message()));
  }
  auto model = std::make_unique<SentencePieceModel>();
  std::string error;
  if (!model->Load(*content, &error)) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": not a SentencePiece model: ", Printable(error)));
  }
  const size_t pieces = static_cast<size_t>(model->num_pieces());
  if (pieces > vocab_size) {
    return absl::InvalidArgumentError(absl::StrCat(
        path, ": ", pieces, " pieces, more than config.json's vocab_size of ", vocab_size));
  }
  if (bos_token_id < 0 || static_cast<size_t>(bos_token_id) >= pieces) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": bos_token_id is ", bos_token_id,
                                                   ", the model has ", pieces, " pieces"));
  }
  return std::make_shared<SentencePieceTokenizer>(std::move(model), bos_token_id);
}

}  // namespace firesteel
