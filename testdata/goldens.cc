#include "testdata/goldens.h"

#include <zlib.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <fstream>
#include <sstream>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"

namespace firesteel {
namespace {

constexpr char kMagic[] = "FSGOLD1\n";
constexpr size_t kMagicBytes = sizeof(kMagic) - 1;

absl::StatusOr<std::string> ReadAll(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) return absl::NotFoundError(absl::StrCat(path, ": cannot be opened"));
  std::ostringstream content;
  content << in.rdbuf();
  return content.str();
}

/// Takes numbers from the front of a section. Past the end it yields zeros and ok() is false.
class ByteReader {
 public:
  explicit ByteReader(const std::string& bytes, size_t offset = 0)
      : bytes_(bytes), offset_(offset) {}

  template <typename T>
  T Take() {
    T value{};
    if (offset_ + sizeof(T) > bytes_.size()) {
      ok_ = false;
    } else {
      std::memcpy(&value, bytes_.data() + offset_, sizeof(T));
      offset_ += sizeof(T);
    }
    return value;
  }

  uint32_t Leb128() {
    uint32_t value = 0;
    for (int shift = 0; shift < 32; shift += 7) {
      const uint8_t byte = Take<uint8_t>();
      value |= static_cast<uint32_t>(byte & 127u) << shift;
      if (byte < 128) return value;
    }
    ok_ = false;
    return 0;
  }

  bool ok() const { return ok_; }
  bool AtEnd() const { return ok_ && offset_ == bytes_.size(); }
  size_t offset() const { return offset_; }

 private:
  const std::string& bytes_;
  size_t offset_;
  bool ok_ = true;
};

/// A set over [first, first + n). False where the elements don't fit in it; the reader's ok() too
/// must be asked.
bool TakeSet(ByteReader* in, uint32_t first, size_t n, std::vector<uint32_t>* out) {
  const uint32_t head = in->Leb128();
  const bool inverted = head > 0;
  const uint32_t count = inverted ? head - 1 : in->Leb128();
  if (count > n) return false;
  std::vector<uint32_t> listed(count);
  uint64_t next = 0;
  for (uint32_t& element : listed) {
    next += in->Leb128();
    if (next >= n) return false;
    element = static_cast<uint32_t>(next++);
  }
  out->clear();
  if (!inverted) {
    for (const uint32_t element : listed) out->push_back(first + element);
    return true;
  }
  size_t missing = 0;
  for (uint32_t i = 0; i < n; ++i) {
    if (missing < count && listed[missing] == i) {
      ++missing;
    } else {
      out->push_back(first + i);
    }
  }
  return true;
}

/// The visible positions [first, position] of a layer with that window.
uint32_t FirstVisible(size_t position, size_t window) {
  return static_cast<uint32_t>(window == 0 || position < window ? 0 : position + 1 - window);
}

}  // namespace

/// Fills Goldens from a file's bytes. Its methods throw on a header of another form.
class GoldenReader {
 public:
  explicit GoldenReader(std::string file) : file_(std::move(file)) {}

  absl::StatusOr<Goldens> Read() {
    if (file_.compare(0, kMagicBytes, kMagic) != 0) {
      return absl::InvalidArgumentError("not a .golden file");
    }
    const uint32_t size = ByteReader(file_, kMagicBytes).Take<uint32_t>();
    blob_ = kMagicBytes + sizeof(uint32_t) + size;
    if (blob_ > file_.size()) return absl::InvalidArgumentError("truncated header");
    header_ = nlohmann::json::parse(file_.substr(blob_ - size, size));
    ReadSizes();
    if (absl::Status status = ReadPlainSections(); !status.ok()) return status;
    if (result_.spark) {
      if (absl::Status status = ReadSets(); !status.ok()) return status;
    }
    return std::move(result_);
  }

 private:
  absl::StatusOr<std::string> Section(const std::string& name) {
    const nlohmann::json& entry = header_.at("sections").at(name);
    const size_t offset = blob_ + entry.at("offset").get<size_t>();
    const size_t size = entry.at("size");
    uLongf raw_size = entry.at("raw_size").get<uLongf>();
    if (offset + size > file_.size()) {
      return absl::InvalidArgumentError(absl::StrCat("section ", name, " is truncated"));
    }
    const size_t wanted = raw_size;
    std::string raw(wanted, '\0');
    const int result =
        uncompress(reinterpret_cast<Bytef*>(raw.data()), &raw_size,
                   reinterpret_cast<const Bytef*>(file_.data() + offset), static_cast<uLong>(size));
    if (result != Z_OK || raw_size != wanted) {
      return absl::InvalidArgumentError(absl::StrCat("section ", name, " is damaged"));
    }
    return raw;
  }

  void ReadSizes() {
    result_.spark = header_.at("spark");
    result_.heads = header_.at("heads");
    result_.vocab_size = header_.at("vocab_size");
    result_.intermediate_size = header_.at("intermediate_size");
    const std::vector<size_t> windows = header_.at("windows");
    result_.layers = windows.size();
    for (const nlohmann::json& entry : header_.at("prompts")) {
      GoldenPrompt prompt;
      prompt.name = entry.at("name");
      prompt.ids.resize(entry.at("ids"));
      prompt.logit_positions = entry.at("logit_positions").get<std::vector<size_t>>();
      prompt.continuation.resize(entry.at("continuation"));
      prompt.top_two.resize(prompt.continuation.size());
      prompt.heads_ = result_.heads;
      prompt.features_ = result_.intermediate_size;
      prompt.windows_ = windows;
      result_.prompts.push_back(std::move(prompt));
    }
  }

  /// Calls `take` for every prompt on a section that must be used up by that.
  template <typename Take>
  absl::Status ForEachPrompt(const std::string& section, Take take) {
    absl::StatusOr<std::string> raw = Section(section);
    if (!raw.ok()) return raw.status();
    ByteReader in(*raw);
    for (GoldenPrompt& prompt : result_.prompts) take(&in, &prompt);
    if (in.AtEnd()) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat("section ", section, " has another size"));
  }

  absl::Status ReadPlainSections() {
    absl::Status status = ForEachPrompt("ids", [](ByteReader* in, GoldenPrompt* p) {
      for (int32_t& id : p->ids) id = in->Take<int32_t>();
    });
    status.Update(ForEachPrompt("continuation", [](ByteReader* in, GoldenPrompt* p) {
      for (int32_t& id : p->continuation) id = in->Take<int32_t>();
    }));
    status.Update(ForEachPrompt("top_ids", [](ByteReader* in, GoldenPrompt* p) {
      for (GoldenTopTwo& top : p->top_two) {
        for (int32_t& id : top.ids) id = in->Take<int32_t>();
      }
    }));
    status.Update(ForEachPrompt("top_logits", [](ByteReader* in, GoldenPrompt* p) {
      for (GoldenTopTwo& top : p->top_two) {
        for (float& logit : top.logits) logit = in->Take<float>();
      }
    }));
    status.Update(
        ForEachPrompt("logits", [this](ByteReader* in, GoldenPrompt* p) { TakeLogits(in, p); }));
    return status;
  }

  /// Three planes of bytes, the lowest first: a signed 24-bit number of quanta for each logit.
  void TakeLogits(ByteReader* in, GoldenPrompt* prompt) {
    const float quantum = header_.at("quantum");
    const size_t count = prompt->logit_positions.size() * result_.vocab_size;
    std::vector<uint32_t> quanta(count, 0);
    for (int shift = 8; shift < 32; shift += 8) {
      for (uint32_t& value : quanta) value |= static_cast<uint32_t>(in->Take<uint8_t>()) << shift;
    }
    auto next = quanta.begin();
    for (size_t i = 0; i < prompt->logit_positions.size(); ++i) {
      std::vector<float>& row = prompt->logits.emplace_back(result_.vocab_size);
      for (float& logit : row) {
        logit = static_cast<float>(static_cast<int32_t>(*next++) >> 8) * quantum;  // sign-extends
      }
    }
  }

  /// Finds where each set starts, and that all are whole.
  absl::Status ReadSets() {
    absl::StatusOr<std::string> ffn = Section("ffn");
    if (!ffn.ok()) return ffn.status();
    absl::StatusOr<std::string> attention = Section("attention");
    if (!attention.ok()) return attention.status();
    const auto shared_ffn = std::make_shared<const std::string>(*std::move(ffn));
    const auto shared_attention = std::make_shared<const std::string>(*std::move(attention));
    ByteReader ffn_in(*shared_ffn), attention_in(*shared_attention);
    bool fits = true;
    std::vector<uint32_t> set;
    for (GoldenPrompt& prompt : result_.prompts) {
      prompt.ffn_ = shared_ffn;
      prompt.attention_ = shared_attention;
      for (const size_t window : prompt.windows_) {
        for (size_t position = 0; position < prompt.ids.size(); ++position) {
          prompt.ffn_offsets_.push_back(ffn_in.offset());
          fits = fits && TakeSet(&ffn_in, 0, prompt.features_, &set);
          const uint32_t first = FirstVisible(position, window);
          for (size_t head = 0; head < prompt.heads_; ++head) {
            prompt.attention_offsets_.push_back(attention_in.offset());
            fits = fits && TakeSet(&attention_in, first, position + 1 - first, &set);
          }
        }
      }
    }
    if (fits && ffn_in.AtEnd() && attention_in.AtEnd()) return absl::OkStatus();
    return absl::InvalidArgumentError("the active sets are damaged");
  }

  const std::string file_;
  size_t blob_ = 0;  // where the sections start
  nlohmann::json header_;
  Goldens result_;
};

std::vector<uint32_t> GoldenPrompt::ffn_active(size_t layer, size_t position) const {
  ByteReader in(*ffn_, ffn_offsets_.at(layer * ids.size() + position));
  std::vector<uint32_t> set;
  TakeSet(&in, 0, features_, &set);
  return set;
}

std::vector<uint32_t> GoldenPrompt::attention_kept(size_t layer, size_t position,
                                                   size_t head) const {
  const size_t index = (layer * ids.size() + position) * heads_ + head;
  ByteReader in(*attention_, attention_offsets_.at(index));
  const uint32_t first = FirstVisible(position, windows_.at(layer));
  std::vector<uint32_t> set;
  TakeSet(&in, first, position + 1 - first, &set);
  return set;
}

absl::StatusOr<Goldens> LoadGoldens(const std::string& path) {
  absl::StatusOr<std::string> file = ReadAll(path);
  if (!file.ok()) return file.status();
  absl::StatusOr<Goldens> goldens = absl::UnknownError("");
  try {
    goldens = GoldenReader(*std::move(file)).Read();
  } catch (const std::exception& e) {
    goldens = absl::InvalidArgumentError(e.what());
  }
  if (goldens.ok()) return goldens;
  return absl::InvalidArgumentError(absl::StrCat(path, ": ", goldens.status().message()));
}

absl::StatusOr<ValidStats> LoadValidStats(const std::string& path, const std::string& model) {
  absl::StatusOr<std::string> text = ReadAll(path);
  if (!text.ok()) return text.status();
  try {
    const nlohmann::json all = nlohmann::json::parse(*text);
    if (!all.contains(model)) return absl::NotFoundError(absl::StrCat(path, ": no ", model));
    const nlohmann::json& entry = all.at(model);
    ValidStats stats;
    stats.nll = entry.at("nll");
    stats.predicted_tokens = entry.at("predicted_tokens");
    stats.positions = entry.at("positions");
    stats.ffn_active_fraction = entry.at("ffn_active_fraction").get<std::vector<double>>();
    stats.attended_positions = entry.at("attended_positions").get<std::vector<double>>();
    stats.attended_fraction = entry.at("attended_fraction").get<std::vector<double>>();
    return stats;
  } catch (const std::exception& e) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", e.what()));
  }
}

}  // namespace firesteel
