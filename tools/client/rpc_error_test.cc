#include "tools/client/rpc_error.h"

#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "gtest/gtest.h"

namespace firesteel::client {
namespace {

grpc::Status WithDetails(grpc::StatusCode code, const google::rpc::Status& details) {
  return {code, "what happened", details.SerializeAsString()};
}

TEST(RpcErrorTest, PlainError) {
  EXPECT_EQ(FormatError(grpc::Status(grpc::StatusCode::UNAVAILABLE, "draining")),
            "error: UNAVAILABLE: draining\n");
  EXPECT_EQ(StatusCodeName(grpc::StatusCode::UNAUTHENTICATED), "UNAUTHENTICATED");
  EXPECT_EQ(StatusCodeName(static_cast<grpc::StatusCode>(17)), "code 17");
}

TEST(RpcErrorTest, EveryDetailHasItsLine) {
  google::rpc::Status details;
  google::rpc::BadRequest bad_request;
  bad_request.add_field_violations()->set_field("sampling.top_p");
  bad_request.mutable_field_violations(0)->set_description("is 2, at most 1");
  bad_request.add_field_violations()->set_field("n");
  details.add_details()->PackFrom(bad_request);
  google::rpc::RetryInfo retry;
  retry.mutable_retry_delay()->set_nanos(250'000'000);
  details.add_details()->PackFrom(retry);
  google::rpc::QuotaFailure quota;
  quota.add_violations()->set_subject("queue");
  quota.mutable_violations(0)->set_description("64 of 64 requests wait");
  details.add_details()->PackFrom(quota);
  google::rpc::ErrorInfo info;
  info.set_reason("QUEUE_FULL");
  info.set_domain("firesteel");
  (*info.mutable_metadata())["b"] = "2";
  (*info.mutable_metadata())["a"] = "1";
  details.add_details()->PackFrom(info);
  details.add_details()->set_type_url("type.googleapis.com/google.rpc.Help");
  EXPECT_EQ(FormatError(WithDetails(grpc::StatusCode::RESOURCE_EXHAUSTED, details)),
            "error: RESOURCE_EXHAUSTED: what happened\n"
            "  field sampling.top_p: is 2, at most 1\n"
            "  field n: \n"
            "  retry after 250 ms\n"
            "  quota queue: 64 of 64 requests wait\n"
            "  reason QUEUE_FULL (firesteel) a=1 b=2\n"
            "  detail of type type.googleapis.com/google.rpc.Help\n");
}

TEST(RpcErrorTest, BrokenDetailsAreLeftOut) {
  EXPECT_EQ(FormatError(grpc::Status(grpc::StatusCode::INTERNAL, "m", "\xFF\xFF not a Status")),
            "error: INTERNAL: m\n");
}

}  // namespace
}  // namespace firesteel::client
