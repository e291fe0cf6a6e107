#include "runtime/tokenizer/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "runtime/checkpoint/packed_file.h"
#include "runtime/checkpoint/test_checkpoint.h"

namespace firesteel {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

const char kModel[] = FIRESTEEL_SOURCE_DIR "/models/spark-stories";

class TokenizerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto tokenizer = Tokenizer::Load(kModel, 8192, 2);
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    tokenizer_ = *std::move(tokenizer);
  }

  std::vector<int32_t> Encode(const std::string& text) {
    const auto ids = tokenizer_->EncodePrompt(text);
    EXPECT_TRUE(ids.ok()) << ids.status();
    return ids.ok() ? *ids : std::vector<int32_t>{};
  }

  std::string Decode(const std::vector<int32_t>& ids) {
    std::string text;
    for (const int32_t id : ids) text += tokenizer_->TokenBytes(id);
    return text;
  }

  std::shared_ptr<const Tokenizer> tokenizer_;
};

// Expected ids are the Python package's for the same text.
TEST_F(TokenizerTest, EncodesAsSentencePieceDoes) {
  EXPECT_THAT(Encode("Once upon a time, caf\xC3\xA9 \xF0\x9F\x98\x80.\n"),
              ElementsAre(2, 683, 553, 262, 469, 8153, 2333, 8151, 199, 173, 8133, 244, 163, 156,
                          132, 8152, 14));
}

TEST_F(TokenizerTest, EmptyTextIsBosAlone) { EXPECT_THAT(Encode(""), ElementsAre(2)); }

TEST_F(TokenizerTest, BytesOfTokensAddUpToTheText) {
  for (const std::string& text :
       {std::string("Once upon a time, there was a little fox."), std::string("  two  spaces  "),
        std::string("\n\n\t\r\n"), std::string("\xE4\xBD\xA0\xE5\xA5\xBD \xF0\x9F\xA6\x8A!"),
        std::string("a\0b", 3), std::string("1234567890"), std::string("<s></s><0x41>")}) {
    EXPECT_EQ(Decode(Encode(text)), text);
  }
}

TEST_F(TokenizerTest, SpecialTokensAndUnknownIdsAddNothing) {
  for (const int32_t id : {0, 1, 2, -1, 8192, std::numeric_limits<int32_t>::max(),
                           std::numeric_limits<int32_t>::min()}) {
    EXPECT_EQ(tokenizer_->TokenBytes(id), "") << id;
  }
}

TEST_F(TokenizerTest, BytePiecesAreOneByte) {
  for (int byte = 0; byte < 256; ++byte) {
    EXPECT_EQ(tokenizer_->TokenBytes(4 + byte), std::string(1, static_cast<char>(byte)));
  }
}

TEST_F(TokenizerTest, OddInputsAreTokenized) {
  for (const std::string& text :
       {std::string(1, '\0'), std::string(1000, '\0'), std::string("\xFF\xFE\x80"),
        std::string("\xC3"), std::string("\xED\xA0\x80"), std::string("\xF4\x90\x80\x80"),
        std::string("\xE2\x96\x81"), std::string("\xEF\xBF\xBD")}) {
    const std::vector<int32_t> ids = Encode(text);
    EXPECT_GT(ids.size(), 1u);
    for (const int32_t id : ids) EXPECT_TRUE(id >= 0 && id < 8192) << id;
  }
}

TEST_F(TokenizerTest, LongTextsAreTokenized) {
  std::string story;
  while (story.size() < (1u << 20)) story += "Once upon a time there was a fox. ";
  EXPECT_EQ(Decode(Encode(story)), story);
  // No space at which to cut it, and no piece that is longer than a few letters.
  const std::string letters(1u << 20, 'q');
  EXPECT_EQ(Decode(Encode(letters)), letters);
}

TEST_F(TokenizerTest, ThreadsShareIt) {
  const std::vector<int32_t> want = Encode("The fox and the hen went to the river.");
  std::vector<std::thread> threads;
  std::vector<int> equal(4, 0);
  for (size_t t = 0; t < equal.size(); ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 200; ++i) {
        const auto ids = tokenizer_->EncodePrompt("The fox and the hen went to the river.");
        equal[t] += ids.ok() && *ids == want;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(equal, ElementsAre(200, 200, 200, 200));
}

TEST(TokenizerLoadTest, ChecksTheVocabulary) {
  EXPECT_THAT(std::string(Tokenizer::Load(kModel, 8191, 2).status().message()),
              AllOf(HasSubstr("tokenizer.model"), HasSubstr("8192 pieces"), HasSubstr("8191")));
  EXPECT_THAT(std::string(Tokenizer::Load(kModel, 8192, 8192).status().message()),
              HasSubstr("bos_token_id is 8192"));
  EXPECT_THAT(std::string(Tokenizer::Load(kModel, 8192, -1).status().message()),
              HasSubstr("bos_token_id is -1"));
  EXPECT_TRUE(Tokenizer::Load(kModel, 10000, 2).ok());  // a padded vocabulary
}

TEST(TokenizerLoadTest, PackedFilesHoldIt) {
  const TempFolder folder;
  const std::string path = folder.File("model.firesteel");
  const auto pack = [&path](const std::string& tokenizer) {
    auto source = OpenFolderSource(kModel, WeightFormat::kI4, 1);
    ASSERT_TRUE(source.ok()) << source.status();
    ASSERT_TRUE(WritePackedFile(source->get(), {.tokenizer = tokenizer}, path).ok());
  };
  const auto content = Tokenizer::ReadModel(kModel);
  ASSERT_TRUE(content.ok()) << content.status();
  pack(*content);
  EXPECT_EQ(*Tokenizer::ReadModel(path), *content);
  const auto packed = Tokenizer::Load(path, 8192, 2);
  ASSERT_TRUE(packed.ok()) << packed.status();
  const auto plain = Tokenizer::Load(kModel, 8192, 2);
  ASSERT_TRUE(plain.ok()) << plain.status();
  EXPECT_EQ(*(*packed)->EncodePrompt("Once upon a time"),
            *(*plain)->EncodePrompt("Once upon a time"));
  // The guards of a folder's.
  EXPECT_THAT(std::string(Tokenizer::Load(path, 100, 2).status().message()),
              AllOf(HasSubstr(path), HasSubstr("tokenizer.model"), HasSubstr("8192 pieces")));
  pack("no model");
  EXPECT_THAT(std::string(Tokenizer::Load(path, 8192, 2).status().message()),
              AllOf(HasSubstr(path), HasSubstr("tokenizer.model")));
  pack("");
  EXPECT_EQ(Tokenizer::Load(path, 8192, 2).status().code(), absl::StatusCode::kNotFound);
}

TEST(TokenizerLoadTest, BadFilesAreErrors) {
  const TempFolder folder;
  EXPECT_EQ(Tokenizer::Load(folder.path(), 8192, 2).status().code(), absl::StatusCode::kNotFound);
  for (const std::string& bad : {std::string(), std::string("{}"), std::string(1000, '\xFF')}) {
    folder.Write("tokenizer.model", bad);
    const auto tokenizer = Tokenizer::Load(folder.path(), 8192, 2);
    EXPECT_EQ(tokenizer.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(tokenizer.status().message()),
                HasSubstr(folder.File("tokenizer.model")));
  }
}

std::string BundledModel() {
  std::ifstream in(std::string(kModel) + "/tokenizer.model", std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

/// A length-delimited protobuf field of at most 127 bytes.
std::string Field(int number, const std::string& content) {
  return std::string(1, static_cast<char>(number << 3 | 2)) +
         std::string(1, static_cast<char>(content.size())) + content;
}

std::string LoadError(const TempFolder& folder, const std::string& model) {
  folder.Write("tokenizer.model", model);
  return std::string(Tokenizer::Load(folder.path(), 1 << 20, 2).status().message());
}

// The library would follow offsets in such rules to memory that isn't there.
TEST(TokenizerLoadTest, NormalizationRulesAreRefused) {
  const TempFolder folder;
  const std::string model = BundledModel();
  ASSERT_EQ(LoadError(folder, model), "");
  EXPECT_EQ(LoadError(folder, model + Field(3, Field(2, ""))), "");
  for (const int spec : {3, 5}) {
    const std::string rules = Field(spec, Field(1, "nmt") + Field(2, "\x04wild"));
    EXPECT_THAT(LoadError(folder, model + rules), HasSubstr("precompiled_charsmap"));
    EXPECT_THAT(LoadError(folder, rules + model), HasSubstr("precompiled_charsmap"));
  }
}

TEST(TokenizerLoadTest, WhatIsNoMessageIsRefused) {
  const TempFolder folder;
  const std::string model = BundledModel();
  for (const std::string& tail :
       {std::string("\x1A"), std::string("\x1A\x05xx"), std::string("\x1B\x1C"),
        std::string("\x07"), Field(3, "\x12\x05x"), std::string(11, '\xFF'),
        std::string("\x01xx", 3), std::string(1, '\0')}) {
    EXPECT_THAT(LoadError(folder, model + tail), HasSubstr("not a protobuf message"));
  }
}

TEST(TokenizerLoadTest, DamagedModelsNeverCrash) {
  const TempFolder folder;
  const std::string model = BundledModel();
  uint64_t state = 1;
  const auto below = [&state](uint64_t n) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (state >> 33) % n;
  };
  int loaded = 0, refused = 0;
  for (int i = 0; i < 400; ++i) {
    std::string bad = model;
    for (uint64_t flips = 1 + below(4); flips > 0; --flips) {
      // Half of them at the end, where the settings are.
      const size_t at = below(2) == 0 ? below(bad.size()) : bad.size() - 1 - below(300);
      bad[at] = static_cast<char>(bad[at] ^ (1 << below(8)));
    }
    folder.Write("tokenizer.model", bad);
    const auto tokenizer = Tokenizer::Load(folder.path(), 1 << 20, 2);
    if (!tokenizer.ok()) {
      ++refused;
      continue;
    }
    ++loaded;
    const auto ids = (*tokenizer)->EncodePrompt("Once upon \xF0\x9F\xA6\x8A a time\n123\xFF");
    for (const int32_t id : ids.ok() ? *ids : std::vector<int32_t>{}) {
      EXPECT_TRUE(id >= 0 && id < 1 << 20);
      (*tokenizer)->TokenBytes(id);
    }
  }
  EXPECT_GT(loaded, 50);
  EXPECT_GT(refused, 50);
}

}  // namespace
}  // namespace firesteel
