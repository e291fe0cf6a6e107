#include "server/status.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/cord.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "runtime/scheduler/engine.h"

namespace firesteel::server {
namespace {

using ::testing::HasSubstr;

google::rpc::Status DetailsOf(const grpc::Status& status) {
  google::rpc::Status details;
  EXPECT_TRUE(details.ParseFromString(status.error_details()));
  EXPECT_EQ(details.code(), status.error_code());
  EXPECT_EQ(details.message(), status.error_message());
  return details;
}

/// The only detail of that type.
template <typename Message>
Message Detail(const grpc::Status& status) {
  Message out;
  int found = 0;
  const google::rpc::Status details = DetailsOf(status);
  for (const auto& any : details.details()) {
    if (any.UnpackTo(&out)) ++found;
  }
  EXPECT_EQ(found, 1) << Message::descriptor()->full_name();
  return out;
}

TEST(ToGrpcStatusTest, OkStaysOk) { EXPECT_TRUE(ToGrpcStatus(absl::OkStatus()).ok()); }

TEST(ToGrpcStatusTest, EveryCodeHasAStableReason) {
  const std::pair<absl::Status, const char*> rows[] = {
      {absl::InvalidArgumentError("x"), "INVALID_REQUEST"},
      {absl::NotFoundError("x"), "MODEL_NOT_FOUND"},
      {absl::ResourceExhaustedError("x"), "EXCEEDS_CAPACITY"},
      {absl::UnavailableError("x"), "SERVER_DRAINING"},
      {absl::CancelledError("x"), "REQUEST_CANCELLED"},
      {absl::DeadlineExceededError("x"), "DEADLINE_EXCEEDED"},
      {absl::InternalError("x"), "INTERNAL_ERROR"},
      {absl::DataLossError("x"), "INTERNAL_ERROR"},
  };
  for (const auto& [status, reason] : rows) {
    const grpc::Status wire = ToGrpcStatus(status);
    EXPECT_EQ(static_cast<int>(wire.error_code()), static_cast<int>(status.code()));
    const auto info = Detail<google::rpc::ErrorInfo>(wire);
    EXPECT_EQ(info.reason(), reason);
    EXPECT_EQ(info.domain(), "firesteel");
  }
}

TEST(ToGrpcStatusTest, SuggestedWaitBecomesRetryInfo) {
  absl::Status status = absl::ResourceExhaustedError("queue full");
  status.SetPayload(kRetryAfterPayload, absl::Cord("2500"));
  const grpc::Status wire = ToGrpcStatus(status);
  const auto retry = Detail<google::rpc::RetryInfo>(wire);
  EXPECT_EQ(retry.retry_delay().seconds(), 2);
  EXPECT_EQ(retry.retry_delay().nanos(), 500'000'000);
  EXPECT_EQ(Detail<google::rpc::ErrorInfo>(wire).reason(), "OVERLOADED");
}

// What gRPC's own retry policies obey.
TEST(RetryPushbackTest, SaysWhenOrNever) {
  const absl::Status full = absl::ResourceExhaustedError("x");
  EXPECT_EQ(RetryPushbackMs(WithRetryDelay(full, absl::Microseconds(1500))), 2);
  EXPECT_EQ(RetryPushbackMs(full), -1);
  EXPECT_EQ(RetryPushbackMs(absl::UnavailableError("x")), std::nullopt);
  EXPECT_EQ(RetryPushbackMs(absl::OkStatus()), std::nullopt);
}

TEST(ToGrpcStatusTest, NonsenseWaitIsBounded) {
  for (const char* text : {"", "soon", "-5", "999999999999"}) {
    absl::Status status = absl::ResourceExhaustedError("x");
    status.SetPayload(kRetryAfterPayload, absl::Cord(text));
    const auto retry = Detail<google::rpc::RetryInfo>(ToGrpcStatus(status)).retry_delay();
    EXPECT_GE(retry.seconds() + retry.nanos(), 1) << text;
    EXPECT_LE(retry.seconds(), 600) << text;
  }
}

TEST(ToGrpcStatusTest, ViolationsComeOut) {
  const grpc::Status wire = ToGrpcStatus(InvalidField("sampling.top_p", "is 2; must be at most 1"));
  const auto bad = Detail<google::rpc::BadRequest>(wire);
  ASSERT_EQ(bad.field_violations_size(), 1);
  EXPECT_EQ(bad.field_violations(0).field(), "sampling.top_p");
  EXPECT_EQ(wire.error_message(), "sampling.top_p: is 2; must be at most 1");
  EXPECT_EQ(Detail<google::rpc::ErrorInfo>(wire).reason(), "INVALID_REQUEST");
}

// Clients drop a call whose trailers exceed 8 KiB, and then nobody learns what was wrong. Details
// go in base64, a byte of the message may take three.
TEST(ToGrpcStatusTest, NothingFromOutsideOutgrowsTheTrailers) {
  for (const std::string& one : {std::string("\xff"), std::string("%"), std::string("x")}) {
    std::string text;
    while (text.size() < 5000) text += one;
    FieldViolations violations;
    for (size_t i = 0; i < 50; ++i) violations.Add(text, text);
    EXPECT_EQ(violations.count(), 50u);
    const grpc::Status wire = ToGrpcStatus(violations.ToStatus());
    EXPECT_LE(wire.error_details().size() * 4 / 3 + 3 * wire.error_message().size() + 500, 8192u)
        << one;
    EXPECT_GE(Detail<google::rpc::BadRequest>(wire).field_violations_size(), 2);
    EXPECT_THAT(wire.error_message(), HasSubstr("(and 49 more)"));
  }
}

TEST(ToGrpcStatusTest, TextFromOutsideStaysPrintableAndShort) {
  const grpc::Status wire = ToGrpcStatus(ModelNotFound("a\n\xff" + std::string(1000, 'x')));
  EXPECT_THAT(wire.error_message(), HasSubstr(R"("a\n\377)"));
  EXPECT_LT(wire.error_message().size(), 200u);
  EXPECT_EQ(ToGrpcStatus(absl::InternalError("\xff")).error_message(), "\\377");
}

}  // namespace
}  // namespace firesteel::server
