#include "server/tokenization.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "server/fake_engine.h"

namespace firesteel::server {
namespace {

using ::testing::HasSubstr;

// The fake tokenizer has one token a byte: 3 + byte, behind bos (2).
ServedModel MakeModel() {
  ServedModel model;
  model.name = "fake";
  model.engine = std::make_unique<FakeEngine>();
  model.max_prompt_tokens = 100;
  return model;
}

TEST(TokenizeTest, BosIsThereUnlessDeclined) {
  const ServedModel model = MakeModel();
  v1::TokenizeRequest request;
  request.set_text("hi");
  v1::TokenizeResponse with;
  ASSERT_TRUE(Tokenize(request, model, &with).ok());
  ASSERT_EQ(with.tokens_size(), 3);
  EXPECT_EQ(with.tokens(0).token_id(), 2u);
  EXPECT_EQ(with.tokens(0).text(), "");
  EXPECT_EQ(with.tokens(1).token_id(), 3u + 'h');
  EXPECT_EQ(with.tokens(1).text(), "h");
  EXPECT_EQ(with.model(), "fake");
  request.set_add_bos(false);
  v1::TokenizeResponse without;
  ASSERT_TRUE(Tokenize(request, model, &without).ok());
  EXPECT_EQ(without.tokens_size(), 2);
}

TEST(TokenizeTest, BytesOfACodePointAreShownAsReplacements) {
  const ServedModel model = MakeModel();
  v1::TokenizeRequest request;
  request.set_text("\xC3\xA9");  // é
  v1::TokenizeResponse response;
  ASSERT_TRUE(Tokenize(request, model, &response).ok());
  EXPECT_EQ(response.tokens(1).text(), "\xEF\xBF\xBD");
}

TEST(TokenizeTest, TextThatCannotFitIsRefusedUnread) {
  const ServedModel model = MakeModel();
  v1::TokenizeRequest request;
  request.set_text(std::string(6401, 'x'));
  v1::TokenizeResponse response;
  const absl::Status status = Tokenize(request, model, &response);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("text: has 6401 bytes; at most 6400"));
}

TEST(DetokenizeTest, JoinsBytesToCodePoints) {
  const ServedModel model = MakeModel();
  v1::DetokenizeRequest request;
  for (const unsigned char c : std::string("a\xC3\xA9\xC3")) request.add_token_ids(3 + c);
  v1::DetokenizeResponse response;
  ASSERT_TRUE(Detokenize(request, model, &response).ok());
  EXPECT_EQ(response.text(), "a\xC3\xA9\xEF\xBF\xBD") << "what is left unfinished is replaced";
  EXPECT_EQ(response.model(), "fake");
}

TEST(DetokenizeTest, WrongIdsAreNamed) {
  const ServedModel model = MakeModel();
  v1::DetokenizeRequest request;
  request.add_token_ids(5);
  request.add_token_ids(300);
  v1::DetokenizeResponse response;
  const absl::Status status = Detokenize(request, model, &response);
  EXPECT_THAT(std::string(status.message()), HasSubstr("token_ids[1]: is 300; token ids"));
  EXPECT_EQ(response.text(), "");
}

TEST(TokenizeTest, AnswerHasItsLimit) {
  ServedModel model = MakeModel();
  model.max_answer_bytes = 500;
  v1::TokenizeRequest request;
  v1::TokenizeResponse response;
  request.set_text(std::string(40, 'x'));
  EXPECT_TRUE(Tokenize(request, model, &response).ok());
  EXPECT_LE(response.ByteSizeLong(), 500u);
  request.set_text(std::string(100, 'x'));
  const absl::Status status = Tokenize(request, model, &response);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("text: has 101 tokens, whose answer"));

  model.max_answer_bytes = 50;
  v1::DetokenizeRequest ids;
  for (int i = 0; i < 100; ++i) ids.add_token_ids(3 + 'x');
  v1::DetokenizeResponse joined;
  EXPECT_THAT(std::string(Detokenize(ids, model, &joined).message()),
              HasSubstr("token_ids: have a text of 100 bytes; at most 50"));
}

TEST(DetokenizeTest, AtMostAContextOfTokens) {
  const ServedModel model = MakeModel();
  v1::DetokenizeRequest request;
  for (int i = 0; i < 129; ++i) request.add_token_ids(5);
  v1::DetokenizeResponse response;
  const absl::Status status = Detokenize(request, model, &response);
  EXPECT_THAT(std::string(status.message()), HasSubstr("has 129 tokens; at most 128"));
}

}  // namespace
}  // namespace firesteel::server
