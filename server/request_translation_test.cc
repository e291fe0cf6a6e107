#include "server/request_translation.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "google/rpc/error_details.pb.h"
#include "server/fake_engine.h"
#include "server/status.h"

namespace firesteel::server {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

ServedModel MakeModel() {
  ServedModel model;
  model.name = "fake";
  model.engine = std::make_unique<FakeEngine>();
  model.defaults = {.temperature = 0.5f, .top_k = 40, .top_p = 0.9f, .min_p = 0.05f};
  model.max_prompt_tokens = 100;
  return model;
}

v1::GenerateRequest ValidRequest() {
  v1::GenerateRequest request;
  request.set_prompt("hey");
  return request;
}

google::rpc::BadRequest BadRequestOf(const absl::Status& status) {
  google::rpc::BadRequest bad;
  const auto payload = status.GetPayload("type.googleapis.com/google.rpc.BadRequest");
  EXPECT_TRUE(payload.has_value());
  EXPECT_TRUE(bad.ParseFromString(std::string(payload.value_or(absl::Cord()))));
  return bad;
}

TEST(TranslateRequestTest, UnsetFieldsTakeTheModelsDefaults) {
  const ServedModel model = MakeModel();
  const auto out = TranslateRequest(ValidRequest(), model);
  ASSERT_TRUE(out.ok()) << out.status();
  EXPECT_THAT(out->request.prompt, ElementsAre(2, 3 + 'h', 3 + 'e', 3 + 'y'));
  EXPECT_EQ(out->request.max_tokens, 128u - 4u) << "256, but no more than the context leaves";
  EXPECT_FLOAT_EQ(out->request.sampling.temperature, 0.5f);
  EXPECT_EQ(out->request.sampling.top_k, 40u);
  EXPECT_FLOAT_EQ(out->request.sampling.top_p, 0.9f);
  EXPECT_FLOAT_EQ(out->request.sampling.min_p, 0.05f);
  EXPECT_TRUE(out->needs_seed);
  EXPECT_FALSE(out->request.stopping.ignore_eos);
}

TEST(TranslateRequestTest, SetFieldsArriveEvenWhereZero) {
  const ServedModel model = MakeModel();
  v1::GenerateRequest request;
  request.mutable_token_ids()->add_ids(7);
  request.mutable_token_ids()->add_ids(299);
  request.set_max_tokens(9);
  request.set_n(1);
  request.set_priority(-3);
  request.set_cache_salt("salt");
  auto* sampling = request.mutable_sampling();
  sampling->set_temperature(0);
  sampling->set_top_k(0);
  sampling->set_top_p(1);
  sampling->set_min_p(0);
  sampling->set_repetition_penalty(1);
  sampling->set_seed(0);
  auto* stopping = request.mutable_stopping();
  stopping->add_stop("END");
  stopping->add_stop_token_ids(5);
  stopping->set_ignore_eos(true);
  stopping->set_min_tokens(9);
  const auto out = TranslateRequest(request, model);
  ASSERT_TRUE(out.ok()) << out.status();
  EXPECT_THAT(out->request.prompt, ElementsAre(7, 299)) << "no bos is added";
  EXPECT_EQ(out->request.max_tokens, 9u);
  EXPECT_EQ(out->request.priority, -3);
  EXPECT_EQ(out->request.sampling.temperature, 0);
  EXPECT_EQ(out->request.sampling.top_k, 0u);
  EXPECT_EQ(out->request.sampling.top_p, 1);
  EXPECT_EQ(out->request.sampling.min_p, 0);
  EXPECT_FALSE(out->needs_seed);
  EXPECT_THAT(out->request.stopping.stop, ElementsAre("END"));
  EXPECT_THAT(out->request.stopping.stop_token_ids, ElementsAre(5));
  EXPECT_TRUE(out->request.stopping.ignore_eos);
  EXPECT_EQ(out->request.stopping.min_tokens, 9u);
}

TEST(TranslateRequestTest, PenaltiesBiasesAndOutputsArrive) {
  const ServedModel model = MakeModel();
  v1::GenerateRequest request = ValidRequest();
  request.set_n(3);
  request.set_cache_salt("salt");
  auto* sampling = request.mutable_sampling();
  sampling->set_repetition_penalty(1.5f);
  sampling->set_presence_penalty(-2);
  sampling->set_frequency_penalty(0.25f);
  (*sampling->mutable_logit_bias())[7] = -100;
  request.mutable_output()->set_logprobs(20);
  request.mutable_output()->set_echo(true);
  const auto out = TranslateRequest(request, model);
  ASSERT_TRUE(out.ok()) << out.status();
  const GenerationRequest& to = out->request;
  EXPECT_EQ(to.n, 3u);
  EXPECT_EQ(to.cache_salt, "salt");
  EXPECT_EQ(to.sampling.repetition_penalty, 1.5f);
  EXPECT_EQ(to.sampling.presence_penalty, -2);
  EXPECT_EQ(to.sampling.frequency_penalty, 0.25f);
  ASSERT_EQ(to.sampling.logit_bias.size(), 1u);
  EXPECT_EQ(to.sampling.logit_bias[0].token, 7);
  EXPECT_EQ(to.sampling.logit_bias[0].bias, -100);
  EXPECT_EQ(to.logprobs, 20u);
  EXPECT_TRUE(to.prompt_logprobs) << "an echo has log-probabilities, too";
  EXPECT_TRUE(out->echo);
  EXPECT_EQ(out->prompt_text, "hey");
}

TEST(TranslateRequestTest, EchoOfTokenIdsIsTheirText) {
  const ServedModel model = MakeModel();
  v1::GenerateRequest request;
  for (const unsigned char c : std::string("h\xC3")) request.mutable_token_ids()->add_ids(3 + c);
  request.mutable_output()->set_echo(true);
  const auto out = TranslateRequest(request, model);
  ASSERT_TRUE(out.ok()) << out.status();
  EXPECT_EQ(out->prompt_text, "h\xEF\xBF\xBD");
  EXPECT_FALSE(out->request.prompt_logprobs) << "nobody asked for them";
}

TEST(TranslateScoreTest, TextMayFillTheContext) {
  ServedModel model = MakeModel();
  model.max_prompt_tokens = 127;
  v1::ScoreRequest request;
  request.set_prompt(std::string(127, 'x'));
  const auto out = TranslateScore(request, model);
  ASSERT_TRUE(out.ok()) << out.status();
  EXPECT_EQ(out->request.prompt.size(), 128u);
  EXPECT_EQ(out->request.max_tokens, 0u);
  EXPECT_TRUE(out->request.prompt_logprobs);
  request.set_prompt(std::string(128, 'x'));
  EXPECT_THAT(std::string(TranslateScore(request, model).status().message()),
              HasSubstr("prompt: has 129 tokens; at most 128"));
  model.max_prompt_tokens = 100;  // --max-prompt-tokens
  request.set_prompt(std::string(100, 'x'));
  EXPECT_THAT(std::string(TranslateScore(request, model).status().message()),
              HasSubstr("prompt: has 101 tokens; at most 100"));
  EXPECT_FALSE(TranslateScore(v1::ScoreRequest(), model).ok());
}

TEST(TranslateRequestTest, EmptyPromptIsBosAlone) {
  const ServedModel model = MakeModel();
  v1::GenerateRequest request;
  request.set_prompt("");
  const auto out = TranslateRequest(request, model);
  ASSERT_TRUE(out.ok()) << out.status();
  EXPECT_THAT(out->request.prompt, ElementsAre(2));
}

TEST(TranslateRequestTest, LongestPromptLeavesRoomForOneToken) {
  ServedModel model = MakeModel();
  model.max_prompt_tokens = 127;
  v1::GenerateRequest request;
  for (int i = 0; i < 127; ++i) request.mutable_token_ids()->add_ids(5);
  const auto out = TranslateRequest(request, model);
  ASSERT_TRUE(out.ok()) << out.status();
  EXPECT_EQ(out->request.max_tokens, 1u);
}

struct Row {
  const char* name;
  void (*change)(v1::GenerateRequest&);
  const char* field;
  std::vector<std::string> says;  // value and limit
};

void PrintTo(const Row& row, std::ostream* out) { *out << row.name; }

class ViolationTest : public testing::TestWithParam<Row> {};

TEST_P(ViolationTest, NamesFieldValueAndLimit) {
  const ServedModel model = MakeModel();
  v1::GenerateRequest request = ValidRequest();
  GetParam().change(request);
  const auto out = TranslateRequest(request, model);
  ASSERT_EQ(out.status().code(), absl::StatusCode::kInvalidArgument);
  const google::rpc::BadRequest bad = BadRequestOf(out.status());
  ASSERT_EQ(bad.field_violations_size(), 1) << bad.ShortDebugString();
  EXPECT_EQ(bad.field_violations(0).field(), GetParam().field);
  for (const std::string& part : GetParam().says) {
    EXPECT_THAT(bad.field_violations(0).description(), HasSubstr(part));
  }
  EXPECT_THAT(std::string(out.status().message()), HasSubstr(GetParam().field));
}

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
using R = v1::GenerateRequest;

void AddIds(R& r, int count) {
  for (int i = 0; i < count; ++i) r.mutable_token_ids()->add_ids(5);
}

INSTANTIATE_TEST_SUITE_P(
    EveryField, ViolationTest,
    testing::Values(
        Row{"NoInput", [](R& r) { r.clear_prompt(); }, "prompt", {"token_ids"}},
        Row{"EmptyIds", [](R& r) { r.mutable_token_ids(); }, "token_ids.ids", {"empty"}},
        Row{"IdTooLarge",
            [](R& r) {
              r.mutable_token_ids()->add_ids(1);
              r.mutable_token_ids()->add_ids(300);
            },
            "token_ids.ids[1]",
            {"300", "below 300"}},
        Row{"IdBeyondInt",
            [](R& r) { r.mutable_token_ids()->add_ids(4294967295u); },
            "token_ids.ids[0]",
            {"4294967295", "300"}},
        Row{"IdsOverLimit", [](R& r) { AddIds(r, 101); }, "token_ids.ids", {"101", "100"}},
        Row{"IdsFillContext",
            [](R& r) { AddIds(r, 128); },
            "token_ids.ids",
            {"128 tokens", "of 128"}},
        Row{"PromptOverLimit",
            [](R& r) { r.set_prompt(std::string(100, 'x')); },
            "prompt",
            {"101 tokens", "100"}},
        Row{"PromptFillsContext",
            [](R& r) { r.set_prompt(std::string(130, 'x')); },
            "prompt",
            {"131 tokens", "of 128"}},
        Row{"PromptTooManyBytes",
            [](R& r) { r.set_prompt(std::string(6401, 'x')); },
            "prompt",
            {"6401 bytes", "6400"}},
        Row{"MaxTokensZero", [](R& r) { r.set_max_tokens(0); }, "max_tokens", {"0", "at least 1"}},
        Row{"NZero", [](R& r) { r.set_n(0); }, "n", {"0", "1 to 16"}},
        Row{"NTooLarge", [](R& r) { r.set_n(17); }, "n", {"17", "16"}},
        Row{"TemperatureNegative",
            [](R& r) { r.mutable_sampling()->set_temperature(-0.1f); },
            "sampling.temperature",
            {"-0.1", "0 to 100"}},
        Row{"TemperatureNaN",
            [](R& r) { r.mutable_sampling()->set_temperature(kNaN); },
            "sampling.temperature",
            {"nan"}},
        Row{"TemperatureInfinite",
            [](R& r) { r.mutable_sampling()->set_temperature(kInf); },
            "sampling.temperature",
            {"inf"}},
        Row{"TopPZero",
            [](R& r) { r.mutable_sampling()->set_top_p(0); },
            "sampling.top_p",
            {"0", "at most 1"}},
        Row{"TopPTooLarge",
            [](R& r) { r.mutable_sampling()->set_top_p(1.01f); },
            "sampling.top_p",
            {"1.01"}},
        Row{"TopPNaN",
            [](R& r) { r.mutable_sampling()->set_top_p(kNaN); },
            "sampling.top_p",
            {"nan"}},
        Row{"MinPNegative",
            [](R& r) { r.mutable_sampling()->set_min_p(-1); },
            "sampling.min_p",
            {"-1", "0 to 1"}},
        Row{"MinPNaN",
            [](R& r) { r.mutable_sampling()->set_min_p(kNaN); },
            "sampling.min_p",
            {"nan"}},
        Row{"RepetitionNaN",
            [](R& r) { r.mutable_sampling()->set_repetition_penalty(kNaN); },
            "sampling.repetition_penalty",
            {"nan", "above 0"}},
        Row{"RepetitionZero",
            [](R& r) { r.mutable_sampling()->set_repetition_penalty(0); },
            "sampling.repetition_penalty",
            {"0", "above 0"}},
        Row{"RepetitionInfinite",
            [](R& r) { r.mutable_sampling()->set_repetition_penalty(kInf); },
            "sampling.repetition_penalty",
            {"inf", "finite"}},
        Row{"FrequencyTooSmall",
            [](R& r) { r.mutable_sampling()->set_frequency_penalty(-2.5f); },
            "sampling.frequency_penalty",
            {"-2.5", "-2 to 2"}},
        Row{"BiasOfNoToken",
            [](R& r) { (*r.mutable_sampling()->mutable_logit_bias())[300] = 1; },
            "sampling.logit_bias[300]",
            {"300", "below 300"}},
        Row{"BiasTooLarge",
            [](R& r) { (*r.mutable_sampling()->mutable_logit_bias())[5] = 101; },
            "sampling.logit_bias[5]",
            {"101", "-100 to 100"}},
        Row{"BiasNaN",
            [](R& r) { (*r.mutable_sampling()->mutable_logit_bias())[5] = kNaN; },
            "sampling.logit_bias[5]",
            {"nan"}},
        Row{"PresenceTooLarge",
            [](R& r) { r.mutable_sampling()->set_presence_penalty(3); },
            "sampling.presence_penalty",
            {"3", "-2 to 2"}},
        Row{"BiasTooMany",
            [](R& r) {
              for (uint32_t i = 0; i < 1025; ++i)
                (*r.mutable_sampling()->mutable_logit_bias())[i] = 1;
            },
            "sampling.logit_bias",
            {"1025", "1024"}},
        Row{"StopTooMany",
            [](R& r) {
              for (int i = 0; i < 17; ++i) r.mutable_stopping()->add_stop("x");
            },
            "stopping.stop",
            {"17", "16"}},
        Row{"StopEmpty",
            [](R& r) {
              r.mutable_stopping()->add_stop("x");
              r.mutable_stopping()->add_stop("");
            },
            "stopping.stop[1]",
            {"0 bytes", "1 to 256"}},
        Row{"StopTooLong",
            [](R& r) { r.mutable_stopping()->add_stop(std::string(257, 'x')); },
            "stopping.stop[0]",
            {"257", "256"}},
        Row{"StopIdTooLarge",
            [](R& r) { r.mutable_stopping()->add_stop_token_ids(300); },
            "stopping.stop_token_ids[0]",
            {"300"}},
        Row{"StopIdsTooMany",
            [](R& r) {
              for (int i = 0; i < 65; ++i) r.mutable_stopping()->add_stop_token_ids(5);
            },
            "stopping.stop_token_ids",
            {"65", "64"}},
        Row{"MinTokensTooLarge",
            [](R& r) {
              r.set_max_tokens(5);
              r.mutable_stopping()->set_min_tokens(6);
            },
            "stopping.min_tokens",
            {"6", "max_tokens (5)"}},
        Row{"LogprobsTooMany",
            [](R& r) { r.mutable_output()->set_logprobs(21); },
            "output.logprobs",
            {"21", "20"}},
        Row{"SaltTooLong",
            [](R& r) { r.set_cache_salt(std::string(257, 'x')); },
            "cache_salt",
            {"257", "256"}}),
    [](const auto& row) { return row.param.name; });

TEST(TranslateRequestTest, AllWrongFieldsAreNamedAtOnce) {
  const ServedModel model = MakeModel();
  v1::GenerateRequest request = ValidRequest();
  request.set_max_tokens(0);
  request.mutable_sampling()->set_top_p(2);
  request.set_n(99);
  const auto out = TranslateRequest(request, model);
  EXPECT_EQ(BadRequestOf(out.status()).field_violations_size(), 3);
  EXPECT_THAT(std::string(out.status().message()), HasSubstr("and 2 more"));
}

TEST(TranslateRequestTest, ManyViolationsStayWithinTheTrailers) {
  const ServedModel model = MakeModel();
  v1::GenerateRequest request = ValidRequest();
  for (int i = 0; i < 64; ++i) request.mutable_stopping()->add_stop_token_ids(1000);
  const auto out = TranslateRequest(request, model);
  EXPECT_EQ(BadRequestOf(out.status()).field_violations_size(),
            static_cast<int>(FieldViolations::kMaxListed));
  EXPECT_THAT(std::string(out.status().message()), HasSubstr("and 63 more"));
  EXPECT_LT(ToGrpcStatus(out.status()).error_details().size(), 4096u);
}

TEST(ToProtoTest, EveryFinishReasonHasItsOwnValue) {
  EXPECT_EQ(ToProto(FinishReason::kLength), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(ToProto(FinishReason::kEos), v1::FINISH_REASON_EOS);
  EXPECT_EQ(ToProto(FinishReason::kStop), v1::FINISH_REASON_STOP);
  EXPECT_EQ(ToProto(FinishReason::kCancelled), v1::FINISH_REASON_CANCELLED);
  EXPECT_EQ(ToProto(FinishReason::kDeadlineExceeded), v1::FINISH_REASON_DEADLINE_EXCEEDED);
  EXPECT_EQ(ToProto(FinishReason::kError), v1::FINISH_REASON_ERROR);
}

TEST(ToProtoTest, TimingsKeepNanoseconds) {
  const v1::Timings out = ToProto(Timings{.queue = absl::Nanoseconds(5),
                                          .prefill = absl::Milliseconds(1500),
                                          .first_token = absl::ZeroDuration(),
                                          .decode = absl::ZeroDuration(),
                                          .total = absl::Seconds(3)});
  EXPECT_EQ(out.queue().nanos(), 5);
  EXPECT_EQ(out.prefill().seconds(), 1);
  EXPECT_EQ(out.prefill().nanos(), 500'000'000);
  EXPECT_FALSE(out.has_first_token()) << "none came";
  EXPECT_EQ(out.total().seconds(), 3);
}

}  // namespace
}  // namespace firesteel::server
