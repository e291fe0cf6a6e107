#include "server/kserve_translation.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>

#include "google/rpc/error_details.pb.h"
#include "server/fake_engine.h"
#include "server/status.h"

namespace firesteel::server {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using R = inference::ModelInferRequest;

R ValidRequest(const std::vector<std::string>& texts = {"hey"}) {
  R request;
  request.set_id("r1");
  auto* const input = request.add_inputs();
  input->set_name("text_input");
  input->set_datatype("BYTES");
  input->add_shape(static_cast<int64_t>(texts.size()));
  for (const auto& text : texts) input->mutable_contents()->add_bytes_contents(text);
  return request;
}

inference::InferParameter& Parameter(R& request, const std::string& name) {
  return (*request.mutable_parameters())[name];
}

TEST(TranslateInferTest, TextsBecomeRequests) {
  R request = ValidRequest({"one", "two"});
  request.set_model_name("m");
  const auto out = TranslateInfer(request);
  ASSERT_TRUE(out.ok()) << out.status();
  EXPECT_EQ(out->id, "r1");
  ASSERT_EQ(out->requests.size(), 2u);
  EXPECT_EQ(out->requests[0].prompt(), "one");
  EXPECT_EQ(out->requests[1].prompt(), "two");
  EXPECT_EQ(out->requests[1].model(), "m");
  EXPECT_THAT(out->shape, ElementsAre(2));
  EXPECT_THAT(out->outputs, ElementsAre("text_output"));
  EXPECT_FALSE(out->raw);
}

TEST(TranslateInferTest, RawContentsAreReadAndAnswered) {
  R request = ValidRequest({"", ""});
  request.mutable_inputs(0)->clear_contents();
  request.mutable_inputs(0)->add_shape(1);  // [2, 1]
  request.add_raw_input_contents(std::string("\x03\0\0\0one\0\0\0\0", 11));
  const auto out = TranslateInfer(request);
  ASSERT_TRUE(out.ok()) << out.status();
  EXPECT_TRUE(out->raw);
  EXPECT_EQ(out->requests[0].prompt(), "one");
  EXPECT_EQ(out->requests[1].prompt(), "");
  EXPECT_THAT(out->shape, ElementsAre(2, 1));
}

TEST(TranslateInferTest, EveryParameterArrives) {
  R request = ValidRequest();
  Parameter(request, "max_tokens").set_int64_param(7);
  Parameter(request, "temperature").set_double_param(0.5);
  Parameter(request, "top_k").set_uint64_param(3);
  Parameter(request, "top_p").set_string_param("0.25");  // a client without numbers
  Parameter(request, "min_p").set_int64_param(0);
  Parameter(request, "repetition_penalty").set_double_param(1.5);
  Parameter(request, "presence_penalty").set_double_param(-1);
  Parameter(request, "frequency_penalty").set_double_param(1);
  Parameter(request, "seed").set_uint64_param(std::numeric_limits<uint64_t>::max());
  Parameter(request, "stop").set_string_param(R"(["a", "[b"])");
  Parameter(request, "ignore_eos").set_bool_param(true);
  Parameter(request, "min_tokens").set_int64_param(2);
  Parameter(request, "logprobs").set_int64_param(4);
  Parameter(request, "echo").set_string_param("true");
  Parameter(request, "priority").set_int64_param(-5);
  Parameter(request, "cache_salt").set_string_param("s");
  Parameter(request, "details").set_bool_param(true);
  Parameter(request, "triton_enable_empty_final_response").set_bool_param(true);
  const auto out = TranslateInfer(request);
  ASSERT_TRUE(out.ok()) << out.status();
  const v1::GenerateRequest& to = out->requests[0];
  EXPECT_EQ(to.max_tokens(), 7u);
  EXPECT_EQ(to.sampling().temperature(), 0.5f);
  EXPECT_EQ(to.sampling().top_k(), 3u);
  EXPECT_EQ(to.sampling().top_p(), 0.25f);
  EXPECT_TRUE(to.sampling().has_min_p());
  EXPECT_EQ(to.sampling().repetition_penalty(), 1.5f);
  EXPECT_EQ(to.sampling().presence_penalty(), -1);
  EXPECT_EQ(to.sampling().frequency_penalty(), 1);
  EXPECT_EQ(to.sampling().seed(), std::numeric_limits<uint64_t>::max());
  EXPECT_THAT(to.stopping().stop(), ElementsAre("a", "[b"));
  EXPECT_TRUE(to.stopping().ignore_eos());
  EXPECT_EQ(to.stopping().min_tokens(), 2u);
  EXPECT_EQ(to.output().logprobs(), 4u);
  EXPECT_TRUE(to.output().echo());
  EXPECT_EQ(to.priority(), -5);
  EXPECT_EQ(to.cache_salt(), "s");
  EXPECT_EQ(out->outputs.size(), 5u);
}

struct Row {
  const char* name;
  void (*change)(R&);
  const char* field;
  const char* says;
};

void PrintTo(const Row& row, std::ostream* out) { *out << row.name; }

class InferViolationTest : public testing::TestWithParam<Row> {};

TEST_P(InferViolationTest, NamesWhatIsWrong) {
  R request = ValidRequest();
  GetParam().change(request);
  const absl::Status status = TranslateInfer(request).status();
  ASSERT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr(std::string(GetParam().field) + ": " + GetParam().says));
}

INSTANTIATE_TEST_SUITE_P(
    All, InferViolationTest,
    testing::Values(
        Row{"NoInput", [](R& r) { r.clear_inputs(); }, "inputs", "has 0 tensors"},
        Row{"OtherInput", [](R& r) { r.mutable_inputs(0)->set_name("x"); }, "inputs",
            "has 1 tensors; exactly one is needed, named text_input"},
        Row{"TwoInputs", [](R& r) { *r.add_inputs() = r.inputs(0); }, "inputs", "has 2 tensors"},
        Row{"Datatype", [](R& r) { r.mutable_inputs(0)->set_datatype("INT32"); },
            "inputs[0].datatype", "is \"INT32\""},
        Row{"Shape", [](R& r) { r.mutable_inputs(0)->set_shape(0, 0); }, "inputs[0].shape",
            "is [0]; must be [N] or [N, 1], N from 1 to 64"},
        Row{"ShapeNegative", [](R& r) { r.mutable_inputs(0)->set_shape(0, -1); }, "inputs[0].shape",
            "is [-1]"},
        Row{"ShapeWide", [](R& r) { r.mutable_inputs(0)->add_shape(2); }, "inputs[0].shape",
            "is [1, 2]"},
        Row{"BatchTooLarge", [](R& r) { r.mutable_inputs(0)->set_shape(0, 65); }, "inputs[0].shape",
            "is [65]"},
        Row{"ShapeHuge",
            [](R& r) {
              r.mutable_inputs(0)->set_shape(0, std::numeric_limits<int64_t>::max());
              r.mutable_inputs(0)->add_shape(std::numeric_limits<int64_t>::max());
            },
            "inputs[0].shape", "is [9223372036854775807, 9223372036854775807]; must be"},
        Row{"ShapeEmpty", [](R& r) { r.mutable_inputs(0)->clear_shape(); }, "inputs[0].shape",
            "is []; must be"},
        Row{"ShapeLong", [](R& r) { r.mutable_inputs(0)->mutable_shape()->Resize(100'000, 1); },
            "inputs[0].shape", "is [1, 1, 1, 1, ...] of 100000; must be [N] or [N, 1]"},
        Row{"TooFewElements", [](R& r) { r.mutable_inputs(0)->set_shape(0, 2); }, "inputs[0]",
            "does not hold the 2"},
        Row{"RawAndContents", [](R& r) { r.add_raw_input_contents("x"); }, "raw_input_contents",
            "goes with"},
        Row{"RawTwice",
            [](R& r) {
              r.mutable_inputs(0)->clear_contents();
              r.add_raw_input_contents(std::string("\x01\0\0\0x", 5));
              r.add_raw_input_contents(std::string("\x01\0\0\0x", 5));
            },
            "raw_input_contents", "goes with one entry an input"},
        Row{"RawEmpty",
            [](R& r) {
              r.mutable_inputs(0)->clear_contents();
              r.add_raw_input_contents("");
            },
            "inputs[0]", "does not hold the 1 BYTES elements"},
        Row{"ContentsMissing", [](R& r) { r.mutable_inputs(0)->clear_contents(); }, "inputs[0]",
            "does not hold the 1 BYTES elements"},
        Row{"ContentsOfTwoTypes",
            [](R& r) { r.mutable_inputs(0)->mutable_contents()->add_int64_contents(1); },
            "inputs[0].contents", "has elements of another type"},
        Row{"RawCut",
            [](R& r) {
              r.mutable_inputs(0)->clear_contents();
              r.add_raw_input_contents(std::string("\x04\0\0\0one", 7));
            },
            "inputs[0]", "does not hold"},
        Row{"RawLength",
            [](R& r) {
              r.mutable_inputs(0)->clear_contents();
              r.add_raw_input_contents(std::string("\xff\xff\xff\xffone", 7));
            },
            "inputs[0]", "does not hold"},
        Row{"NotUtf8",
            [](R& r) { r.mutable_inputs(0)->mutable_contents()->set_bytes_contents(0, "\xff"); },
            "inputs[0].contents.bytes_contents[0]", "is not UTF-8"},
        Row{"RawNotUtf8",
            [](R& r) {
              r.mutable_inputs(0)->clear_contents();
              r.add_raw_input_contents(std::string("\x01\0\0\0\xff", 5));
            },
            "raw_input_contents[0], element 0", "is not UTF-8"},
        Row{"LongId", [](R& r) { r.set_id(std::string(kMaxInferIdBytes + 1, 'x')); }, "id",
            "has 1025 bytes; at most 1024 are allowed"},
        Row{"TensorParameter",
            [](R& r) {
              (*r.mutable_inputs(0)->mutable_parameters())["shared_memory_region"].set_string_param(
                  "x");
            },
            "inputs[0].parameters", "has 1 entries"},
        Row{"UnknownParameter", [](R& r) { Parameter(r, "max_new_tokens").set_int64_param(1); },
            "parameters[\"max_new_tokens\"]", "is no parameter of this model; known are"},
        Row{"NegativeTokens", [](R& r) { Parameter(r, "max_tokens").set_int64_param(-1); },
            "parameters[\"max_tokens\"]", "is -1; must be a whole number"},
        Row{"HugeTokens", [](R& r) { Parameter(r, "max_tokens").set_double_param(1e30); },
            "parameters[\"max_tokens\"]", "is 1e+30; must be a whole number from 0 to 4294967295"},
        Row{"TokensOf64Bits",
            [](R& r) { Parameter(r, "max_tokens").set_int64_param(int64_t{1} << 32); },
            "parameters[\"max_tokens\"]",
            "is 4294967296; must be a whole number from 0 to 4294967295"},
        Row{"UnsignedTokensOf64Bits",
            [](R& r) { Parameter(r, "max_tokens").set_uint64_param(uint64_t{1} << 32); },
            "parameters[\"max_tokens\"]",
            "is 4294967296; must be a whole number from 0 to 4294967295"},
        Row{"PriorityOf64Bits",
            [](R& r) { Parameter(r, "priority").set_int64_param(int64_t{1} << 31); },
            "parameters[\"priority\"]",
            "is 2147483648; must be a whole number from -2147483648 to 2147483647"},
        Row{"FractionOfAToken", [](R& r) { Parameter(r, "max_tokens").set_double_param(1.5); },
            "parameters[\"max_tokens\"]", "is 1.5"},
        Row{"NaNTokens",
            [](R& r) {
              Parameter(r, "max_tokens").set_double_param(std::numeric_limits<double>::quiet_NaN());
            },
            "parameters[\"max_tokens\"]", "is nan"},
        Row{"TextTemperature", [](R& r) { Parameter(r, "temperature").set_string_param("warm"); },
            "parameters[\"temperature\"]", "is \"warm\"; must be a number"},
        Row{"UnsetParameter", [](R& r) { Parameter(r, "temperature"); },
            "parameters[\"temperature\"]", "is not set"},
        Row{"StopNoString", [](R& r) { Parameter(r, "stop").set_bool_param(true); },
            "parameters[\"stop\"]", "is true; must be a string"},
        Row{"StopNoList", [](R& r) { Parameter(r, "stop").set_string_param("[1]"); },
            "parameters[\"stop\"]", "is \"[1]\"; must be a string, or a JSON list"},
        Row{"DetailsNoTruth", [](R& r) { Parameter(r, "details").set_int64_param(1); },
            "parameters[\"details\"]", "is 1; must be true or false"},
        Row{"UnknownOutput", [](R& r) { r.add_outputs()->set_name("logits"); }, "outputs[0].name",
            "is \"logits\"; no output"},
        Row{"OutputParameter",
            [](R& r) {
              auto* const output = r.add_outputs();
              output->set_name("text_output");
              (*output->mutable_parameters())["classification"].set_int64_param(3);
            },
            "outputs[0].parameters", "has 1 entries; none is known"},
        Row{"OutputsBeyondNumber",  // refused by their number: looking at each takes its square
            [](R& r) {
              for (int i = 0; i < 100'000; ++i) r.add_outputs()->set_name(std::to_string(i));
            },
            "outputs", "has 100000 entries; this model has 5"},
        Row{"OutputTwice",
            [](R& r) {
              r.add_outputs()->set_name("text_output");
              r.add_outputs()->set_name("text_output");
            },
            "outputs[1].name", "is \"text_output\"; it is there already"}),
    [](const auto& row) { return row.param.name; });

// Clients choose the type of a parameter by the type of the value at hand.
TEST(TranslateInferTest, NumbersMayBeOfAnyType) {
  const std::vector<void (*)(inference::InferParameter*)> two = {
      [](auto* p) { p->set_int64_param(2); }, [](auto* p) { p->set_uint64_param(2); },
      [](auto* p) { p->set_double_param(2); }, [](auto* p) { p->set_string_param("2"); }};
  for (const auto& set : two) {
    R request = ValidRequest();
    set(&Parameter(request, "temperature"));
    set(&Parameter(request, "max_tokens"));
    const auto out = TranslateInfer(request);
    ASSERT_TRUE(out.ok()) << out.status();
    EXPECT_EQ(out->requests[0].sampling().temperature(), 2.0f);
    EXPECT_EQ(out->requests[0].max_tokens(), 2u);
  }
}

TEST(TranslateInferTest, TimeoutIsInMicroseconds) {
  R request = ValidRequest();
  EXPECT_EQ(TranslateInfer(request)->timeout, absl::InfiniteDuration());
  Parameter(request, "timeout").set_int64_param(1500);
  EXPECT_EQ(TranslateInfer(request)->timeout, absl::Microseconds(1500));
  Parameter(request, "timeout").set_uint64_param(0);
  EXPECT_EQ(TranslateInfer(request)->timeout, absl::InfiniteDuration()) << "Triton's default";
  for (const int64_t wrong : {int64_t{-1}, std::numeric_limits<int64_t>::min()}) {
    Parameter(request, "timeout").set_int64_param(wrong);
    EXPECT_THAT(std::string(TranslateInfer(request).status().message()),
                HasSubstr("whole number of microseconds"));
  }
}

TEST(TranslateInferTest, IdMayBeAsLongAsItsLimit) {
  R request = ValidRequest();
  request.set_id(std::string(kMaxInferIdBytes, 'x'));
  EXPECT_TRUE(TranslateInfer(request).ok());
}

TEST(TranslateInferTest, OtherVersionIsNotFound) {
  R request = ValidRequest();
  request.set_model_version("2");
  EXPECT_EQ(TranslateInfer(request).status().code(), absl::StatusCode::kNotFound);
  request.set_model_version("1");
  EXPECT_TRUE(TranslateInfer(request).ok());
}

TEST(FillInferTest, TypedAndRawSayTheSame) {
  InferRequest request;
  request.id = "r1";
  request.shape = {2};
  request.outputs = {"text_output", "generated_tokens", "finish_reason"};
  std::vector<InferOutput> outputs(2);
  outputs[0].sequence.set_text("ab");
  outputs[0].sequence.set_finish_reason(v1::FINISH_REASON_EOS);
  outputs[0].usage.generated_tokens = 258;
  inference::ModelInferResponse typed;
  FillInfer(request, "m", outputs, &typed);
  EXPECT_EQ(typed.model_name(), "m");
  EXPECT_EQ(typed.model_version(), "1");
  EXPECT_EQ(typed.id(), "r1");
  ASSERT_EQ(typed.outputs_size(), 3);
  EXPECT_THAT(typed.outputs(0).shape(), ElementsAre(2));
  EXPECT_THAT(typed.outputs(0).contents().bytes_contents(), ElementsAre("ab", ""));
  EXPECT_THAT(typed.outputs(1).contents().uint_contents(), ElementsAre(258, 0));
  EXPECT_THAT(typed.outputs(2).contents().bytes_contents(), ElementsAre("eos", ""));

  request.raw = true;
  inference::ModelInferResponse raw;
  FillInfer(request, "m", outputs, &raw);
  EXPECT_FALSE(raw.outputs(0).has_contents());
  EXPECT_THAT(raw.raw_output_contents(), ElementsAre(std::string("\x02\0\0\0ab\0\0\0\0", 10),
                                                     std::string("\x02\x01\0\0\0\0\0\0", 8),
                                                     std::string("\x03\0\0\0eos\0\0\0\0", 11)));
}

}  // namespace
}  // namespace firesteel::server
