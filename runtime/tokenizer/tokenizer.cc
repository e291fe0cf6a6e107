#include "runtime/tokenizer/tokenizer.h"

#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "runtime/checkpoint/files.h"
#include "runtime/checkpoint/packed_file.h"
#include "runtime/tokenizer/model_guard.h"
#include "runtime/tokenizer/sentencepiece_model.h"

namespace firesteel {
namespace {

constexpr size_t kMaxModelBytes = size_t{256} << 20;
constexpr char kModelName[] = "tokenizer.model";
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

absl::StatusOr<std::string> Tokenizer::ReadModel(const std::string& path) {
  if (!IsPackedFile(path)) return ReadFile(JoinPath(path, kModelName), kMaxModelBytes);
  absl::StatusOr<std::unique_ptr<PackedFile>> file = PackedFile::Open(path);
  if (!file.ok()) return file.status();
  return (*file)->ReadTokenizer();
}

absl::StatusOr<std::shared_ptr<const Tokenizer>> Tokenizer::Load(const std::string& path,
                                                                 size_t vocab_size,
                                                                 int32_t bos_token_id) {
  absl::StatusOr<std::string> content = ReadModel(path);
  if (!content.ok()) return content.status();
  const std::string origin =
      IsPackedFile(path) ? absl::StrCat(path, ": ", kModelName) : JoinPath(path, kModelName);
  return Parse(*content, origin, vocab_size, bos_token_id);
}

absl::StatusOr<std::shared_ptr<const Tokenizer>> Tokenizer::Parse(absl::string_view content,
                                                                  const std::string& origin,
                                                                  size_t vocab_size,
                                                                  int32_t bos_token_id) {
  if (absl::Status status = CheckTokenizerModel(content); !status.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(origin, ": ", status.message()));
  }
  auto model = std::make_unique<SentencePieceModel>();
  std::string error;
  if (!model->Load(std::string_view(content.data(), content.size()), &error)) {
    return absl::InvalidArgumentError(
        absl::StrCat(origin, ": not a SentencePiece model: ", Printable(error)));
  }
  const size_t pieces = static_cast<size_t>(model->num_pieces());
  if (pieces > vocab_size) {
    return absl::InvalidArgumentError(absl::StrCat(
        origin, ": ", pieces, " pieces, more than config.json's vocab_size of ", vocab_size));
  }
  if (bos_token_id < 0 || static_cast<size_t>(bos_token_id) >= pieces) {
    return absl::InvalidArgumentError(absl::StrCat(origin, ": bos_token_id is ", bos_token_id,
                                                   ", the model has ", pieces, " pieces"));
  }
  return std::make_shared<SentencePieceTokenizer>(std::move(model), bos_token_id);
}

}  // namespace firesteel
