#include "runtime/scheduler/admission.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "absl/strings/cord.h"

namespace firesteel {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

const absl::Time kNow = absl::UnixEpoch() + absl::Hours(1);

GenerationRequest Asks(uint32_t prompt, uint32_t answer, const std::string& client = "",
                       int32_t priority = 0) {
  GenerationRequest request;
  request.prompt.resize(prompt);
  request.max_tokens = answer;
  request.stopping.ignore_eos = true;
  request.client = client;
  request.priority = priority;
  return request;
}

// A batch of four that is full; a step of one takes 12 ms, a full one 18 ms, and one of four
// answers of 40 tokens ends every ten steps.
Admission FullBatch(EngineOptions options) {
  options.max_batch_size = 4;
  Admission admission(options);
  admission.SetCost({.step = 0.010, .prefill_token = 0, .decode_row = 0.002});
  admission.SetRunning({.sequences = 4}, 4 * 40);
  return admission;
}

absl::Duration RetryAfter(const Refusal& refusal) {
  const auto payload = refusal.status.GetPayload(kRetryAfterPayload);
  return absl::Milliseconds(payload.has_value() ? std::stol(std::string(*payload)) : -1);
}

TEST(Admission, RequestsAndTokensAreBounded) {
  Admission admission({.max_queue_requests = 2, .max_queue_tokens = 50});
  EXPECT_FALSE(admission.Check(Asks(50, 1), kNow).has_value());
  EXPECT_EQ(admission.Check(Asks(51, 1), kNow)->reason, RejectionReason::kQueueTokens);
  admission.BeginWait(Asks(20, 1));
  EXPECT_EQ(admission.Check(Asks(31, 1), kNow)->reason, RejectionReason::kQueueTokens);
  admission.BeginWait(Asks(20, 1));
  const auto refusal = admission.Check(Asks(1, 1), kNow);
  EXPECT_EQ(refusal->reason, RejectionReason::kQueueFull);
  EXPECT_EQ(refusal->status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_GE(RetryAfter(*refusal), absl::Milliseconds(50));
  admission.EndWait(Asks(20, 1));
  EXPECT_FALSE(admission.Check(Asks(30, 1), kNow).has_value());
  EXPECT_EQ(admission.waiting_requests(), 1u);
}

TEST(Admission, ATurnThatComesTooLateIsRefusedWithTheDifference) {
  Admission admission = FullBatch({.max_queue_wait = absl::Milliseconds(500)});
  // The n-th in the queue waits for n answers to end, 180 ms each.
  EXPECT_FALSE(admission.Check(Asks(1, 40), kNow).has_value());
  admission.BeginWait(Asks(1, 40));
  EXPECT_FALSE(admission.Check(Asks(1, 40), kNow).has_value());
  admission.BeginWait(Asks(1, 40));
  const auto refusal = admission.Check(Asks(1, 40), kNow);
  ASSERT_TRUE(refusal.has_value());
  EXPECT_EQ(refusal->reason, RejectionReason::kQueueWait);
  EXPECT_EQ(refusal->status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(refusal->status.message()),
              AllOf(HasSubstr("about 0.54 s"), HasSubstr("2 waiting before it"),
                    HasSubstr("max-queue-ms 500")));
  EXPECT_EQ(RetryAfter(*refusal), absl::Milliseconds(50)) << "40 ms, and never less than 50";
}

TEST(Admission, NothingIsRefusedForTimeWhereNothingWasMeasuredOrAsked) {
  Admission unmeasured({.max_batch_size = 1, .max_queue_wait = absl::Milliseconds(1)});
  Admission unbounded = FullBatch({});
  for (int i = 0; i < 100; ++i) {
    unmeasured.BeginWait(Asks(1, 40));
    unbounded.BeginWait(Asks(1, 40));
  }
  EXPECT_FALSE(unmeasured.Check(Asks(1, 40), kNow).has_value());
  EXPECT_FALSE(unbounded.Check(Asks(1, 40), kNow).has_value());
}

TEST(Admission, ALongPromptOnAnIdleEngineIsNotAWait) {
  Admission admission({.max_queue_wait = absl::Milliseconds(10)});
  admission.SetCost({.step = 0.010, .prefill_token = 0.001, .decode_row = 0.002});
  EXPECT_FALSE(admission.Check(Asks(900, 40), kNow).has_value());
  // But the prompts of others are.
  admission.BeginWait(Asks(900, 40));
  EXPECT_EQ(admission.Check(Asks(1, 40), kNow)->reason, RejectionReason::kQueueWait);
}

// Who asks for much is refused, and nobody else.
TEST(Admission, AClientsOwnPlaceInTheQueueCounts) {
  Admission admission = FullBatch({.max_queue_wait = absl::Milliseconds(700)});
  for (int i = 0; i < 10; ++i) admission.BeginWait(Asks(1, 40, "flood"));
  EXPECT_EQ(admission.Check(Asks(1, 40, "flood"), kNow)->reason, RejectionReason::kQueueWait);
  EXPECT_FALSE(admission.Check(Asks(1, 40, "one"), kNow).has_value()) << "is the next but one";
  admission.BeginWait(Asks(1, 40, "one"));
  // Its own first and two of the other's: the fourth turn.
  EXPECT_EQ(admission.Check(Asks(1, 40, "one"), kNow)->reason, RejectionReason::kQueueWait);
  admission.EndWait(Asks(1, 40, "one"));
  EXPECT_FALSE(admission.Check(Asks(1, 40, "one"), kNow).has_value());
}

TEST(Admission, TheMoreImportantDoesNotWaitForTheLess) {
  Admission admission = FullBatch({.max_queue_wait = absl::Milliseconds(500)});
  for (int i = 0; i < 10; ++i) admission.BeginWait(Asks(1, 40, "a", 0));
  EXPECT_FALSE(admission.Check(Asks(1, 40, "b", 1), kNow).has_value());
  EXPECT_EQ(admission.Check(Asks(1, 40, "b", -1), kNow)->reason, RejectionReason::kQueueWait);
}

TEST(Admission, DeadlinesCountWaitAndWork) {
  Admission admission = FullBatch({});
  const auto with_deadline = [](absl::Duration left) {
    GenerationRequest request = Asks(1, 11);
    request.deadline = kNow + left;
    return request;
  };
  // 180 ms until its turn, a step for the prompt beside three others, ten full steps.
  EXPECT_FALSE(admission.Check(with_deadline(absl::Milliseconds(377)), kNow).has_value());
  const auto refusal = admission.Check(with_deadline(absl::Milliseconds(375)), kNow);
  ASSERT_TRUE(refusal.has_value());
  EXPECT_EQ(refusal->reason, RejectionReason::kDeadline);
  EXPECT_EQ(refusal->status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(std::string(refusal->status.message()), HasSubstr("would take about 0.376 s"));
}

// Answers shorter than max_tokens are learned from; places then come sooner.
TEST(Admission, LearnsHowLongAnswersReallyAre) {
  Admission admission = FullBatch({.max_queue_wait = absl::Milliseconds(100)});
  EXPECT_TRUE(admission.Check(Asks(1, 40), kNow).has_value());
  GenerationRequest ended = Asks(1, 40);
  ended.stopping.ignore_eos = false;
  GenerationResult result;
  result.reason = FinishReason::kEos;
  result.usage = {.prompt_tokens = 1, .generated_tokens = 10};
  for (int i = 0; i < 50; ++i) admission.LearnEnd(ended, result);
  EXPECT_FALSE(admission.Check(Asks(1, 40), kNow).has_value());
}

}  // namespace
}  // namespace firesteel
