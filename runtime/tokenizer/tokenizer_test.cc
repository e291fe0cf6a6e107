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

}  // namespace
}  // namespace firesteel
