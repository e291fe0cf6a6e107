#include "tools/simulate/recording.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tools/simulate/simulator.h"

namespace firesteel::simulate {
namespace {

using ::testing::HasSubstr;

Recording ReadKept(const std::string& name) {
  auto recording =
      ReadRecording(FIRESTEEL_SOURCE_DIR "/tools/simulate/recordings/" + name + ".json");
  EXPECT_TRUE(recording.ok()) << recording.status();
  return *std::move(recording);
}

// The real engine with the bundled model at a quarter and at three quarters of its capacity and
// with 160 requests at once, as recorded (docs/scheduling.md): the simulator says what was
// measured, and a change of the policy that these loads feel shows here.
class ReplayTest : public ::testing::TestWithParam<const char*> {};

TEST_P(ReplayTest, IsWithin15PercentOfWhatWasMeasured) {
  const Recording recording = ReadKept(GetParam());
  const auto simulated =
      Simulate(recording.trace, recording.machine, recording.options, recording.kv_cache_tokens,
               recording.context_tokens, Intake::kOpen, {});
  ASSERT_TRUE(simulated.ok()) << simulated.status();
  const Outcome& measured = recording.measured;
  EXPECT_EQ(simulated->completed, measured.completed);
  const auto expect_near = [](const char* what, double simulated_value, double measured_value) {
    EXPECT_NEAR(simulated_value / measured_value, 1, 0.15) << what;
  };
  expect_near("throughput", simulated->tokens_per_second(), measured.tokens_per_second());
  expect_near("first token, median", simulated->ttft.p50, measured.ttft.p50);
  expect_near("first token, 99th percentile", simulated->ttft.p99, measured.ttft.p99);
}

INSTANTIATE_TEST_SUITE_P(Recordings, ReplayTest, ::testing::Values("light", "busy", "burst"),
                         [](const auto& param) { return std::string(param.param); });

TEST(Recording, IsReadAsItWasWritten) {
  Recording recording = ReadKept("light");
  recording.options.max_queue_wait = absl::Milliseconds(250);
  recording.options.prefix_cache = false;
  recording.trace[1].priority = -2;
  recording.trace[2].timeout_seconds = 1.5;
  const std::string text = ToJson(recording);
  const auto read = ParseRecording(text);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(ToJson(*read), text);
  EXPECT_EQ(read->options.max_queue_wait, absl::Milliseconds(250));
  EXPECT_FALSE(read->options.prefix_cache);
  EXPECT_EQ(read->trace[1].priority, -2);
  EXPECT_EQ(read->trace[2].timeout_seconds, 1.5);
  EXPECT_EQ(read->machine.pace, recording.machine.pace);
  EXPECT_EQ(ToTable(read->measured), ToTable(recording.measured));
}

TEST(Recording, ErrorsNameWhatIsWrong) {
  const std::string good = ToJson(ReadKept("burst"));
  const auto error = [&](const std::string& part, const std::string& instead) {
    std::string text = good;
    const size_t place = text.find(part);
    EXPECT_NE(place, std::string::npos) << part;
    text.replace(place, part.size(), instead);
    return std::string(ParseRecording(text).status().message());
  };
  EXPECT_THAT(error("{", ""), HasSubstr("is not a JSON object"));
  EXPECT_THAT(error("\"max_batch_size\":8", "\"max_batch_size\":0"),
              HasSubstr("options.max_batch_size is not a number from 1"));
  EXPECT_THAT(error("\"max_batch_tokens\":256", "\"max_batch_tokens\":7"),
              HasSubstr("options.max_batch_tokens is not a number from 8"));
  EXPECT_THAT(error("\"prefix_cache\":true", "\"prefix_cache\":1"),
              HasSubstr("options.prefix_cache is neither true nor false"));
  EXPECT_THAT(error("\"options\"", "\"x\""), HasSubstr("options.max_batch_size"));
  EXPECT_THAT(error("\"p99\":", "\"p99\":-"),
              HasSubstr("measured.time_to_first_token_seconds.p99"));
  EXPECT_THAT(error("\"queue_full\":0", "\"queue_full\":\"0\""),
              HasSubstr("measured.refused.queue_full"));
  EXPECT_THAT(error("\"pace\": [", "\"pace\": [0,"), HasSubstr("pace has what is not a number"));
  EXPECT_THAT(error("\"pace\": [", "\"pace\": 3, \"y\": ["), HasSubstr("pace is not a list"));
  EXPECT_THAT(error("\"seconds,", "7, \"seconds,"), HasSubstr("trace has what is not a string"));
  EXPECT_THAT(error("\"seconds,", "\"minutes,"), HasSubstr("no column seconds"));
  EXPECT_EQ(ReadRecording("/nonexistent").status().code(), absl::StatusCode::kNotFound);
}

TEST(Machine, StepsTakeAsLongAsTheMomentSays) {
  constexpr double kWindow = Machine::kWindowSeconds;
  const StepWork work = {.decode_rows = 1};
  const Machine machine = {.cost = {.decode_row = kWindow}, .pace = {1, 2, 2, 1}};
  EXPECT_DOUBLE_EQ(machine.Seconds(work, 0), kWindow);
  EXPECT_DOUBLE_EQ(machine.Seconds(work, 0.5 * kWindow), 1.5 * kWindow);
  EXPECT_DOUBLE_EQ(machine.Seconds(work, kWindow), 2 * kWindow);
  EXPECT_DOUBLE_EQ(machine.Seconds(work, 2.5 * kWindow), 1.25 * kWindow);
  EXPECT_NEAR(machine.Seconds(work, 100), kWindow, 1e-12) << "behind the recording";
}

TEST(Machine, IsFoundFromItsSteps) {
  const Machine machine = {.cost = {.decode_row = 0.003, .prefill = 0.004},
                           .pace = {1, 2, 2, 0.5, 1.25}};
  std::vector<StepRecord> steps;
  double now = 0;
  for (uint32_t i = 0; now < 5 * Machine::kWindowSeconds; ++i) {
    const StepWork work = {.prefill_tokens = i % 3, .decode_rows = 1};
    const double seconds = machine.Seconds(work, now);
    now += seconds;
    steps.push_back({now, seconds, work});
  }
  const std::vector<double> found = MachineOf(machine.cost, steps).pace;
  ASSERT_GE(found.size(), machine.pace.size());
  for (size_t i = 0; i < machine.pace.size(); ++i) {
    EXPECT_NEAR(found[i], machine.pace[i], 0.1 * machine.pace[i]) << i;
  }
}

}  // namespace
}  // namespace firesteel::simulate
