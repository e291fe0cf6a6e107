// The services over real gRPC on the loopback, with scripted engines behind them.

#include "server/server.h"

#include <gmock/gmock.h>
#include <grpcpp/create_channel.h>
#include <gtest/gtest.h>

#include <chrono>
#include <future>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "google/rpc/error_details.pb.h"
#include "server/fake_engine.h"
#include "server/options.h"
#include "server/server_fixture.h"
#include "server/status.h"
#include "server/test_client.h"

namespace firesteel::server {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

// --- Generate ---

TEST_F(ServerTest, GenerateAnswersWithEverything) {
  alpha_->AnswerAll(3);
  v1::GenerateRequest request = Request();
  request.mutable_output()->set_return_token_ids(true);
  v1::GenerateResponse response;
  const grpc::Status status = Generate(request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(response.model(), "alpha");
  EXPECT_EQ(response.request_id().size(), 32u);
  ASSERT_EQ(response.sequences_size(), 1);
  EXPECT_EQ(response.sequences(0).text(), "t0 t1 t2 ");
  EXPECT_THAT(response.sequences(0).token_ids(), ElementsAre(0, 1, 2));
  EXPECT_EQ(response.sequences(0).finish_reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(response.usage().prompt_tokens(), 4u);
  EXPECT_EQ(response.usage().generated_tokens(), 3u);
  EXPECT_EQ(response.timings().first_token().nanos(), 21'000'000);
  EXPECT_DOUBLE_EQ(response.sparsity().ffn_active_fraction(), 0.08);
}

TEST_F(ServerTest, TokenIdsComeOnlyWhereAsked) {
  alpha_->AnswerAll(3);
  v1::GenerateResponse response;
  ASSERT_TRUE(Generate(Request(), &response).ok());
  EXPECT_THAT(response.sequences(0).token_ids(), IsEmpty());
}

TEST_F(ServerTest, RequestGoesToTheNamedModel) {
  beta_->AnswerAll(1);
  v1::GenerateRequest request = Request();
  request.set_model("beta");
  v1::GenerateResponse response;
  ASSERT_TRUE(Generate(request, &response).ok());
  EXPECT_EQ(response.model(), "beta");
  EXPECT_EQ(beta_->request(beta_->WaitForRequest(0)).prompt.size(), 4u);
}

TEST_F(ServerTest, SeedIsRandomWhereUnset) {
  alpha_->AnswerAll(1);
  v1::GenerateResponse response;
  ASSERT_TRUE(Generate(Request(), &response).ok());
  ASSERT_TRUE(Generate(Request(), &response).ok());
  v1::GenerateRequest seeded = Request();
  seeded.mutable_sampling()->set_seed(77);
  ASSERT_TRUE(Generate(seeded, &response).ok());
  const auto seed = [this](size_t i) {
    return alpha_->request(alpha_->WaitForRequest(i)).sampling.seed;
  };
  EXPECT_NE(seed(0), seed(1));
  EXPECT_EQ(seed(2), 77u);
}

TEST_F(ServerTest, StopMatchComesOut) {
  v1::GenerateResponse response;
  auto call = std::async(std::launch::async, [&] { return Generate(Request(), &response); });
  const auto handle = alpha_->WaitForRequest(0);
  TokenDelta last;
  last.end = SequenceEnd{FinishReason::kStop, "END"};
  alpha_->Emit(handle, last);
  alpha_->Finish(handle, FakeResult(FinishReason::kStop));
  ASSERT_TRUE(call.get().ok());
  EXPECT_EQ(response.sequences(0).finish_reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(response.sequences(0).stop_match(), "END");
}

TEST_F(ServerTest, SequencesComeWhole) {
  alpha_->AnswerAll(2);
  v1::GenerateRequest request = Request();
  request.set_n(3);
  request.mutable_output()->set_logprobs(2);
  v1::GenerateResponse response;
  ASSERT_TRUE(Generate(request, &response).ok());
  ASSERT_EQ(response.sequences_size(), 3);
  for (int i = 0; i < 3; ++i) {
    const v1::Sequence& sequence = response.sequences(i);
    EXPECT_EQ(sequence.index(), static_cast<uint32_t>(i));
    EXPECT_EQ(sequence.text(), "t0 t1 ");
    ASSERT_EQ(sequence.logprobs_size(), 2);
    EXPECT_EQ(sequence.logprobs(1).token_id(), 1u);
    EXPECT_FLOAT_EQ(sequence.logprobs(1).logprob(), -0.5f);
    EXPECT_EQ(sequence.logprobs(1).alternatives_size(), 2);
    EXPECT_EQ(sequence.finish_reason(), v1::FINISH_REASON_LENGTH);
  }
  EXPECT_EQ(response.usage().generated_tokens(), 6u);
}

TEST_F(ServerTest, EchoBeginsWithThePrompt) {
  alpha_->AnswerAll(1);
  v1::GenerateRequest request = Request("hey");
  request.mutable_output()->set_echo(true);
  request.mutable_output()->set_logprobs(0);
  request.mutable_output()->set_return_token_ids(true);
  v1::GenerateResponse response;
  ASSERT_TRUE(Generate(request, &response).ok());
  const v1::Sequence& sequence = response.sequences(0);
  EXPECT_EQ(sequence.text(), "heyt0 ");
  EXPECT_THAT(sequence.token_ids(), ElementsAre(2, 3 + 'h', 3 + 'e', 3 + 'y', 0));
  ASSERT_EQ(sequence.logprobs_size(), 5);
  EXPECT_EQ(sequence.logprobs(0).token_id(), 2u);
  EXPECT_FALSE(sequence.logprobs(0).has_logprob()) << "nothing precedes it";
  EXPECT_FLOAT_EQ(sequence.logprobs(1).logprob(), -1);
  EXPECT_EQ(sequence.logprobs(1).text(), "h");
  EXPECT_FLOAT_EQ(sequence.logprobs(4).logprob(), -0.5f);
}

TEST_F(ServerTest, ScoreTellsOfEveryTokenButTheFirst) {
  alpha_->AnswerAll(1);
  v1::ScoreRequest request;
  request.set_prompt("hey");
  v1::ScoreResponse response;
  grpc::ClientContext context;
  const grpc::Status status = generation_->Score(&context, request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ASSERT_EQ(response.tokens_size(), 4);
  EXPECT_FALSE(response.tokens(0).has_logprob());
  EXPECT_EQ(response.tokens(3).text(), "y");
  EXPECT_FLOAT_EQ(response.tokens(3).logprob(), -3);
  EXPECT_TRUE(response.has_usage());
}

TEST_F(ServerTest, StreamedSequencesEndEachForItself) {
  grpc::ClientContext context;
  v1::GenerateRequest request = Request();
  request.set_n(2);
  const auto reader = generation_->GenerateStream(&context, request);
  const auto handle = alpha_->WaitForRequest(0);
  const auto delta = [](uint32_t index, const char* text, bool last) {
    TokenDelta out;
    out.index = index;
    out.text = text;
    if (last) out.end = SequenceEnd{FinishReason::kEos, ""};
    return out;
  };
  alpha_->Emit(handle, delta(1, "b", true));
  v1::GenerateStreamResponse message;
  ASSERT_TRUE(reader->Read(&message));
  EXPECT_EQ(message.sequence().index(), 1u);
  EXPECT_EQ(message.sequence().text(), "b");
  EXPECT_EQ(message.sequence().finish_reason(), v1::FINISH_REASON_EOS);
  EXPECT_FALSE(message.has_usage()) << "the other one goes on";
  alpha_->Emit(handle, delta(0, "a", true));
  alpha_->Finish(handle, FakeResult(FinishReason::kEos));
  ASSERT_TRUE(reader->Read(&message));
  EXPECT_EQ(message.sequence().index(), 0u);
  EXPECT_EQ(message.sequence().text(), "a");
  EXPECT_EQ(message.sequence().finish_reason(), v1::FINISH_REASON_EOS);
  EXPECT_TRUE(message.has_usage());
  EXPECT_FALSE(reader->Read(&message));
  EXPECT_TRUE(reader->Finish().ok());
}

// --- Metadata ---

TEST_F(ServerTest, RequestIdIsEchoedInBothMetadata) {
  alpha_->AnswerAll(1);
  grpc::ClientContext context;
  context.AddMetadata("x-request-id", "my-id-1");
  v1::GenerateResponse response;
  ASSERT_TRUE(generation_->Generate(&context, Request(), &response).ok());
  EXPECT_EQ(response.request_id(), "my-id-1");
  EXPECT_EQ(FirstValue(context.GetServerInitialMetadata(), "x-request-id"), "my-id-1");
  EXPECT_EQ(FirstValue(context.GetServerTrailingMetadata(), "x-request-id"), "my-id-1");
  EXPECT_EQ(alpha_->request(alpha_->WaitForRequest(0)).request_id, "my-id-1");
}

TEST_F(ServerTest, UnusableRequestIdIsReplaced) {
  alpha_->AnswerAll(1);
  for (const std::string& id : {std::string(129, 'x'), std::string("with space")}) {
    grpc::ClientContext context;
    context.AddMetadata("x-request-id", id);
    v1::GenerateResponse response;
    ASSERT_TRUE(generation_->Generate(&context, Request(), &response).ok());
    EXPECT_NE(response.request_id(), id);
    EXPECT_EQ(FirstValue(context.GetServerTrailingMetadata(), "x-request-id"),
              response.request_id());
  }
}

TEST_F(ServerTest, InitialMetadataComesWithAdmissionAndNotWithRefusal) {
  grpc::ClientContext refused;
  v1::GenerateRequest bad = Request();
  bad.set_max_tokens(0);
  const Streamed end = ReadAll(generation_->GenerateStream(&refused, bad).get());
  EXPECT_EQ(end.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(FirstValue(refused.GetServerInitialMetadata(), "x-request-id"), "");
  EXPECT_EQ(FirstValue(refused.GetServerTrailingMetadata(), "x-request-id").size(), 32u);

  grpc::ClientContext admitted;
  const auto reader = generation_->GenerateStream(&admitted, Request());
  reader->WaitForInitialMetadata();  // before any token
  EXPECT_EQ(FirstValue(admitted.GetServerInitialMetadata(), "x-request-id").size(), 32u);
  alpha_->Finish(alpha_->WaitForRequest(0), FakeResult(FinishReason::kEos));
  EXPECT_TRUE(ReadAll(reader.get()).status.ok());
}

// --- GenerateStream ---

TEST_F(ServerTest, StreamSendsDeltasThenTheSummary) {
  grpc::ClientContext context;
  v1::GenerateRequest request = Request();
  request.mutable_output()->set_return_token_ids(true);
  const auto reader = generation_->GenerateStream(&context, request);
  const auto handle = alpha_->WaitForRequest(0);
  v1::GenerateStreamResponse message;
  alpha_->Emit(handle, "one ", {11});
  ASSERT_TRUE(reader->Read(&message));
  EXPECT_EQ(message.sequence().text(), "one ");
  EXPECT_THAT(message.sequence().token_ids(), ElementsAre(11));
  EXPECT_EQ(message.sequence().finish_reason(), v1::FINISH_REASON_UNSPECIFIED);
  EXPECT_FALSE(message.has_usage());
  alpha_->Emit(handle, "two", {12});
  ASSERT_TRUE(reader->Read(&message));
  EXPECT_EQ(message.sequence().text(), "two");
  alpha_->Finish(handle, FakeResult(FinishReason::kEos));
  ASSERT_TRUE(reader->Read(&message));
  EXPECT_EQ(message.sequence().finish_reason(), v1::FINISH_REASON_EOS);
  EXPECT_EQ(message.usage().generated_tokens(), 3u);
  EXPECT_TRUE(message.has_timings());
  EXPECT_TRUE(message.has_sparsity());
  EXPECT_EQ(message.request_id().size(), 32u);
  EXPECT_FALSE(reader->Read(&message));
  EXPECT_TRUE(reader->Finish().ok());
}

// Nothing is read until everything is there: the flow-control window fills, and what follows is put
// together.
TEST_F(ServerTest, SlowReaderGetsEverythingInFewMessages) {
  const auto stub = v1::GenerationService::NewStub(NarrowChannel(server_->address()));
  grpc::ClientContext context;
  const auto reader = stub->GenerateStream(&context, Request());
  const auto handle = alpha_->WaitForRequest(0);
  constexpr int kDeltas = 400;
  std::string expected;
  for (int i = 0; i < kDeltas; ++i) {
    const std::string delta = std::to_string(i) + std::string(5'000, 'x');
    expected += delta;
    alpha_->Emit(handle, delta);
    alpha_->WaitUntilIdle();  // the engine is never held up
  }
  alpha_->Finish(handle, FakeResult(FinishReason::kLength));
  alpha_->WaitUntilIdle();
  EXPECT_TRUE(alpha_->empty());
  const Streamed all = ReadAll(reader.get());
  ASSERT_TRUE(all.status.ok()) << all.status.error_message();
  EXPECT_EQ(all.text(), expected);
  EXPECT_LT(all.messages.size(), kDeltas / 2);
}

// A stalled reader may wake up, or go, just when it is given up: whoever is late finds the call
// gone.
TEST_F(ServerTest, ReadersThatWakeUpWhenTheyAreGivenUpEndOnce) {
  ServerConfig config;
  config.reader_stall.write = absl::Milliseconds(25);
  Restart(config);
  std::vector<std::future<void>> clients;
  for (int i = 0; i < 8; ++i) {
    clients.push_back(std::async(std::launch::async, [this] {
      const auto stub = v1::GenerationService::NewStub(NarrowChannel(server_->address()));
      for (int k = 0; k < 40; ++k) {
        grpc::ClientContext context;
        const std::string id =
            absl::StrCat("reader-", reinterpret_cast<uintptr_t>(&context), "-", k);
        context.AddMetadata("x-request-id", id);
        const auto reader = stub->GenerateStream(&context, Request());
        reader->WaitForInitialMetadata();
        const auto handle = alpha_->HandleOf(id);
        alpha_->Emit(handle, std::string(200'000, 'x'));
        alpha_->Emit(handle, std::string(200'000, 'y'));
        alpha_->WaitForCancel(handle);
        if (k % 2 == 0) context.TryCancel();
        ReadAll(reader.get());
      }
    }));
  }
  for (auto& client : clients) client.get();
  EXPECT_EQ(StatusOfName(""), HealthResponse::SERVING);
}

TEST_F(ServerTest, ClientCancelLeavesTheBatch) {
  grpc::ClientContext context;
  const auto reader = generation_->GenerateStream(&context, Request());
  const auto handle = alpha_->WaitForRequest(0);
  v1::GenerateStreamResponse message;
  alpha_->Emit(handle, "a");
  ASSERT_TRUE(reader->Read(&message));
  context.TryCancel();
  alpha_->WaitForCancel(handle);
  EXPECT_EQ(ReadAll(reader.get()).status.error_code(), grpc::StatusCode::CANCELLED);
  server_.reset();  // the call is gone, nothing hangs
}

TEST_F(ServerTest, UnaryCancelLeavesTheBatch) {
  grpc::ClientContext context;
  v1::GenerateResponse response;
  auto call = std::async(std::launch::async,
                         [&] { return generation_->Generate(&context, Request(), &response); });
  const auto handle = alpha_->WaitForRequest(0);
  context.TryCancel();
  alpha_->WaitForCancel(handle);
  EXPECT_EQ(call.get().error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(ServerTest, VanishedClientLeavesTheBatch) {
  auto channel =
      grpc::CreateCustomChannel(server_->address(), grpc::InsecureChannelCredentials(), [] {
        grpc::ChannelArguments arguments;
        arguments.SetInt("test.own_connection", 1);  // not shared with the fixture's channel
        return arguments;
      }());
  auto stub = v1::GenerationService::NewStub(channel);
  auto context = std::make_unique<grpc::ClientContext>();
  auto reader = stub->GenerateStream(context.get(), Request());
  const auto handle = alpha_->WaitForRequest(0);
  reader.reset();
  context.reset();  // cancels
  stub.reset();
  channel.reset();
  alpha_->WaitForCancel(handle);
}

// A short deadline may pass on a busy machine before the request is admitted: then a longer one is
// tried.
TEST_F(ServerTest, DeadlineReachesTheEngineAndEndsTheCall) {
  const absl::Time before = absl::Now();
  for (auto time = std::chrono::milliseconds(100); alpha_->num_admitted() == 0; time *= 2) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + time);
    v1::GenerateResponse response;
    EXPECT_EQ(generation_->Generate(&context, Request(), &response).error_code(),
              grpc::StatusCode::DEADLINE_EXCEEDED);
  }
  const absl::Time deadline = alpha_->request(alpha_->WaitForRequest(0)).deadline;
  EXPECT_GT(deadline, before);
  EXPECT_LT(deadline, absl::Now() + absl::Seconds(1)) << "it has passed";
  // The server learns of it by its own clock.
  while (
      Metric("firesteel_requests_total{finish_reason=\"deadline_exceeded\",model_name=\"alpha\"}") <
      1) {
    std::this_thread::yield();
  }
  EXPECT_EQ(Metric("firesteel_requests_total{finish_reason=\"cancelled\",model_name=\"alpha\"}"),
            0);
}

TEST_F(ServerTest, EngineErrorsAreErrorsOfTheCall) {
  grpc::ClientContext context;
  const auto reader = generation_->GenerateStream(&context, Request());
  GenerationResult result = FakeResult(FinishReason::kError);
  result.status = absl::InternalError("numbers went bad");
  alpha_->Finish(alpha_->WaitForRequest(0), result);
  const Streamed all = ReadAll(reader.get());
  EXPECT_EQ(all.status.error_code(), grpc::StatusCode::INTERNAL);
  EXPECT_EQ(all.status.error_message(), "numbers went bad");
  ASSERT_EQ(all.messages.size(), 1u);
  EXPECT_EQ(all.messages[0].sequence().finish_reason(), v1::FINISH_REASON_ERROR);
}

TEST_F(ServerTest, ManyStreamsAtOnce) {
  alpha_->AnswerAll(20);
  std::vector<std::future<Streamed>> calls;
  for (int i = 0; i < 32; ++i) {
    calls.push_back(std::async(std::launch::async, [this] {
      grpc::ClientContext context;
      return ReadAll(generation_->GenerateStream(&context, Request()).get());
    }));
  }
  std::string expected;
  for (int i = 0; i < 20; ++i) expected += "t" + std::to_string(i) + " ";
  for (auto& call : calls) {
    const Streamed all = call.get();
    EXPECT_TRUE(all.status.ok()) << all.status.error_message();
    EXPECT_EQ(all.text(), expected);
  }
}

// --- Refusals ---

TEST_F(ServerTest, ViolationsReachTheClient) {
  v1::GenerateRequest request = Request();
  request.mutable_sampling()->set_temperature(-1);
  request.set_n(17);
  v1::GenerateResponse response;
  const grpc::Status status = Generate(request, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  const auto bad = FindDetail<google::rpc::BadRequest>(status);
  ASSERT_TRUE(bad.has_value());
  ASSERT_EQ(bad->field_violations_size(), 2);
  EXPECT_EQ(bad->field_violations(0).field(), "sampling.temperature");
  EXPECT_EQ(bad->field_violations(1).field(), "n");
}

TEST_F(ServerTest, UnknownModelIsNotFound) {
  v1::GenerateRequest request = Request();
  request.set_model("gamma\n");
  v1::GenerateResponse response;
  const grpc::Status status = Generate(request, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_THAT(status.error_message(), HasSubstr("gamma"));
  EXPECT_EQ(FindDetail<google::rpc::ErrorInfo>(status)->reason(), "MODEL_NOT_FOUND");
}

TEST_F(ServerTest, FullQueueSaysWhenToRetry) {
  absl::Status full = absl::ResourceExhaustedError("the queue is full");
  full.SetPayload(kRetryAfterPayload, absl::Cord("1500"));
  alpha_->RefuseNext(full, RejectionReason::kQueueFull);
  grpc::ClientContext context;
  const Streamed all = ReadAll(generation_->GenerateStream(&context, Request()).get());
  EXPECT_EQ(all.status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  const auto retry = FindDetail<google::rpc::RetryInfo>(all.status);
  ASSERT_TRUE(retry.has_value());
  EXPECT_EQ(retry->retry_delay().seconds(), 1);
  EXPECT_EQ(FindDetail<google::rpc::ErrorInfo>(all.status)->reason(), "OVERLOADED");
  EXPECT_EQ(
      Metric("firesteel_admission_rejections_total{model_name=\"alpha\",reason=\"queue_full\"}"),
      1);
}

TEST_F(ServerTest, MessagesBeyondTheLimitAreRefused) {
  v1::GenerateResponse response;
  const grpc::Status status = Generate(Request(std::string(5u << 20, 'x')), &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
}

TEST_F(ServerTest, RefusalsTellRetryPoliciesWhatToDo) {
  const auto pushback = [this](absl::Status refusal) {
    alpha_->RefuseNext(std::move(refusal));
    grpc::ClientContext context;
    v1::GenerateResponse response;
    EXPECT_FALSE(generation_->Generate(&context, Request(), &response).ok());
    return FirstValue(context.GetServerTrailingMetadata(), "grpc-retry-pushback-ms");
  };
  EXPECT_EQ(pushback(WithRetryDelay(absl::ResourceExhaustedError("full"), absl::Seconds(2))),
            "2000");
  EXPECT_EQ(pushback(absl::ResourceExhaustedError("for ever")), "-1");
}

// --- Tokenize, Detokenize ---

TEST_F(ServerTest, TextBecomesTokensAndText) {
  grpc::ClientContext tokenize_context;
  v1::TokenizeRequest text;
  text.set_text("hey");
  text.set_model("beta");
  v1::TokenizeResponse tokens;
  ASSERT_TRUE(generation_->Tokenize(&tokenize_context, text, &tokens).ok());
  EXPECT_EQ(tokens.model(), "beta");
  ASSERT_EQ(tokens.tokens_size(), 4);
  EXPECT_EQ(FirstValue(tokenize_context.GetServerTrailingMetadata(), "x-request-id").size(), 32u);

  grpc::ClientContext detokenize_context;
  v1::DetokenizeRequest ids;
  for (const v1::Token& token : tokens.tokens()) ids.add_token_ids(token.token_id());
  v1::DetokenizeResponse joined;
  ASSERT_TRUE(generation_->Detokenize(&detokenize_context, ids, &joined).ok());
  EXPECT_EQ(joined.text(), "hey");
}

// --- ModelService ---

TEST_F(ServerTest, ModelsAreListedAndDescribed) {
  grpc::ClientContext list_context;
  v1::ListModelsResponse list;
  ASSERT_TRUE(models_->ListModels(&list_context, {}, &list).ok());
  ASSERT_EQ(list.models_size(), 2);
  EXPECT_EQ(list.models(0).name(), "alpha");
  EXPECT_TRUE(list.models(0).is_default());
  EXPECT_FALSE(list.models(1).is_default());

  grpc::ClientContext context;
  v1::GetModelRequest request;
  request.set_model("beta");
  v1::GetModelResponse response;
  ASSERT_TRUE(models_->GetModel(&context, request, &response).ok());
  const v1::ModelInfo& model = response.model();
  EXPECT_EQ(model.name(), "beta");
  EXPECT_EQ(model.architecture(), v1::ARCHITECTURE_SPARK_GEMMA2);
  EXPECT_EQ(model.shape().vocab_size(), 300u);
  EXPECT_EQ(model.shape().layer_types_size(), 2);
  EXPECT_EQ(model.limits().max_context_tokens(), 128u);
  EXPECT_EQ(model.limits().max_prompt_tokens(), 127u);
  EXPECT_EQ(model.limits().max_sequences(), 16u);
  EXPECT_EQ(model.limits().max_stop_strings(), 16u);
  EXPECT_EQ(model.limits().max_stop_string_bytes(), 256u);
  EXPECT_EQ(model.limits().max_logprobs(), 20u);
  EXPECT_EQ(model.limits().max_logit_biases(), 1024u);
  EXPECT_EQ(model.limits().kv_cache_capacity_tokens(), 4096u);
  EXPECT_EQ(model.weights().compute(), "bf16");
  EXPECT_EQ(model.sparsity_targets().ffn_top_k(), 8u);
  EXPECT_DOUBLE_EQ(model.sparsity_targets().ffn_active_fraction(), 0.08);
}

TEST_F(ServerTest, GetModelOfAnotherNameIsNotFound) {
  grpc::ClientContext context;
  v1::GetModelRequest request;
  request.set_model("gamma");
  v1::GetModelResponse response;
  const grpc::Status status = models_->GetModel(&context, request, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(FirstValue(context.GetServerTrailingMetadata(), "x-request-id").size(), 32u);
}

TEST_F(ServerTest, ServerTellsWhatItIs) {
  grpc::ClientContext context;
  v1::GetServerInfoResponse info;
  ASSERT_TRUE(models_->GetServerInfo(&context, {}, &info).ok());
  EXPECT_EQ(info.version(), Version());
  EXPECT_EQ(info.simd_target(), "TEST");
  EXPECT_EQ(info.threads(), 3u);
  EXPECT_THAT(info.models(), ElementsAre("alpha", "beta"));
}

// --- Health ---

TEST_F(ServerTest, HealthKnowsServicesAndModels) {
  for (const char* name : {"", "alpha", "beta", "firesteel.v1.GenerationService",
                           "firesteel.v1.ModelService", "inference.GRPCInferenceService"}) {
    EXPECT_EQ(StatusOfName(name), HealthResponse::SERVING) << name;
  }
  HealthResponse response;
  EXPECT_EQ(HealthOf("gamma", &response).error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST_F(ServerTest, StuckModelTurnsNotServingAndBack) {
  beta_->SetMakingProgress(false);
  server_->health().Check();
  EXPECT_EQ(StatusOfName("beta"), HealthResponse::NOT_SERVING);
  EXPECT_EQ(StatusOfName("alpha"), HealthResponse::SERVING);
  EXPECT_EQ(StatusOfName(""), HealthResponse::NOT_SERVING);
  EXPECT_EQ(StatusOfName("firesteel.v1.GenerationService"), HealthResponse::NOT_SERVING);
  EXPECT_EQ(StatusOfName("firesteel.v1.ModelService"), HealthResponse::SERVING);
  beta_->SetMakingProgress(true);
  server_->health().Check();
  EXPECT_EQ(StatusOfName("beta"), HealthResponse::SERVING);
  EXPECT_EQ(StatusOfName(""), HealthResponse::SERVING);
}

TEST_F(ServerTest, WatchdogLooksByItself) {
  Restart(ServerConfig{.stall = absl::Milliseconds(100)});
  grpc::ClientContext context;
  grpc::health::v1::HealthCheckRequest request;
  request.set_service("alpha");
  const auto watch = health_->Watch(&context, request);
  HealthResponse response;
  ASSERT_TRUE(watch->Read(&response));
  EXPECT_EQ(response.status(), HealthResponse::SERVING);
  alpha_->SetMakingProgress(false);
  ASSERT_TRUE(watch->Read(&response));
  EXPECT_EQ(response.status(), HealthResponse::NOT_SERVING);
  context.TryCancel();
}

// --- Drain ---

TEST_F(ServerTest, DrainFinishesWhatRunsAndRefusesTheRest) {
  grpc::ClientContext watch_context;
  const auto watch = health_->Watch(&watch_context, {});
  HealthResponse health;
  ASSERT_TRUE(watch->Read(&health));

  grpc::ClientContext context;
  const auto reader = generation_->GenerateStream(&context, Request());
  const auto handle = alpha_->WaitForRequest(0);
  auto stop = std::async(std::launch::async, [this] {
    return server_->Stop(absl::ZeroDuration(), absl::InfiniteDuration());
  });
  ASSERT_TRUE(watch->Read(&health));
  EXPECT_EQ(health.status(), HealthResponse::NOT_SERVING);

  // The engines refuse shortly after health was withdrawn.
  grpc::Status status;
  size_t accepted = 0;
  while (true) {
    grpc::ClientContext late_context;
    late_context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
    const auto late = generation_->GenerateStream(&late_context, Request());
    late->WaitForInitialMetadata();
    if (FirstValue(late_context.GetServerInitialMetadata(), "x-request-id").empty()) {
      status = ReadAll(late.get()).status;
      break;
    }
    alpha_->Finish(alpha_->WaitForRequest(++accepted), FakeResult(FinishReason::kEos));
  }
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(FindDetail<google::rpc::ErrorInfo>(status)->reason(), "SERVER_DRAINING");
  EXPECT_EQ(
      Metric("firesteel_admission_rejections_total{model_name=\"alpha\",reason=\"draining\"}"), 1);

  alpha_->Emit(handle, "to the end");
  alpha_->Finish(handle, FakeResult(FinishReason::kEos));
  const Streamed all = ReadAll(reader.get());
  EXPECT_TRUE(all.status.ok()) << all.status.error_message();
  EXPECT_EQ(all.text(), "to the end");
  EXPECT_TRUE(stop.get());
}

TEST_F(ServerTest, DrainCancelsAtItsDeadline) {
  grpc::ClientContext context;
  const auto reader = generation_->GenerateStream(&context, Request());
  alpha_->WaitForRequest(0);
  auto read = std::async(std::launch::async, [&] { return ReadAll(reader.get()); });
  EXPECT_FALSE(server_->Stop(absl::ZeroDuration(), absl::ZeroDuration()));
  const Streamed all = read.get();
  EXPECT_EQ(all.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  ASSERT_EQ(all.messages.size(), 1u);
  EXPECT_EQ(all.messages[0].sequence().finish_reason(), v1::FINISH_REASON_CANCELLED);
}

// Every step is let through by an event, so that what holds between two of them is seen.
TEST_F(ServerTest, DrainGoesInOrder) {
  absl::Notification withdrawn, grace_over;
  ServerConfig config;
  config.wait = [&](absl::Duration grace) {
    EXPECT_EQ(grace, absl::Seconds(7));
    withdrawn.Notify();
    grace_over.WaitForNotification();
  };
  Restart(config);
  grpc::ClientContext watch_context;
  const auto watch = health_->Watch(&watch_context, {});
  HealthResponse health;
  ASSERT_TRUE(watch->Read(&health));
  ASSERT_EQ(health.status(), HealthResponse::SERVING);
  grpc::ClientContext ends_context, stays_context;
  const auto ends = generation_->GenerateStream(&ends_context, Request());
  const auto ends_handle = alpha_->WaitForRequest(0);
  const auto stays = generation_->GenerateStream(&stays_context, Request());
  alpha_->WaitForRequest(1);

  auto stop = std::async(std::launch::async, [this] {
    return server_->Stop(absl::Seconds(7), absl::InfiniteDuration());
  });
  withdrawn.WaitForNotification();
  // 1. Health is withdrawn, of every name.
  ASSERT_TRUE(watch->Read(&health));
  EXPECT_EQ(health.status(), HealthResponse::NOT_SERVING);
  EXPECT_EQ(StatusOfName("alpha"), HealthResponse::NOT_SERVING);
  // 2. In the grace, what balancers still send is taken.
  grpc::ClientContext late_context;
  const auto late = generation_->GenerateStream(&late_context, Request());
  alpha_->Finish(alpha_->WaitForRequest(2), FakeResult(FinishReason::kEos));
  EXPECT_TRUE(ReadAll(late.get()).status.ok());
  grace_over.Notify();
  alpha_->WaitForDrain();
  // 3. Then it is refused.
  v1::GenerateResponse response;
  const grpc::Status refused = Generate(Request(), &response);
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(FindDetail<google::rpc::ErrorInfo>(refused)->reason(), "SERVER_DRAINING");
  // 4. What runs goes on to its end.
  alpha_->Emit(ends_handle, "to the end");
  alpha_->Finish(ends_handle, FakeResult(FinishReason::kEos));
  const Streamed ended = ReadAll(ends.get());
  EXPECT_TRUE(ended.status.ok()) << ended.status.error_message();
  EXPECT_EQ(ended.text(), "to the end");
  EXPECT_FALSE(alpha_->empty()) << "the other one still runs";
  EXPECT_EQ(stop.wait_for(std::chrono::seconds(0)), std::future_status::timeout);
  // 5. What still runs when the time is up is cancelled.
  alpha_->PassDrainDeadline();
  EXPECT_EQ(ReadAll(stays.get()).status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_FALSE(stop.get());
}

// --- Long streams ---

TEST_F(ServerTest, OldConnectionIsClosedOnlyBehindItsStreams) {
  ServerConfig config;
  config.max_connection_age = absl::Milliseconds(50);
  Restart(config);
  const auto channel = NarrowChannel(server_->address());
  const auto stub = v1::GenerationService::NewStub(channel);
  grpc::ClientContext context;
  const auto reader = stub->GenerateStream(&context, Request());
  const auto handle = alpha_->WaitForRequest(0);
  // The server has announced the connection's end: the channel uses it for nothing new.
  while (channel->GetState(false) == GRPC_CHANNEL_READY) {
    channel->WaitForStateChange(GRPC_CHANNEL_READY, std::chrono::system_clock::time_point::max());
  }
  alpha_->Emit(handle, "still ");
  alpha_->WaitUntilIdle();
  alpha_->Emit(handle, "here");
  alpha_->Finish(handle, FakeResult(FinishReason::kEos));
  const Streamed all = ReadAll(reader.get());
  EXPECT_TRUE(all.status.ok()) << all.status.error_message();
  EXPECT_EQ(all.text(), "still here");
}

// Each side in turn asks all the time whether the other one is there. gRPC lets a client ask once a
// second at most, and takes it ill at the fourth time, but forgives all when it asks itself.
TEST_F(ServerTest, QuietStreamOutlivesKeepalives) {
  for (const bool server_asks : {true, false}) {
    ServerConfig config;
    config.keepalive = {.time = server_asks ? absl::Milliseconds(20) : absl::Minutes(1),
                        .timeout = absl::Minutes(1),
                        .min_client_ping = absl::Milliseconds(100)};
    Restart(config);
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, server_asks ? 60'000 : 100);
    arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 60'000);
    arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
    const auto channel = grpc::CreateCustomChannel(server_->address(),
                                                   grpc::InsecureChannelCredentials(), arguments);
    const auto stub = v1::GenerationService::NewStub(channel);
    grpc::ClientContext context;
    const auto reader = stub->GenerateStream(&context, Request());
    reader->WaitForInitialMetadata();
    const auto handle = alpha_->WaitForRequest(0);
    EXPECT_FALSE(channel->WaitForStateChange(
        GRPC_CHANNEL_READY,
        std::chrono::system_clock::now() + std::chrono::seconds(server_asks ? 1 : 6)))
        << "the connection was cut";
    alpha_->Emit(handle, "still here");
    alpha_->Finish(handle, FakeResult(FinishReason::kEos));
    const Streamed all = ReadAll(reader.get());
    EXPECT_TRUE(all.status.ok()) << all.status.error_message();
    EXPECT_EQ(all.text(), "still here");
  }
}

// --- Large answers ---

TEST_F(ServerTest, AnswerThatCouldBeTooLargeIsRefusedBeforeAnyWork) {
  max_answer_bytes_ = 64 << 10;
  Restart(ServerConfig());
  alpha_->AnswerAll(1);  // what is not refused ends, too
  v1::GenerateRequest request = Request();
  request.set_n(16);
  request.set_max_tokens(100);
  request.mutable_output()->set_logprobs(20);
  v1::GenerateResponse response;
  const grpc::Status status = Generate(request, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  const auto bad = FindDetail<google::rpc::BadRequest>(status);
  ASSERT_TRUE(bad.has_value());
  EXPECT_EQ(bad->field_violations(0).field(), "max_tokens");
  EXPECT_THAT(bad->field_violations(0).description(), HasSubstr("at most 65536"));
  EXPECT_EQ(alpha_->num_admitted(), 0u);
}

TEST_F(ServerTest, MessagesOfStreamsKeepTheLimit) {
  max_answer_bytes_ = 64 << 10;
  Restart(ServerConfig());
  grpc::ClientContext context;
  const auto reader = generation_->GenerateStream(&context, Request());
  const auto handle = alpha_->WaitForRequest(0);
  const std::string text(300'000, 'x');
  alpha_->Emit(handle, text);
  alpha_->Finish(handle, FakeResult(FinishReason::kEos));
  const Streamed all = ReadAll(reader.get());
  ASSERT_TRUE(all.status.ok()) << all.status.error_message();
  EXPECT_EQ(all.text(), text);
  for (const auto& message : all.messages) EXPECT_LE(message.ByteSizeLong(), 64u << 10);
  EXPECT_TRUE(all.messages.back().has_usage());
}

// --- Around the services ---

TEST_F(ServerTest, CallsAreCountedByMethodAndCode) {
  alpha_->AnswerAll(1);
  v1::GenerateResponse response;
  ASSERT_TRUE(Generate(Request(), &response).ok());
  v1::GenerateRequest bad = Request();
  bad.set_max_tokens(0);
  EXPECT_FALSE(Generate(bad, &response).ok());
  EXPECT_EQ(StatusOfName(""), HealthResponse::SERVING);
  const std::string method =
      "grpc_method=\"Generate\",grpc_service=\"firesteel.v1.GenerationService\"}";
  EXPECT_EQ(Metric("grpc_server_started_total{" + method), 2);
  EXPECT_EQ(Metric("grpc_server_handled_total{grpc_code=\"OK\"," + method), 1);
  EXPECT_EQ(Metric("grpc_server_handled_total{grpc_code=\"InvalidArgument\"," + method), 1);
  EXPECT_EQ(Metric("grpc_server_handling_seconds_count{grpc_code=\"OK\"," + method), 1);
  EXPECT_EQ(Metric("grpc_server_handled_total{grpc_code=\"OK\",grpc_method=\"Check\",grpc_service="
                   "\"grpc.health.v1.Health\"}"),
            1);
}

TEST_F(ServerTest, UnparsedRequestsAreCountedAsWhatTheyAre) {
  EXPECT_FALSE(CallRaw("/firesteel.v1.ModelService/GetModel", "\xff").ok());
  EXPECT_EQ(CodeOfFirst("GetModel", "firesteel.v1.ModelService"), "InvalidArgument");
}

// A call may be given up between its headers and its message.
TEST_F(ServerTest, CallGivenUpBeforeItsRequestCameIsCountedAsCancelled) {
  grpc::GenericStub stub(channel_);
  grpc::CompletionQueue queue;
  grpc::ClientContext context;
  const auto call =
      stub.PrepareCall(&context, "/firesteel.v1.GenerationService/GenerateStream", &queue);
  call->StartCall(nullptr);
  void* tag = nullptr;
  bool ok = false;
  ASSERT_TRUE(queue.Next(&tag, &ok) && ok);
  // By the same connection, hence behind the headers.
  EXPECT_EQ(StatusOfName(""), HealthResponse::SERVING);
  context.TryCancel();
  grpc::Status status;
  call->Finish(&status, nullptr);
  ASSERT_TRUE(queue.Next(&tag, &ok));
  queue.Shutdown();
  while (queue.Next(&tag, &ok)) continue;
  EXPECT_EQ(CodeOfFirst("GenerateStream", "firesteel.v1.GenerationService"), "Canceled");
}

TEST_F(ServerTest, UnknownMethodMakesNoTimeSeries) {
  const grpc::Status status = CallRaw("/firesteel.v1.GenerationService/Evil", "");
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNIMPLEMENTED);
  EXPECT_THAT(Scrape(), Not(HasSubstr("Evil")));
}

// What cannot be parsed is an error of the call; the server goes on.
TEST_F(ServerTest, GarbageIsAnErrorOfTheCall) {
  for (const char* method :
       {"/firesteel.v1.GenerationService/Generate",
        "/firesteel.v1.GenerationService/GenerateStream", "/firesteel.v1.ModelService/GetModel"}) {
    const grpc::Status status = CallRaw(method, "\xff\xff\xff\xff garbage");
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << method;
    EXPECT_EQ(FindDetail<google::rpc::ErrorInfo>(status)->reason(), "MALFORMED_REQUEST");
    EXPECT_EQ(StatusOfName(""), HealthResponse::SERVING);
  }
}

// The messages of the reflection protocol by hand: field 7, list_services; field 4,
// file_containing_symbol.
constexpr char kReflectionMethod[] =
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo";

TEST_F(ServerTest, ReflectionListsAndDescribesServices) {
  std::string answer;
  ASSERT_TRUE(CallRaw(kReflectionMethod, std::string("\x3a\x00", 2), &answer).ok());
  for (const char* service :
       {"firesteel.v1.GenerationService", "firesteel.v1.ModelService", "grpc.health.v1.Health"}) {
    EXPECT_THAT(answer, HasSubstr(service));
    const std::string symbol = service;
    std::string file;
    ASSERT_TRUE(CallRaw(kReflectionMethod,
                        "\x22" + std::string(1, static_cast<char>(symbol.size())) + symbol, &file)
                    .ok());
    EXPECT_THAT(file, HasSubstr(".proto")) << service;
  }
}

TEST_F(ServerTest, ReflectionCanBeOff) {
  Restart(ServerConfig{.reflection = false});
  EXPECT_EQ(CallRaw(kReflectionMethod, std::string("\x3a\x00", 2)).error_code(),
            grpc::StatusCode::UNIMPLEMENTED);
}

TEST_F(ServerTest, ChannelzIsForAdminsWhereAskedFor) {
  constexpr char kMethod[] = "/grpc.channelz.v1.Channelz/GetServers";
  for (const bool on : {true, false}) {
    ServerConfig config;
    config.admin_address = "127.0.0.1:0";
    config.channelz = on;
    Restart(config);
    EXPECT_EQ(CallRaw(kMethod, "").error_code(), grpc::StatusCode::UNIMPLEMENTED);
    channel_ = grpc::CreateChannel(server_->admin_address(), grpc::InsecureChannelCredentials());
    std::string answer;
    const grpc::Status status = CallRaw(kMethod, "", &answer);
    EXPECT_EQ(status.error_code(), on ? grpc::StatusCode::OK : grpc::StatusCode::UNIMPLEMENTED);
    EXPECT_EQ(answer.empty(), !on);
  }
}

TEST_F(ServerTest, MetricsEndpointServesNothingElse) {
  EXPECT_THAT(Scrape(), AllOf(HasSubstr("200 OK"), HasSubstr("version=0.0.4"),
                              HasSubstr("process_resident_memory_bytes "),
                              HasSubstr("# TYPE firesteel_requests_running gauge"),
                              Not(HasSubstr("exposer_"))));
  EXPECT_THAT(HttpGet(server_->metrics_address(), "/etc/passwd"), HasSubstr("404"));
}

TEST_F(ServerTest, TakenAddressesAreRefusedByOption) {
  for (const bool grpc_side : {true, false}) {
    ServerConfig config;
    (grpc_side ? config.address : config.metrics_address) =
        grpc_side ? server_->address() : server_->metrics_address();
    auto models = std::make_unique<ModelRegistry>();
    ServedModel model;
    model.name = "x";
    model.engine = std::make_unique<FakeEngine>();
    models->Put(std::move(model));
    const auto second = Server::Start(config, std::make_unique<ServerMetrics>(), std::move(models));
    ASSERT_FALSE(second.ok());
    EXPECT_THAT(
        std::string(second.status().message()),
        HasSubstr(grpc_side ? "--address: cannot listen on " + server_->address()
                            : "--metrics-address: cannot listen on " + server_->metrics_address()));
  }
}

}  // namespace
}  // namespace firesteel::server
