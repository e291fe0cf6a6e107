#include "runtime/checkpoint/packed_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "runtime/checkpoint/packed_format.h"
#include "runtime/checkpoint/test_checkpoint.h"

namespace firesteel {
namespace {

using kernels::DType;
using nlohmann::json;
using packed::FileHeader;
using packed::TableEntry;
using ::testing::AllOf;
using ::testing::HasSubstr;

std::string ReadAll(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

/// Packs a checkpoint folder as firesteel-convert does.
absl::Status Pack(const std::string& folder, WeightFormat format, const std::string& output,
                  const std::string& tokenizer = "not looked at here") {
  auto source = OpenFolderSource(folder, format, 2);
  if (!source.ok()) return source.status();
  return WritePackedFile(source->get(), {.defaults = {0.5f, 7, 0.9f, 0.1f}, .tokenizer = tokenizer},
                         output);
}

std::string ErrorOf(const absl::Status& status) {
  EXPECT_NE(status.code(), absl::StatusCode::kInternal) << status;
  return std::string(status.message());
}

void ExpectSameMatrix(const Matrix& a, const Matrix& b, const std::string& what) {
  const kernels::TypedView x = a.view(), y = b.view();
  ASSERT_EQ(x.dtype, y.dtype) << what;
  ASSERT_EQ(x.rows, y.rows) << what;
  ASSERT_EQ(x.cols, y.cols) << what;
  ASSERT_EQ(x.stride, y.stride) << what;
  ASSERT_EQ(a.bytes(), b.bytes()) << what;
  EXPECT_EQ(std::memcmp(x.data, y.data, a.DataBytes()), 0) << what;
  EXPECT_EQ(reinterpret_cast<uintptr_t>(y.data) % kernels::kAlignment, 0u) << what;
  if (x.dtype == DType::kI8) {
    EXPECT_EQ(std::memcmp(x.row_scales, y.row_scales, a.ScaleBytes()), 0) << what;
  }
  if (x.dtype == DType::kI4) {
    EXPECT_EQ(std::memcmp(x.block_scales, y.block_scales, a.ScaleBytes()), 0) << what;
  }
}

void ExpectSameWeights(const ModelWeights& a, const ModelWeights& b) {
  EXPECT_EQ(a.config, b.config);
  EXPECT_TRUE(a.types == b.types);
  EXPECT_EQ(a.bytes(), b.bytes());
  ExpectSameMatrix(a.embedding, b.embedding, "embedding");
  EXPECT_EQ(a.final_norm, b.final_norm);
  ASSERT_EQ(a.layers.size(), b.layers.size());
  for (size_t i = 0; i < a.layers.size(); ++i) {
    const LayerWeights &x = a.layers[i], &y = b.layers[i];
    const std::string layer = "layer " + std::to_string(i) + ": ";
    EXPECT_EQ(x.input_norm, y.input_norm);
    EXPECT_EQ(x.post_attention_norm, y.post_attention_norm);
    EXPECT_EQ(x.pre_feedforward_norm, y.pre_feedforward_norm);
    EXPECT_EQ(x.post_feedforward_norm, y.post_feedforward_norm);
    ExpectSameMatrix(x.qkv_proj, y.qkv_proj, layer + "qkv_proj");
    ExpectSameMatrix(x.o_proj, y.o_proj, layer + "o_proj");
    ExpectSameMatrix(x.gate_proj, y.gate_proj, layer + "gate_proj");
    ExpectSameMatrix(x.up_proj, y.up_proj, layer + "up_proj");
    ExpectSameMatrix(x.down_proj, y.down_proj, layer + "down_proj");
  }
}

constexpr WeightFormat kFormats[] = {WeightFormat::kBF16, WeightFormat::kF32, WeightFormat::kI8,
                                     WeightFormat::kI4};

WeightFormat Mixed() { return WeightFormat::Parse("int4,attention=int8").value(); }

/// The folder's weights and the packed file's are the same bytes, copied or mapped.
void ExpectRoundTrip(const std::string& folder, WeightFormat format) {
  const TempFolder out;
  const std::string path = out.File("model.firesteel");
  ASSERT_TRUE(Pack(folder, format, path).ok());
  const auto expected = LoadWeights(folder, format);
  ASSERT_TRUE(expected.ok()) << expected.status();
  for (const WeightMemory memory : {WeightMemory::kCopy, WeightMemory::kShared}) {
    for (const WeightFormat asked : {WeightFormat(), format}) {
      const auto weights = LoadWeights(path, asked, memory, 3);
      ASSERT_TRUE(weights.ok()) << weights.status();
      ExpectSameWeights(**expected, **weights);
    }
  }
  const auto file = PackedFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_TRUE((*file)->Verify(2).ok());
}

TEST(PackedFileTest, RoundTripOfTinyModels) {
  for (const bool spark : {true, false}) {
    for (const WeightFormat format : kFormats) {
      const TempFolder folder;
      const json config = TinyConfig(spark);
      WriteCheckpoint(folder, config, TinyTensors(config, "F32"));
      ExpectRoundTrip(folder.path(), format);
    }
  }
}

TEST(PackedFileTest, RoundTripOfTheBundledModel) {
  for (const WeightFormat format :
       {WeightFormat(WeightFormat::kBF16), WeightFormat(WeightFormat::kI8),
        WeightFormat(WeightFormat::kI4), Mixed()}) {
    ExpectRoundTrip(std::string(FIRESTEEL_SOURCE_DIR) + "/models/spark-stories", format);
  }
}

TEST(PackedFileTest, WidthsOfQuantizedRowsAreLimited) {
  const auto config = LoadModelConfig(std::string(FIRESTEEL_SOURCE_DIR) + "/models/spark-stories");
  ASSERT_TRUE(config.ok());
  ModelConfig wide = *config;
  wide.num_heads = 1024;
  wide.head_dim = 128;  // o_proj: 131,072 columns
  EXPECT_TRUE(CheckWidths(*config, DType::kI8).ok());
  EXPECT_TRUE(CheckWidths(wide, DType::kBF16).ok());
  EXPECT_THAT(ErrorOf(CheckWidths(wide, DType::kI4)),
              AllOf(HasSubstr("o_proj"), HasSubstr("131072"), HasSubstr("65536")));
}

TEST(PackedFileTest, SharesAreWholeAndTheFirstErrorCounts) {
  for (const size_t n : {0, 1, 2, 7}) {
    for (const size_t threads : {0, 1, 3, 9}) {
      std::vector<int> seen(n, 0);
      EXPECT_TRUE(ForEachShare(n, threads, [&](size_t begin, size_t end) {
                    for (size_t i = begin; i < end; ++i) ++seen[i];
                    return absl::OkStatus();
                  }).ok());
      EXPECT_EQ(seen, std::vector<int>(n, 1));
    }
  }
  EXPECT_EQ(ErrorOf(ForEachShare(8, 4,
                                 [](size_t begin, size_t) {
                                   return begin < 4
                                              ? absl::OkStatus()
                                              : absl::InvalidArgumentError(std::to_string(begin));
                                 })),
            "4");
}

/// A tiny int8 model in a packed file, and damage to it.
class PackedDamageTest : public ::testing::Test {
 protected:
  PackedDamageTest() { Make(WeightFormat::kI8); }

  void Make(WeightFormat format) {
    const json config = TinyConfig(true);
    WriteCheckpoint(folder_, config, TinyTensors(config, "F32"));
    ASSERT_TRUE(Pack(folder_.path(), format, path_).ok());
    good_ = ReadAll(path_);
    Reset();
  }

  void Reset() { bytes_ = good_; }
  FileHeader Header() const {
    FileHeader header;
    std::memcpy(&header, bytes_.data(), sizeof(header));
    return header;
  }
  TableEntry Entry(const std::string& name) const {
    for (size_t i = 0; i < Header().entries; ++i) {
      TableEntry entry;
      std::memcpy(&entry, bytes_.data() + sizeof(FileHeader) + i * sizeof(entry), sizeof(entry));
      if (name == entry.name) return entry;
    }
    ADD_FAILURE() << name;
    return {};
  }
  void SetEntry(const std::string& name, const TableEntry& changed) {
    for (size_t i = 0; i < Header().entries; ++i) {
      char* const at = bytes_.data() + sizeof(FileHeader) + i * sizeof(changed);
      if (name == at) return void(std::memcpy(at, &changed, sizeof(changed)));
    }
    ADD_FAILURE() << name;
  }
  /// Sets the checksums of header and table right, as far as there is a table.
  void Seal() {
    FileHeader header = Header();
    const size_t table = std::min<size_t>(header.table_bytes, bytes_.size() - sizeof(header));
    header.table_checksum = packed::ChecksumOf(bytes_.data() + sizeof(header), table);
    header.header_checksum = packed::ChecksumOf(&header, offsetof(FileHeader, header_checksum));
    std::memcpy(bytes_.data(), &header, sizeof(header));
  }
  /// Sets the checksum of a part's data (or scales) right, then those of the table.
  void SealPart(const std::string& name) {
    TableEntry entry = Entry(name);
    entry.data.checksum = packed::ChecksumOf(bytes_.data() + entry.data.offset, entry.data.bytes);
    if (entry.scales.bytes > 0) {
      entry.scales.checksum =
          packed::ChecksumOf(bytes_.data() + entry.scales.offset, entry.scales.bytes);
    }
    SetEntry(name, entry);
    Seal();
  }
  void Write() { folder_.Write("model.firesteel", bytes_); }
  /// The error of the file as it now is; "" if it loads.
  std::string Error(WeightMemory memory = WeightMemory::kCopy,
                    WeightFormat format = WeightFormat::kAuto) {
    Write();
    return ErrorOf(LoadWeights(path_, format, memory).status());
  }
  std::string VerifyError() {
    Write();
    const auto file = PackedFile::Open(path_);
    return ErrorOf(file.ok() ? (*file)->Verify(2) : file.status());
  }
  /// The error after one change to a row of the table, which is then undone.
  std::string EntryError(const std::string& name, const std::function<void(TableEntry&)>& change) {
    TableEntry entry = Entry(name);
    change(entry);
    SetEntry(name, entry);
    Seal();
    const std::string error = Error(WeightMemory::kShared);
    EXPECT_EQ(error, Error(WeightMemory::kCopy));
    EXPECT_THAT(error, HasSubstr(path_));
    Reset();
    return error;
  }
  std::string HeaderError(const std::function<void(FileHeader&)>& change) {
    FileHeader header = Header();
    change(header);
    std::memcpy(bytes_.data(), &header, sizeof(header));
    Seal();
    const std::string error = Error();
    EXPECT_THAT(error, HasSubstr(path_));
    Reset();
    return error;
  }
  /// The error after a change of equal length to config.json.
  std::string ConfigError(const std::string& from, const std::string& to) {
    const TableEntry config = Entry("config.json");
    const size_t at = bytes_.find(from, config.data.offset);
    EXPECT_LT(at, config.data.offset + config.data.bytes);
    bytes_.replace(at, from.size(), to);
    EXPECT_EQ(bytes_.size(), good_.size());
    SealPart("config.json");
    const std::string error = Error();
    Reset();
    return error;
  }

  const TempFolder folder_;
  const std::string path_ = folder_.File("model.firesteel");
  std::string good_;
  std::string bytes_;
};

constexpr char kGate[] = "layers.1.gate_proj";

TEST_F(PackedDamageTest, IsGoodBeforeTheDamage) {
  EXPECT_EQ(Error(), "");
  EXPECT_EQ(Error(WeightMemory::kShared), "");
  EXPECT_EQ(VerifyError(), "");
  Seal();
  EXPECT_EQ(bytes_, good_);
}

TEST_F(PackedDamageTest, HoldsWhatAServerNeeds) {
  const auto file = PackedFile::Open(path_);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ((*file)->config(), *LoadModelConfig(folder_.path()));
  EXPECT_EQ((*file)->generation_defaults(), (GenerationDefaults{0.5f, 7, 0.9f, 0.1f}));
  EXPECT_EQ(*LoadGenerationDefaults(path_), (GenerationDefaults{0.5f, 7, 0.9f, 0.1f}));
  EXPECT_EQ(*(*file)->ReadTokenizer(), "not looked at here");
  EXPECT_EQ((*file)->FormatName(), "int8");

  ASSERT_TRUE(Pack(folder_.path(), WeightFormat::kAuto, path_, "").ok());
  const auto bare = PackedFile::Open(path_);
  ASSERT_TRUE(bare.ok()) << bare.status();
  EXPECT_EQ((*bare)->ReadTokenizer().status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ((*bare)->FormatName(), "f32");
}

TEST_F(PackedDamageTest, OtherFormatsAreRefusedByWhatTheFileHolds) {
  EXPECT_EQ(Error(WeightMemory::kCopy, WeightFormat::kI8), "");
  for (const WeightMemory memory : {WeightMemory::kCopy, WeightMemory::kShared}) {
    EXPECT_THAT(Error(memory, WeightFormat::kBF16),
                AllOf(HasSubstr(path_), HasSubstr("holds int8 weights, not bf16")));
  }
}

TEST_F(PackedDamageTest, EachRoleHasItsType) {
  Make(Mixed());
  const auto file = PackedFile::Open(path_);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ((*file)->FormatName(), "int4,attention=int8");
  EXPECT_EQ(Entry("embedding").type, static_cast<uint32_t>(PackedPart::Type::kI4));
  EXPECT_EQ(Entry("layers.1.gate_proj").type, static_cast<uint32_t>(PackedPart::Type::kI4));
  EXPECT_EQ(Entry("layers.1.down_proj").type, static_cast<uint32_t>(PackedPart::Type::kI8));
  EXPECT_EQ(Error(WeightMemory::kCopy, Mixed()), "");
  EXPECT_THAT(Error(WeightMemory::kCopy, WeightFormat::kI8),
              HasSubstr("holds int4,attention=int8 weights, not int8"));
}

TEST_F(PackedDamageTest, OtherFilesAreNoPackedFiles) {
  for (const std::string& text : {std::string(64, ' '), std::string(5000, '\0')}) {
    bytes_ = text;
    EXPECT_THAT(Error(), AllOf(HasSubstr(path_), HasSubstr("not a packed file")));
  }
  bytes_ = "{}";
  EXPECT_THAT(Error(), HasSubstr("a header takes 64"));
}

TEST_F(PackedDamageTest, EveryTruncationIsAnError) {
  for (size_t size = 0; size < good_.size(); size += size < 4000 ? 13 : 501) {
    bytes_ = good_.substr(0, size);
    for (const WeightMemory memory : {WeightMemory::kCopy, WeightMemory::kShared}) {
      EXPECT_THAT(Error(memory), AllOf(HasSubstr(path_), HasSubstr("truncated"))) << size;
    }
    if (size < sizeof(FileHeader)) continue;
    // A header that owns up to the size: then some part lies past the end.
    FileHeader header = Header();
    header.file_bytes = size;
    std::memcpy(bytes_.data(), &header, sizeof(header));
    Seal();
    EXPECT_THAT(Error(WeightMemory::kShared), HasSubstr(path_)) << size;
  }
  bytes_ = good_ + '\0';
  EXPECT_THAT(Error(), HasSubstr("it should have " + std::to_string(good_.size())));
}

// Whatever the damage to header and table: a status; and with checksums that vouch for it a status
// or a model whose every tensor was checked, never a crash (run it under ASan).
TEST_F(PackedDamageTest, EveryByteOfHeaderAndTableCounts) {
  const size_t end = sizeof(FileHeader) + Header().table_bytes;
  size_t loaded = 0;
  for (size_t at = 0; at < end; ++at) {
    for (const int mask : {0x01, 0x80, 0xFF}) {
      bytes_[at] = static_cast<char>(good_[at] ^ mask);
      Write();
      const auto opened = PackedFile::Open(path_);
      EXPECT_FALSE(opened.ok()) << "byte " << at;
      EXPECT_THAT(ErrorOf(opened.status()), HasSubstr(path_));
      Seal();
      loaded += Error(at % 2 == 0 ? WeightMemory::kCopy : WeightMemory::kShared).empty();
      Reset();
    }
  }
  // A flipped checksum in the header is set right again, one in the table does not count where
  // weights are mapped.
  EXPECT_LT(loaded, end * 3 / 4);
}

TEST_F(PackedDamageTest, HeaderFieldsAreChecked) {
  EXPECT_THAT(HeaderError([](FileHeader& h) { h.version = 2; }),
              HasSubstr("format version is 2, this program reads 1"));
  EXPECT_THAT(HeaderError([](FileHeader& h) { h.reserved = 1; }), HasSubstr("reserved"));
  EXPECT_THAT(HeaderError([](FileHeader& h) { h.file_bytes -= 1; }), HasSubstr("it should have"));
  EXPECT_THAT(HeaderError([](FileHeader& h) { h.entries = 0; }), HasSubstr("the table has 0 rows"));
  EXPECT_THAT(HeaderError([](FileHeader& h) { h.entries = 0xFFFFFFFF; }),
              HasSubstr("4294967295 rows, the limits are 1 and 16384"));
  EXPECT_THAT(HeaderError([](FileHeader& h) { h.table_offset = 128; }),
              HasSubstr("the table's offset is 128, not 64"));
  EXPECT_THAT(HeaderError([](FileHeader& h) { h.table_bytes = ~0ull; }), HasSubstr("rows need"));
  EXPECT_THAT(HeaderError([](FileHeader& h) {
                h.entries = 16384;
                h.table_bytes = 16384 * sizeof(TableEntry);
              }),
              HasSubstr("the table ends at byte 2097216"));
}

TEST_F(PackedDamageTest, PlacesAreChecked) {
  const auto error = [this](const std::function<void(TableEntry&)>& change) {
    const std::string text = EntryError(kGate, change);
    EXPECT_THAT(text, HasSubstr(std::string("tensor \"") + kGate + "\""));
    return text;
  };
  EXPECT_THAT(error([](TableEntry& e) { e.data.offset += 64; }), HasSubstr("multiple of 4096"));
  EXPECT_THAT(error([](TableEntry& e) { e.scales.offset += 4; }), HasSubstr("multiple of 64"));
  EXPECT_THAT(error([](TableEntry& e) { e.data.offset = 1ull << 40; }), HasSubstr("the file ends"));
  EXPECT_THAT(error([](TableEntry& e) { e.data.offset = ~0ull << 12; }),
              HasSubstr("the file ends"));
  EXPECT_THAT(error([](TableEntry& e) { e.data.bytes = ~0ull; }), HasSubstr("the file ends"));
  EXPECT_THAT(error([](TableEntry& e) { e.scales.bytes = ~0ull - 63; }),
              HasSubstr("the file ends"));
  EXPECT_THAT(error([](TableEntry& e) { e.data.offset = 0; }), HasSubstr("overlap"));
  EXPECT_THAT(error([](TableEntry& e) { e.scales.offset = e.data.offset; }), HasSubstr("overlap"));
  EXPECT_THAT(error([](TableEntry& e) { e.data.bytes = 0; }), HasSubstr("no bytes"));
  EXPECT_THAT(error([](TableEntry& e) { e.scales.bytes = 0; }), HasSubstr("no bytes"));
  const TableEntry other = Entry("layers.0.gate_proj");
  const std::string overlap =
      EntryError(kGate, [&other](TableEntry& e) { e.data.offset = other.data.offset; });
  EXPECT_THAT(overlap, AllOf(HasSubstr("gate_proj"), HasSubstr("overlap")));
}

TEST_F(PackedDamageTest, ShapesAndTypesAreChecked) {
  const auto error = [this](const std::function<void(TableEntry&)>& change) {
    return EntryError(kGate, change);
  };
  EXPECT_THAT(error([](TableEntry& e) { e.rows = 7; }), HasSubstr("its shape is [7, 3]"));
  EXPECT_THAT(error([](TableEntry& e) { e.cols = ~0ull; }), HasSubstr("config.json needs [6, 3]"));
  EXPECT_THAT(error([](TableEntry& e) { e.stride = 128; }), HasSubstr("with stride 128"));
  EXPECT_THAT(error([](TableEntry& e) { e.data.bytes -= 64; }), HasSubstr("its shape needs 384"));
  EXPECT_THAT(error([](TableEntry& e) { e.scales.bytes -= 4; }),
              HasSubstr("its scales have 20 bytes, its shape needs 24"));
  EXPECT_THAT(error([](TableEntry& e) { e.scales = {}; }), HasSubstr("its scales have 0 bytes"));
  EXPECT_THAT(error([](TableEntry& e) { e.type = 1; }), HasSubstr("its type is bf16, not int8"));
  EXPECT_THAT(error([](TableEntry& e) { e.type = 4; }), HasSubstr("type 4 is unknown"));
  EXPECT_THAT(error([](TableEntry& e) { e.type = 255; }), HasSubstr("a text of this name"));
  EXPECT_THAT(error([](TableEntry& e) { e.reserved = 1; }), HasSubstr("reserved"));
  EXPECT_THAT(EntryError("final_norm", [](TableEntry& e) { e.type = 1; }),
              AllOf(HasSubstr("final_norm"), HasSubstr("its type is bf16, not f32")));
  EXPECT_THAT(EntryError("embedding", [](TableEntry& e) { e.type = 0; }),
              HasSubstr("matrices of attention are int8, those of head f32"));
  EXPECT_THAT(EntryError("embedding", [](TableEntry& e) { e.type = 3; }),
              AllOf(HasSubstr("embedding"), HasSubstr("its shape")));
}

TEST_F(PackedDamageTest, NamesAreChecked) {
  const auto rename = [this](const char* to) {
    return EntryError(kGate, [to](TableEntry& e) { std::strncpy(e.name, to, sizeof(e.name)); });
  };
  EXPECT_THAT(rename("layers.0.gate_proj"), HasSubstr("stands in the table twice"));
  EXPECT_THAT(rename("layers.9.gate_proj"), AllOf(HasSubstr(kGate), HasSubstr("missing")));
  EXPECT_THAT(rename(""), HasSubstr("its name"));
  EXPECT_THAT(EntryError(kGate, [](TableEntry& e) { std::memset(e.name, 'x', sizeof(e.name)); }),
              HasSubstr("its name is not 1 to 47 bytes"));
  EXPECT_THAT(EntryError(kGate, [](TableEntry& e) { e.name[40] = 'x'; }), HasSubstr("its name"));
  EXPECT_THAT(EntryError("tokenizer.model",
                         [](TableEntry& e) {
                           std::strncpy(e.name, "one.more", sizeof(e.name));
                           e.type = 0;
                         }),
              AllOf(HasSubstr("one.more"), HasSubstr("no such tensor")));
  EXPECT_THAT(EntryError("config.json", [](TableEntry& e) { e.type = 0; }),
              AllOf(HasSubstr("config.json"), HasSubstr("not text")));
  EXPECT_THAT(EntryError("config.json", [](TableEntry& e) { e.cols += 1; }),
              HasSubstr("config.json"));
}

TEST_F(PackedDamageTest, ConfigurationsAreCheckedAsAFoldersAre) {
  EXPECT_THAT(ConfigError("\"head_dim\":6", "\"head_dim\":7"),
              AllOf(HasSubstr("config.json"), HasSubstr("head_dim"), HasSubstr("even")));
  EXPECT_THAT(ConfigError("\"vocab_size\":11", "\"vocab_size\":12"),
              AllOf(HasSubstr("embedding"), HasSubstr("[11, 8]"), HasSubstr("[12, 8]")));
  EXPECT_THAT(ConfigError("\"vocab_size\":11", "\"vocab_size\":1e"), HasSubstr("not valid JSON"));
  EXPECT_THAT(ConfigError("\"ffn_top_k\":2", "\"ffn_top_k\":9"), HasSubstr("ffn_top_k"));
  bytes_[Entry("config.json").data.offset + 5] ^= 1;
  EXPECT_THAT(Error(), AllOf(HasSubstr("config.json"), HasSubstr("checksum")));
}

TEST_F(PackedDamageTest, EveryByteOfTheFileIsVerified) {
  const size_t end = sizeof(FileHeader) + Header().table_bytes;
  std::set<std::string> named;
  for (size_t at = end; at < good_.size(); at += 7) {
    bytes_[at] = static_cast<char>(bytes_[at] ^ 0x10);
    EXPECT_THAT(VerifyError(), HasSubstr(path_)) << "byte " << at;
    Reset();
  }
}

TEST_F(PackedDamageTest, DamagedPartsAreNamed) {
  for (const WeightFormat format : kFormats) {
    Make(format);
    const auto file = PackedFile::Open(path_);
    ASSERT_TRUE(file.ok()) << file.status();
    for (const PackedPart& part : (*file)->parts()) {
      const bool tokenizer = part.name == "tokenizer.model";
      const bool matrix = part.type != PackedPart::Type::kText && part.rows > 1;
      for (const PackedSpan* span : {&part.data, &part.scales}) {
        if (span->bytes == 0) continue;
        const size_t at = span->offset + span->bytes - 1;
        bytes_[at] = static_cast<char>(bytes_[at] ^ 1);
        EXPECT_THAT(VerifyError(), AllOf(HasSubstr(part.name), HasSubstr("checksum")));
        if (!tokenizer) {
          EXPECT_THAT(Error(), AllOf(HasSubstr(part.name), HasSubstr("checksum")));
          // Mapped matrices are taken as they are: looking at them all would be a copy's work.
          EXPECT_EQ(Error(WeightMemory::kShared).empty(), matrix) << part.name;
        }
        Reset();
      }
    }
  }
}

TEST_F(PackedDamageTest, ValuesAreChecked) {
  const auto overwrite = [this](const char* name, bool scales, const std::string& value) {
    const TableEntry entry = Entry(name);
    bytes_.replace((scales ? entry.scales : entry.data).offset, value.size(), value);
    SealPart(name);
  };
  const std::string nan("\xFF\xFF\xFF\xFF", 4), infinity("\x00\x00\x80\x7F", 4);
  for (const WeightFormat format : kFormats) {
    for (const std::string& bad : {nan, infinity}) {
      Make(format);
      const bool quantized = format == WeightFormat::kI8 || format == WeightFormat::kI4;
      // bf16 has the upper half of a float's bits.
      const bool half = format == WeightFormat::kBF16 || format == WeightFormat::kI4;
      overwrite(kGate, quantized, half ? bad.substr(2) : bad);
      EXPECT_THAT(Error(), AllOf(HasSubstr(kGate), HasSubstr("not finite")));
      EXPECT_THAT(VerifyError(), AllOf(HasSubstr(kGate), HasSubstr("not finite")));
      if (quantized) EXPECT_THAT(Error(WeightMemory::kShared), HasSubstr(kGate));
      Reset();
      overwrite("layers.0.input_norm", false, bad);
      for (const WeightMemory memory : {WeightMemory::kCopy, WeightMemory::kShared}) {
        EXPECT_THAT(Error(memory),
                    AllOf(HasSubstr("layers.0.input_norm"), HasSubstr("not finite")));
      }
    }
  }
  Make(WeightFormat::kI8);
  overwrite(kGate, false, "\x80");
  EXPECT_THAT(Error(), AllOf(HasSubstr(kGate), HasSubstr("-128")));
}

TEST_F(PackedDamageTest, MappedWeightsOutliveEverythingElse) {
  auto weights = LoadWeights(path_, WeightFormat::kAuto, WeightMemory::kShared);
  ASSERT_TRUE(weights.ok()) << weights.status();
  const auto copy = LoadWeights(path_, WeightFormat::kAuto, WeightMemory::kCopy);
  ASSERT_TRUE(copy.ok()) << copy.status();
  // Replaced by rename, as the writer does, the file that is mapped stays what it was.
  ASSERT_TRUE(Pack(folder_.path(), WeightFormat::kBF16, path_).ok());
  ExpectSameWeights(**copy, **weights);
  std::filesystem::remove(path_);
  ExpectSameWeights(**copy, **weights);
  auto moved = std::make_shared<ModelWeights>();
  weights->reset();
  EXPECT_FALSE(LoadWeights(path_, WeightFormat::kAuto).ok());
}

/// A source that fails at its `fail_at`th part.
class FailingSource final : public WeightSource {
 public:
  FailingSource(std::unique_ptr<WeightSource> source, size_t fail_at)
      : source_(std::move(source)), left_(fail_at) {}
  const ModelConfig& config() const override { return source_->config(); }
  const WeightTypes& types() const override { return source_->types(); }
  absl::StatusOr<Matrix> ReadMatrix(const ModelPart& part) override {
    if (left_-- == 0) return absl::DataLossError("it fails here");
    return source_->ReadMatrix(part);
  }
  absl::StatusOr<std::vector<float>> ReadVector(const ModelPart& part) override {
    if (left_-- == 0) return absl::DataLossError("it fails here");
    return source_->ReadVector(part);
  }

 private:
  const std::unique_ptr<WeightSource> source_;
  size_t left_;
};

TEST_F(PackedDamageTest, FailedWritesLeaveTheOldFileAndNothingElse) {
  const auto names = [this] {
    std::set<std::string> all;
    for (const auto& entry : std::filesystem::directory_iterator(folder_.path())) {
      all.insert(entry.path().filename());
    }
    return all;
  };
  const std::set<std::string> before = names();
  for (size_t fail_at = 0; fail_at < 20; ++fail_at) {
    FailingSource source(std::move(OpenFolderSource(folder_.path(), WeightFormat::kF32, 1)).value(),
                         fail_at);
    std::string temporary;
    const absl::Status status =
        WritePackedFile(&source, {}, path_, [&](const std::string& name) { temporary = name; });
    EXPECT_EQ(status.message(), "it fails here");
    EXPECT_THAT(temporary, HasSubstr(path_ + ".tmp-"));
    EXPECT_EQ(names(), before);
    EXPECT_EQ(ReadAll(path_), good_);
  }
}

TEST_F(PackedDamageTest, OutputsThatCannotBeAreErrors) {
  EXPECT_THAT(ErrorOf(Pack(folder_.path(), WeightFormat::kAuto, folder_.path())),
              HasSubstr("no regular file"));
  EXPECT_THAT(ErrorOf(Pack(folder_.path(), WeightFormat::kAuto, folder_.File("no/such/file"))),
              HasSubstr("cannot be made"));
}

TEST(ModelConfigJsonTest, ParsesToWhatItWas) {
  for (const bool spark : {true, false}) {
    json text = TinyConfig(spark);
    text["rope_theta"] = 12345.678;
    text["rms_norm_eps"] = 1.0 / 3e5;
    text["attn_logit_softcapping"] = nullptr;
    text["eos_token_id"] = {1, 7};
    text["bos_token_id"] = 3;
    text["layer_types"] = {"full_attention", "sliding_attention"};
    const auto config = ParseModelConfig(text.dump());
    ASSERT_TRUE(config.ok()) << config.status();
    const auto again = ParseModelConfig(ModelConfigToJson(*config));
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_EQ(*again, *config);
  }
  for (const GenerationDefaults& defaults :
       {GenerationDefaults{}, GenerationDefaults{0.7f, 40, 1e-6f, 0.05f},
        GenerationDefaults{0.0f, 1u << 24, 0.1f, 1.0f}}) {
    const auto again = ParseGenerationDefaults(GenerationDefaultsToJson(defaults));
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_EQ(*again, defaults);
  }
}

}  // namespace
}  // namespace firesteel
