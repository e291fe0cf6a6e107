#include "server/answer_size.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "inference/grpc_service.pb.h"
#include "server/fake_engine.h"
#include "server/kserve_translation.h"

namespace firesteel::server {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

ServedModel MakeModel(uint64_t max_answer_bytes = uint64_t{4} << 20) {
  ServedModel model;
  model.name = "m";
  model.engine = std::make_unique<FakeEngine>();
  model.max_prompt_tokens = 127;
  model.max_answer_bytes = max_answer_bytes;
  model.longest_token_text = LongestTokenText(FakeTokenizer(), FakeModelConfig().vocab_size);
  return model;
}

/// As large as an answer to this can get.
SequenceOutput LargestOutput(const TranslatedRequest& request, int32_t worst_token) {
  const GenerationRequest& asked = request.request;
  SequenceOutput output;
  output.text = request.echo ? request.prompt_text : "";
  const auto add = [&](int32_t token) {
    TokenLogprob entry = {.token_id = token, .logprob = -1.2345678e-30f};
    entry.alternatives.assign(*asked.logprobs,
                              {.token_id = worst_token, .logprob = -1.2345678e-30f});
    output.logprobs.push_back(entry);
  };
  if (asked.prompt_logprobs) {
    for (const int32_t id : asked.prompt) add(id);
  }
  for (uint32_t i = 0; i < asked.max_tokens; ++i) {
    add(worst_token);
    output.text += FakeTokenizer().TokenBytes(worst_token);
    if (request.return_token_ids) output.token_ids.push_back(299);
  }
  output.end = SequenceEnd{FinishReason::kStop, std::string(256, 's')};
  return output;
}

// No answer is larger than what was said before the work, and none is much smaller.
TEST(AnswerSizeTest, BoundHoldsForTheLargestAnswer) {
  const ServedModel model = MakeModel();
  v1::GenerateRequest request;
  request.set_prompt("hello");
  request.set_max_tokens(100);
  request.mutable_output()->set_logprobs(20);
  request.mutable_output()->set_return_token_ids(true);
  request.mutable_output()->set_echo(true);
  const auto translated = TranslateRequest(request, model);
  ASSERT_TRUE(translated.ok()) << translated.status();
  // Byte 1: one byte of text, six of JSON.
  const SequenceOutput output = LargestOutput(*translated, 3 + 1);

  v1::Sequence sequence;
  FillSequence(0, output, model.engine->tokenizer(), &sequence);
  const uint64_t bound = MaxAnswerBytes(*translated, model, AnswerForm::kProto);
  EXPECT_LE(sequence.ByteSizeLong(), bound);
  EXPECT_GE(3 * sequence.ByteSizeLong(), bound);

  InferRequest infer;
  infer.outputs = {"text_output", "details"};
  inference::ModelInferResponse response;
  FillInfer(infer, "m", {{.sequence = sequence, .usage = {}}}, &response);
  const uint64_t json_bound = MaxAnswerBytes(*translated, model, AnswerForm::kJson);
  EXPECT_LE(response.ByteSizeLong(), json_bound);
  EXPECT_GE(3 * response.ByteSizeLong(), json_bound);
}

TEST(AnswerSizeTest, WhatCouldBeTooLargeIsRefusedWithTheNumbers) {
  const ServedModel model = MakeModel(64 << 10);
  v1::GenerateRequest request;
  request.set_prompt("hey");
  request.set_n(16);
  request.set_max_tokens(100);
  const auto bounded = [&](size_t answers) {
    return WithBoundedAnswer(TranslateRequest(request, model), model, AnswerForm::kProto, answers)
        .status();
  };
  EXPECT_TRUE(bounded(1).ok()) << bounded(1);
  EXPECT_THAT(std::string(bounded(16).message()), HasSubstr("for each of 16 texts"));
  request.mutable_output()->set_logprobs(20);
  EXPECT_EQ(bounded(1).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(bounded(1).message()),
              AllOf(HasSubstr("max_tokens: is 100, n 16, logprobs 20: the answer could have "),
                    HasSubstr("at most 65536 are allowed")));
  EXPECT_EQ(WithBoundedAnswer(absl::NotFoundError("x"), model, AnswerForm::kProto).status().code(),
            absl::StatusCode::kNotFound);
}

TEST(AnswerSizeTest, FrontsFitAndMakeTheWhole) {
  const ServedModel model = MakeModel(64 << 10);
  SequenceOutput whole;
  for (int i = 0; i < 60'000; ++i) whole.text += i % 3 == 0 ? "ü" : "€";
  for (int i = 0; i < 50'000; ++i) whole.token_ids.push_back(i);
  for (int i = 0; i < 300; ++i) {
    TokenLogprob entry = {.token_id = i % 256, .logprob = -1.0f};
    entry.alternatives.assign(20, {.token_id = 4, .logprob = -2.0f});
    whole.logprobs.push_back(entry);
  }
  whole.starts_prompt = true;
  whole.end = SequenceEnd{FinishReason::kEos, ""};
  SequenceOutput rest = whole, joined;
  int messages = 0;
  while (!rest.empty()) {
    SequenceOutput front = TakeFront(model, &rest);
    EXPECT_EQ(front.starts_prompt, messages == 0);
    EXPECT_EQ(front.end.has_value(), rest.empty()) << "the end comes last";
    EXPECT_NE(static_cast<unsigned char>(front.text.empty() ? 0 : front.text[0]) & 0xC0, 0x80);
    joined.text += front.text;
    joined.token_ids.insert(joined.token_ids.end(), front.token_ids.begin(), front.token_ids.end());
    joined.logprobs.insert(joined.logprobs.end(), front.logprobs.begin(), front.logprobs.end());
    v1::Sequence sequence;
    FillSequence(0, std::move(front), model.engine->tokenizer(), &sequence);
    EXPECT_LE(sequence.ByteSizeLong(), model.max_answer_bytes);
    ++messages;
  }
  EXPECT_EQ(joined.text, whole.text);
  EXPECT_EQ(joined.token_ids, whole.token_ids);
  EXPECT_EQ(joined.logprobs.size(), whole.logprobs.size());
  EXPECT_GT(messages, 5);
  EXPECT_LT(messages, 100);
}

}  // namespace
}  // namespace firesteel::server
