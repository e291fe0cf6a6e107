// The Open Inference Protocol over real gRPC, with scripted engines behind it.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <future>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/escaping.h"
#include "google/rpc/error_details.pb.h"
#include "inference/grpc_service.grpc.pb.h"
#include "server/access_control.h"
#include "server/infer_call.h"
#include "server/kserve_translation.h"
#include "server/options.h"
#include "server/server_fixture.h"
#include "server/status.h"

namespace firesteel::server {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class KserveTest : public ServerTest {
 protected:
  using Stream =
      grpc::ClientReaderWriter<inference::ModelInferRequest, inference::ModelStreamInferResponse>;

  KserveTest() : kserve_(inference::GRPCInferenceService::NewStub(channel_)) {}

  /// Calls of ModelStreamInfer that have ended with this code.
  double HandledStreams(const std::string& code) const {
    return MetricValue(Scrape(), "grpc_server_handled_total{grpc_code=\"" + code +
                                     "\",grpc_method=\"ModelStreamInfer\",grpc_service="
                                     "\"inference.GRPCInferenceService\"}")
        .value_or(0);
  }

  static inference::ModelInferRequest Infer(const std::vector<std::string>& texts,
                                            const std::string& id = "") {
    inference::ModelInferRequest request;
    request.set_id(id);
    auto* const input = request.add_inputs();
    input->set_name("text_input");
    input->set_datatype("BYTES");
    input->add_shape(static_cast<int64_t>(texts.size()));
    for (const auto& text : texts) input->mutable_contents()->add_bytes_contents(text);
    return request;
  }

  bool ModelReady(const std::string& name, const std::string& version = "") {
    grpc::ClientContext context;
    inference::ModelReadyRequest request;
    request.set_name(name);
    request.set_version(version);
    inference::ModelReadyResponse response;
    EXPECT_TRUE(kserve_->ModelReady(&context, request, &response).ok());
    return response.ready();
  }

  bool ServerReady() {
    grpc::ClientContext context;
    inference::ServerReadyResponse response;
    EXPECT_TRUE(kserve_->ServerReady(&context, {}, &response).ok());
    return response.ready();
  }

  const std::unique_ptr<inference::GRPCInferenceService::Stub> kserve_;
};

std::string TextOf(const inference::ModelStreamInferResponse& message) {
  return message.infer_response().outputs(0).contents().bytes_contents(0);
}

TEST_F(KserveTest, ReadinessFollowsHealth) {
  grpc::ClientContext context;
  inference::ServerLiveResponse live;
  ASSERT_TRUE(kserve_->ServerLive(&context, {}, &live).ok());
  EXPECT_TRUE(live.live());
  EXPECT_TRUE(ServerReady());
  EXPECT_TRUE(ModelReady("beta"));
  EXPECT_TRUE(ModelReady("beta", "1"));
  EXPECT_FALSE(ModelReady("beta", "2"));
  EXPECT_FALSE(ModelReady("gamma"));
  beta_->SetMakingProgress(false);
  server_->health().Check();
  EXPECT_FALSE(ServerReady());
  EXPECT_FALSE(ModelReady("beta"));
  EXPECT_TRUE(ModelReady("alpha"));
}

TEST_F(KserveTest, MetadataNamesServerAndTensors) {
  grpc::ClientContext server_context;
  inference::ServerMetadataResponse server;
  ASSERT_TRUE(kserve_->ServerMetadata(&server_context, {}, &server).ok());
  EXPECT_EQ(server.name(), "firesteel");
  EXPECT_EQ(server.version(), Version());

  grpc::ClientContext context;
  inference::ModelMetadataRequest request;
  request.set_name("beta");
  inference::ModelMetadataResponse model;
  ASSERT_TRUE(kserve_->ModelMetadata(&context, request, &model).ok());
  EXPECT_THAT(model.versions(), ElementsAre("1"));
  EXPECT_EQ(model.inputs(0).name(), "text_input");
  EXPECT_EQ(model.outputs(0).name(), "text_output");

  grpc::ClientContext bad_context;
  request.set_version("9");
  EXPECT_EQ(kserve_->ModelMetadata(&bad_context, request, &model).error_code(),
            grpc::StatusCode::NOT_FOUND);
}

TEST_F(KserveTest, BatchIsAnsweredInOrder) {
  alpha_->AnswerAll(2);
  inference::ModelInferRequest request = Infer({"a", "bcd"}, "r1");
  (*request.mutable_parameters())["details"].set_bool_param(true);
  (*request.mutable_parameters())["logprobs"].set_int64_param(1);
  grpc::ClientContext context;
  inference::ModelInferResponse response;
  const grpc::Status status = kserve_->ModelInfer(&context, request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(response.model_name(), "alpha");
  EXPECT_EQ(response.id(), "r1");
  ASSERT_EQ(response.outputs_size(), 5);
  EXPECT_THAT(response.outputs(0).contents().bytes_contents(), ElementsAre("t0 t1 ", "t0 t1 "));
  EXPECT_THAT(response.outputs(1).contents().bytes_contents(), ElementsAre("length", "length"));
  EXPECT_THAT(response.outputs(3).contents().uint_contents(), ElementsAre(2, 2));
  EXPECT_THAT(response.outputs(4).contents().bytes_contents(0),
              HasSubstr(R"("logprobs":[{"id":0,)"));
  EXPECT_EQ(alpha_->request(alpha_->WaitForRequest(0)).prompt.size(), 2u);
  EXPECT_EQ(alpha_->request(alpha_->WaitForRequest(1)).prompt.size(), 4u);
  EXPECT_EQ(FirstValue(context.GetServerTrailingMetadata(), "x-request-id").size(), 32u);
}

// A batch goes in whole or not at all.
TEST_F(KserveTest, RefusedPartTakesTheOthersBack) {
  grpc::ClientContext context;
  inference::ModelInferResponse response;
  const grpc::Status status =
      kserve_->ModelInfer(&context, Infer({"fits", std::string(200, 'x')}), &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("201 tokens"));
  alpha_->WaitForCancel(alpha_->WaitForRequest(0));
}

TEST_F(KserveTest, TensorErrorsAreViolations) {
  grpc::ClientContext context;
  inference::ModelInferResponse response;
  const grpc::Status status = kserve_->ModelInfer(&context, {}, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_TRUE(FindDetail<google::rpc::BadRequest>(status).has_value());
}

TEST_F(KserveTest, CancelledBatchLeaves) {
  grpc::ClientContext context;
  inference::ModelInferResponse response;
  auto call = std::async(std::launch::async, [&] {
    return kserve_->ModelInfer(&context, Infer({"a", "b"}), &response);
  });
  const auto second = alpha_->WaitForRequest(1);
  context.TryCancel();
  alpha_->WaitForCancel(alpha_->WaitForRequest(0));
  alpha_->WaitForCancel(second);
  EXPECT_EQ(call.get().error_code(), grpc::StatusCode::CANCELLED);
}

// As Triton's clients ask for it, in microseconds; the call itself has no deadline.
TEST_F(KserveTest, TimeoutEndsARequest) {
  inference::ModelInferRequest request = Infer({"hey"}, "r1");
  (*request.mutable_parameters())["timeout"].set_int64_param(20'000);
  grpc::ClientContext context;
  inference::ModelInferResponse response;
  const grpc::Status status = kserve_->ModelInfer(&context, request, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_EQ(FindDetail<google::rpc::ErrorInfo>(status)->reason(), "DEADLINE_EXCEEDED");

  grpc::ClientContext stream_context;
  const std::unique_ptr<Stream> stream = kserve_->ModelStreamInfer(&stream_context);
  stream->Write(request);
  stream->WritesDone();
  inference::ModelStreamInferResponse message;
  ASSERT_TRUE(stream->Read(&message));
  EXPECT_EQ(message.infer_response().parameters().at("error_code").string_param(),
            "DEADLINE_EXCEEDED");
  EXPECT_FALSE(stream->Read(&message));
  EXPECT_TRUE(stream->Finish().ok());
}

TEST_F(KserveTest, AnswerOfABatchIsBoundedAsAWhole) {
  max_answer_bytes_ = 64 << 10;
  Restart(ServerConfig());
  const auto kserve = inference::GRPCInferenceService::NewStub(channel_);
  alpha_->AnswerAll(2);
  inference::ModelInferRequest request = Infer({"a"});
  (*request.mutable_parameters())["logprobs"].set_int64_param(5);
  (*request.mutable_parameters())["max_tokens"].set_int64_param(50);
  inference::ModelInferResponse response;
  grpc::ClientContext context;
  ASSERT_TRUE(kserve->ModelInfer(&context, request, &response).ok());
  request = Infer(std::vector<std::string>(20, "a"));
  (*request.mutable_parameters())["logprobs"].set_int64_param(5);
  (*request.mutable_parameters())["max_tokens"].set_int64_param(50);
  grpc::ClientContext large_context;
  const grpc::Status status = kserve->ModelInfer(&large_context, request, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("for each of 20 texts"));
  EXPECT_EQ(alpha_->num_admitted(), 1u);
}

TEST_F(KserveTest, StreamSendsTextAsItComes) {
  grpc::ClientContext context;
  const std::unique_ptr<Stream> stream = kserve_->ModelStreamInfer(&context);
  stream->Write(Infer({"hey"}, "r1"));
  const auto handle = alpha_->WaitForRequest(0);
  inference::ModelStreamInferResponse message;
  alpha_->Emit(handle, "one ");
  ASSERT_TRUE(stream->Read(&message));
  EXPECT_EQ(TextOf(message), "one ");
  EXPECT_EQ(message.infer_response().id(), "r1");
  EXPECT_FALSE(message.infer_response().parameters().at("triton_final_response").bool_param());
  alpha_->Emit(handle, "two");
  alpha_->Finish(handle, FakeResult(FinishReason::kEos));
  std::string rest;
  bool last = false;
  while (!last && stream->Read(&message)) {
    rest += TextOf(message);
    last = message.infer_response().parameters().at("triton_final_response").bool_param();
  }
  EXPECT_EQ(rest, "two");
  stream->WritesDone();
  EXPECT_FALSE(stream->Read(&message));
  EXPECT_TRUE(stream->Finish().ok());
}

TEST_F(KserveTest, StreamedRequestsRunBesideEachOther) {
  grpc::ClientContext context;
  const std::unique_ptr<Stream> stream = kserve_->ModelStreamInfer(&context);
  for (const char* id : {"a", "bad", "b"}) {
    stream->Write(Infer({id == std::string("bad") ? "\xff" : "x"}, id));
  }
  stream->WritesDone();
  const auto second = alpha_->WaitForRequest(1);
  alpha_->Emit(second, "B");
  alpha_->Finish(second, FakeResult(FinishReason::kEos));
  const auto first = alpha_->WaitForRequest(0);
  alpha_->Emit(first, "A");
  alpha_->Finish(first, FakeResult(FinishReason::kEos));
  std::map<std::string, std::string> texts;
  inference::ModelStreamInferResponse message;
  while (stream->Read(&message)) {
    const std::string& id = message.infer_response().id();
    if (message.error_message().empty()) {
      texts[id] += TextOf(message);
    } else {
      texts[id] = message.infer_response().parameters().at("error_reason").string_param();
    }
  }
  EXPECT_TRUE(stream->Finish().ok()) << "an error of one request is none of the stream";
  EXPECT_EQ(texts, (std::map<std::string, std::string>{
                       {"a", "A"}, {"b", "B"}, {"bad", "INVALID_REQUEST"}}));
}

TEST_F(KserveTest, StreamTakesNoMoreThanItsShare) {
  grpc::ClientContext context;
  const std::unique_ptr<Stream> stream = kserve_->ModelStreamInfer(&context);
  for (size_t i = 0; i < kMaxStreamedInfers + 8; ++i) stream->Write(Infer({"x"}));
  alpha_->WaitForRequest(kMaxStreamedInfers - 1);
  EXPECT_EQ(alpha_->num_admitted(), kMaxStreamedInfers);
  alpha_->Finish(alpha_->WaitForRequest(0), FakeResult(FinishReason::kEos));
  alpha_->WaitForRequest(kMaxStreamedInfers);  // room for one more
  context.TryCancel();
  for (size_t i = 1; i <= kMaxStreamedInfers; ++i) alpha_->WaitForCancel(alpha_->WaitForRequest(i));
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

// Triton's clients keep a stream between requests: it must not hold up the end of the server.
TEST_F(KserveTest, DrainEndsStreamsThatAreIdle) {
  grpc::ClientContext idle_context, busy_context;
  const std::unique_ptr<Stream> idle = kserve_->ModelStreamInfer(&idle_context);
  const std::unique_ptr<Stream> busy = kserve_->ModelStreamInfer(&busy_context);
  inference::ModelStreamInferResponse message;
  idle->Write(Infer({"x"}));
  alpha_->Finish(alpha_->WaitForRequest(0), FakeResult(FinishReason::kEos));
  ASSERT_TRUE(idle->Read(&message));
  busy->Write(Infer({"x"}));
  const auto handle = alpha_->WaitForRequest(1);
  auto stop = std::async(std::launch::async, [this] {
    return server_->Stop(absl::ZeroDuration(), absl::InfiniteDuration());
  });
  EXPECT_FALSE(idle->Read(&message));
  EXPECT_EQ(idle->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
  alpha_->Emit(handle, "to the end");
  alpha_->Finish(handle, FakeResult(FinishReason::kEos));
  std::string text;
  while (busy->Read(&message)) text += TextOf(message);
  EXPECT_EQ(text, "to the end");
  const grpc::Status status = busy->Finish();
  EXPECT_EQ(FindDetail<google::rpc::ErrorInfo>(status)->reason(), "SERVER_DRAINING");
  EXPECT_TRUE(stop.get());
}

// Which a client's own clock may do a little before the server's: then another one is tried.
TEST_F(KserveTest, StreamWhoseDeadlinePassesIsCountedSo) {
  while (HandledStreams("DeadlineExceeded") == 0 && HandledStreams("Canceled") < 20) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(50));
    const std::unique_ptr<Stream> stream = kserve_->ModelStreamInfer(&context);
    stream->Write(Infer({"x"}));
    EXPECT_FALSE(stream->Finish().ok());
  }
  EXPECT_GT(HandledStreams("DeadlineExceeded"), 0);
}

// gRPC tells the client, and the server no more than that the stream is over: what runs must end,
// and nothing be counted as gone well.
TEST_F(KserveTest, StreamEndsAtAMessageThatIsTooLarge) {
  ServerConfig config;
  config.max_message_bytes = 2000;
  Restart(config);
  const auto kserve = inference::GRPCInferenceService::NewStub(channel_);
  constexpr int kCalls = 20;
  size_t admitted = 0;
  for (int call = 1; call <= kCalls; ++call) {
    grpc::ClientContext context;
    const std::unique_ptr<Stream> stream = kserve->ModelStreamInfer(&context);
    const bool something_runs = call % 2 == 0;
    if (something_runs) stream->Write(Infer({"x"}));
    stream->WriteLast(Infer({std::string(2000, 'y')}), grpc::WriteOptions());
    if (something_runs) alpha_->WaitForCancel(alpha_->WaitForRequest(admitted++));
    const grpc::Status status = stream->Finish();
    EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
    EXPECT_THAT(status.error_message(), HasSubstr("2000"));
  }
  EXPECT_EQ(alpha_->num_admitted(), admitted);
  while (HandledStreams("Canceled") + HandledStreams("OK") < kCalls) std::this_thread::yield();
  EXPECT_EQ(HandledStreams("OK"), 0);
}

// A stream outlives the token that it was opened with: what comes later is refused, what runs ends.
TEST_F(KserveTest, StreamHeedsTokensThatAreTakenBack) {
  const auto write_token = [](const std::string& token) {
    const auto digest = Sha256(token);
    return WriteFile("stream_tokens.yaml",
                     "- name: someone\n  sha256: " +
                         absl::BytesToHexString(std::string(digest.begin(), digest.end())) + "\n");
  };
  ServerConfig config;
  config.auth_token_file = write_token("old");
  config.credentials_reload = absl::ZeroDuration();
  Restart(config);
  const auto kserve = inference::GRPCInferenceService::NewStub(channel_);
  grpc::ClientContext context;
  context.AddMetadata("authorization", "Bearer old");
  const std::unique_ptr<Stream> stream = kserve->ModelStreamInfer(&context);
  stream->Write(Infer({"x"}, "before"));
  const auto handle = alpha_->WaitForRequest(0);
  write_token("new");
  stream->Write(Infer({"x"}, "after"));
  inference::ModelStreamInferResponse message;
  ASSERT_TRUE(stream->Read(&message));
  EXPECT_EQ(message.infer_response().id(), "after");
  EXPECT_EQ(message.infer_response().parameters().at("error_reason").string_param(),
            "TOKEN_UNKNOWN");
  EXPECT_EQ(alpha_->num_admitted(), 1u);
  alpha_->Emit(handle, "to the end");
  alpha_->Finish(handle, FakeResult(FinishReason::kEos));
  stream->WritesDone();
  std::string text;
  while (stream->Read(&message)) text += TextOf(message);
  EXPECT_EQ(text, "to the end");
  EXPECT_TRUE(stream->Finish().ok());
}

// An error names the request that it is of, but for an id that is itself the error: who sends a
// large one would have it sent back for nothing.
TEST_F(KserveTest, ErrorsEchoNoIdBeyondItsLimit) {
  grpc::ClientContext context;
  const std::unique_ptr<Stream> stream = kserve_->ModelStreamInfer(&context);
  const std::string longest(kMaxInferIdBytes, 'i');
  for (const std::string& id : {longest, longest + "i"}) {
    stream->Write(Infer({"\xff"}, id));
    inference::ModelStreamInferResponse message;
    ASSERT_TRUE(stream->Read(&message));
    EXPECT_NE(message.error_message(), "");
    EXPECT_EQ(message.infer_response().id(), id == longest ? longest : "");
  }
  stream->WritesDone();
  EXPECT_TRUE(stream->Finish().ok());
}

TEST_F(KserveTest, UnreadableMessageHarmsNobody) {
  for (const char* bytes :
       {"\xff\xff", "\x1a\x02\xff\xfe"}) {  // no message; an id that is no UTF-8
    std::string answer;
    EXPECT_TRUE(CallRaw("/inference.GRPCInferenceService/ModelStreamInfer", bytes, &answer).ok());
    inference::ModelStreamInferResponse message;
    ASSERT_TRUE(message.ParseFromString(answer));
    EXPECT_EQ(message.infer_response().id(), "");
    const auto& parameters = message.infer_response().parameters();
    EXPECT_EQ(parameters.at("error_reason").string_param(), "MALFORMED_REQUEST");
    EXPECT_EQ(parameters.at("error_code").string_param(), "INVALID_ARGUMENT");
    EXPECT_TRUE(parameters.at("triton_final_response").bool_param());
  }
  EXPECT_FALSE(CallRaw("/inference.GRPCInferenceService/ModelInfer", "\xff\xff").ok());
  EXPECT_TRUE(ServerReady());
}

}  // namespace
}  // namespace firesteel::server
