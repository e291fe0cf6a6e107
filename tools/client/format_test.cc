#include "tools/client/format.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace firesteel::client {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

TEST(FormatTest, DurationsKeepThreeDigitsInTheirUnit) {
  EXPECT_EQ(ShortDuration(absl::ZeroDuration()), "0.00 us");
  EXPECT_EQ(ShortDuration(absl::Microseconds(850)), "850 us");
  EXPECT_EQ(ShortDuration(absl::Microseconds(31240)), "31.2 ms");
  EXPECT_EQ(ShortDuration(absl::Milliseconds(1236)), "1.24 s");
  EXPECT_EQ(ShortDuration(absl::Seconds(3600)), "3600 s");
}

TEST(FormatTest, BytesAndCounts) {
  EXPECT_EQ(FormatBytes(512), "512 B");
  EXPECT_EQ(FormatBytes(1536), "1.50 KiB");
  EXPECT_EQ(FormatBytes(uint64_t{27} << 20), "27.0 MiB");
  EXPECT_EQ(FormatBytes(~uint64_t{0}), "16777216 TiB");
  EXPECT_EQ(FormatCount(970), "970");
  EXPECT_EQ(FormatCount(12'900'000), "12.9 M");
  EXPECT_EQ(FormatCount(2'614'000'000), "2.61 G");
}

TEST(FormatTest, FinishReasonsAreLowerCaseWithoutPrefix) {
  EXPECT_EQ(FinishReasonName(v1::FINISH_REASON_DEADLINE_EXCEEDED), "deadline_exceeded");
  EXPECT_EQ(FinishReasonName(v1::FINISH_REASON_UNSPECIFIED), "none");
  EXPECT_EQ(FinishReasonName(static_cast<v1::FinishReason>(77)), "reason 77");
}

TEST(FormatTest, SummarySaysWhatWasGeneratedAndWhatItCost) {
  v1::Usage usage;
  usage.set_prompt_tokens(5);
  usage.set_generated_tokens(65);
  v1::Timings timings;
  timings.mutable_total()->set_nanos(1'050'000'000 - 1'000'000'000);
  timings.mutable_total()->set_seconds(1);
  timings.mutable_first_token()->set_nanos(50'000'000);
  timings.mutable_decode()->set_seconds(1);
  v1::Sparsity sparsity;
  sparsity.set_ffn_active_fraction(0.071);
  sparsity.set_attention_attended_positions(34.25);
  sparsity.set_attention_attended_fraction(0.5);
  sparsity.set_flops_skipped_fraction(0.6);
  v1::Sequence last;
  last.set_finish_reason(v1::FINISH_REASON_STOP);
  last.set_stop_match("\n\n");
  EXPECT_EQ(FormatSummary(usage, timings, sparsity, last, absl::InfiniteDuration()),
            "[5 prompt + 65 generated tokens in 1.05 s | ttft 50.0 ms | 64.0 tokens/s | "
            "FFN 7.1% active | attended 34.2 positions (50.0%) | FLOPs skipped 60.0% | "
            "finish stop '\\n\\n']");
}

TEST(FormatTest, SummaryHasNoSpeedWhereThereIsNone) {
  v1::Usage usage;
  usage.set_generated_tokens(1);
  v1::Sequence last;
  last.set_finish_reason(v1::FINISH_REASON_EOS);
  const std::string summary =
      FormatSummary(usage, v1::Timings(), v1::Sparsity(), last, absl::Milliseconds(12));
  EXPECT_THAT(summary, HasSubstr("ttft 12.0 ms"));  // the client's own, as the server sent none
  EXPECT_THAT(summary, Not(HasSubstr("tokens/s")));
}

v1::ModelInfo SparkModel() {
  v1::ModelInfo model;
  model.set_name("spark-stories");
  model.set_is_default(true);
  model.set_architecture(v1::ARCHITECTURE_SPARK_GEMMA2);
  model.mutable_shape()->set_num_hidden_layers(3);
  model.mutable_shape()->set_sliding_window(512);
  model.mutable_shape()->add_layer_types(v1::ATTENTION_TYPE_SLIDING);
  model.mutable_shape()->add_layer_types(v1::ATTENTION_TYPE_FULL);
  model.mutable_shape()->add_layer_types(v1::ATTENTION_TYPE_SLIDING);
  model.mutable_sparsity_targets()->set_ffn_top_k(123);
  model.mutable_sparsity_targets()->set_ffn_active_fraction(0.08);
  model.mutable_sparsity_targets()->set_attention_top_k(64);
  return model;
}

TEST(FormatTest, ModelTableHasShapeAndTargets) {
  const std::string text = FormatModel(SparkModel());
  EXPECT_THAT(text, HasSubstr("model spark-stories (default)\n"));
  EXPECT_THAT(text, HasSubstr("spark_gemma2\n"));
  EXPECT_THAT(text, HasSubstr("3: 1 full, 2 with a window of 512\n"));
  EXPECT_THAT(text, HasSubstr("123 (8.0%)"));
  EXPECT_THAT(text, HasSubstr("64 positions"));
}

TEST(FormatTest, DenseModelHasNoTargets) {
  v1::ModelInfo model = SparkModel();
  model.set_architecture(v1::ARCHITECTURE_GEMMA2);
  EXPECT_THAT(FormatModel(model),
              AllOf(Not(HasSubstr("FFN top-k")), Not(HasSubstr("attention top-k"))));
}

TEST(FormatTest, ServerInfo) {
  v1::GetServerInfoResponse info;
  info.set_version("0.1.0");
  info.set_simd_target("AVX2");
  info.add_available_simd_targets("AVX2");
  info.add_available_simd_targets("SSE4");
  info.set_threads(1);
  info.mutable_start_time()->set_seconds(0);
  EXPECT_EQ(FormatServerInfo(info),
            "firesteel-server 0.1.0, 1 thread, SIMD target AVX2 of AVX2, SSE4\n"
            "serving since 1970-01-01 00:00:00 UTC\n");
}

TEST(FormatTest, ControlCharactersCannotReachTheTerminal) {
  EXPECT_EQ(VisibleText("a\tb\nc é 火"), "a\tb\nc é 火");
  EXPECT_EQ(VisibleText("\x1B[2Jx"), "\uFFFD[2Jx");
  EXPECT_EQ(VisibleText("\xC2\x9B"
                        "2Jx\x7F\r"),
            "\uFFFD2Jx\uFFFD\uFFFD");
  EXPECT_EQ(VisibleText("\xC2\xA0"), "\xC2\xA0");  // the first code point after the controls
}

TEST(FormatTest, JsonHasProtoNamesAndZeros) {
  v1::Usage usage;
  usage.set_prompt_tokens(3);
  EXPECT_EQ(ToJson(usage).value(), R"({"prompt_tokens":3,"cached_tokens":0,"generated_tokens":0})");
}

TEST(FormatTest, JsonRefusesATimeOutOfRange) {
  v1::Timings timings;
  timings.mutable_total()->set_seconds(int64_t{1} << 60);
  EXPECT_FALSE(ToJson(timings).ok());
}

}  // namespace
}  // namespace firesteel::client
