// `firesteel load` against a server in this process that answers by script.

#include "tools/client/load.h"

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "firesteel/v1/generation_service.grpc.pb.h"
#include "firesteel/v1/model_service.grpc.pb.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tools/client/test_server.h"

namespace firesteel::client {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::SizeIs;

// Streams a message of one token, one of two, and a closing one. Prompts "bad" are refused; while
// `hold` is set, streams wait after the first token until they are cancelled.
class FakeGeneration final : public v1::GenerationService::Service {
 public:
  grpc::Status GenerateStream(grpc::ServerContext* context, const v1::GenerateRequest* request,
                              grpc::ServerWriter<v1::GenerateStreamResponse>* writer) override {
    {
      absl::MutexLock lock(&mutex);
      requests.push_back(*request);
      most_open = std::max(most_open, ++open);
    }
    const grpc::Status status = Answer(context, *request, writer);
    absl::MutexLock lock(&mutex);
    --open;
    return status;
  }

  absl::Mutex mutex;
  std::vector<v1::GenerateRequest> requests;
  int open = 0;
  int most_open = 0;
  std::atomic<bool> hold = false;

 private:
  grpc::Status Answer(grpc::ServerContext* context, const v1::GenerateRequest& request,
                      grpc::ServerWriter<v1::GenerateStreamResponse>* writer) {
    if (request.prompt() == "bad") return {grpc::StatusCode::RESOURCE_EXHAUSTED, "queue is full"};
    v1::GenerateStreamResponse message;
    message.mutable_sequence()->add_token_ids(1);
    writer->Write(message);
    if (hold) {
      while (!context->IsCancelled()) absl::SleepFor(absl::Milliseconds(1));
      return grpc::Status::CANCELLED;
    }
    message.mutable_sequence()->add_token_ids(2);
    writer->Write(message);
    message.Clear();
    message.mutable_sequence()->set_finish_reason(v1::FINISH_REASON_EOS);
    message.mutable_usage()->set_prompt_tokens(2);
    message.mutable_usage()->set_generated_tokens(3);
    message.mutable_sparsity()->set_ffn_active_fraction(0.08);
    message.mutable_timings()->mutable_queue()->set_nanos(1'000'000);
    writer->Write(message);
    return grpc::Status::OK;
  }
};

class FakeModels final : public v1::ModelService::Service {
 public:
  grpc::Status GetModel(grpc::ServerContext*, const v1::GetModelRequest* request,
                        v1::GetModelResponse* response) override {
    if (request->model() == "none") return {grpc::StatusCode::NOT_FOUND, "no such model"};
    response->mutable_model()->set_name("m");
    response->mutable_model()->mutable_shape()->set_vocab_size(100);
    return grpc::Status::OK;
  }
};

class LoadTest : public ::testing::Test {
 protected:
  int Run(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), "load");
    return console_.Run(server_, arguments, [](CLI::App& app, Console& console, int& exit_status) {
      AddLoadCommand(app, console, nullptr, exit_status);
    });
  }

  std::shared_ptr<grpc::Channel> Channel() {
    return Connect({.address = server_.address(), .request_id = {}});
  }

  FakeGeneration generation_;
  FakeModels models_;
  TestServer server_{&generation_, &models_};
  TestConsole console_;
  std::ostringstream& out_ = console_.out;
  std::ostringstream& err_ = console_.err;
};

TEST_F(LoadTest, ClosedLoopKeepsSoManyOpenAndCountsEach) {
  EXPECT_EQ(Run({"--concurrency", "4", "--requests", "40", "--duration", "10m", "--json"}),
            kSucceeded)
      << err_.str();
  const auto json = nlohmann::json::parse(out_.str());
  EXPECT_EQ(json["requests"]["measured"], 40);
  EXPECT_EQ(json["requests"]["succeeded"], 40);
  EXPECT_EQ(json["tokens"]["generated"], 120);
  EXPECT_EQ(json["tokens"]["prompt"], 80);
  EXPECT_EQ(json["time_to_first_token_seconds"]["count"], 40);
  EXPECT_EQ(json["inter_token_latency_seconds"]["count"], 80);
  EXPECT_DOUBLE_EQ(json["request_queue_time_seconds"]["p99"], 0.001);
  EXPECT_EQ(json["finish_reasons"]["eos"], 40);
  EXPECT_NEAR(json["sparsity"]["ffn_active_fraction"], 0.08, 1e-12);
  EXPECT_EQ(json["setup"]["model"], "m");
  EXPECT_THAT(generation_.requests, SizeIs(40));
  EXPECT_LE(generation_.most_open, 4);
}

TEST_F(LoadTest, OpenLoopSendsByTheClock) {
  LoadPlan plan = {.concurrency = 0, .rate = 200, .poisson = false};
  plan.warm_up = absl::Milliseconds(100);
  plan.duration = absl::Milliseconds(200);
  const auto records = GenerateLoad(
      Channel(), plan,
      {.request = [](uint64_t) { return v1::GenerateRequest(); },
       .prepare = [](grpc::ClientContext&) {}},
      [] { return false; }, nullptr);
  // Whatever the machine did meanwhile: all that were due are there, due when they should be.
  ASSERT_EQ(records.size(), 60u);
  std::set<int> due;
  int measured = 0;
  for (const LoadRecord& record : records) {
    due.insert(static_cast<int>(record.due * 200 + 0.5));
    measured += record.measured ? 1 : 0;
    EXPECT_GE(record.first, record.due);
    EXPECT_GE(record.end, record.first);
  }
  EXPECT_EQ(due.size(), 60u);
  EXPECT_NEAR(measured, 40, 1);  // the request at the border may be on either side
}

TEST_F(LoadTest, OpenLoopDoesNotWaitForAnswersButForItsBound) {
  generation_.hold = true;
  LoadPlan plan = {.concurrency = 0, .rate = 1000, .poisson = true, .seed = 7};
  plan.max_requests = 50;
  plan.max_open = 20;
  LoadProgress last;
  const auto records = GenerateLoad(
      Channel(), plan,
      {.request = [](uint64_t) { return v1::GenerateRequest(); },
       .prepare = [](grpc::ClientContext&) {}},
      // Interrupted once all are sent, or known not to be.
      [&last] { return last.open + last.failed == 50; },
      [&last](const LoadProgress& progress) { last = progress; });
  ASSERT_EQ(records.size(), 50u);
  const auto not_sent = std::count_if(records.begin(), records.end(),
                                      [](const LoadRecord& record) { return record.not_sent; });
  EXPECT_EQ(not_sent, 30);
  for (const LoadRecord& record : records) {
    if (!record.not_sent) EXPECT_EQ(record.code, grpc::StatusCode::CANCELLED);
  }
}

TEST_F(LoadTest, FailuresAreReportedAndFailTheRunIfThereIsNothingElse) {
  EXPECT_EQ(Run({"--prompt", "bad", "--requests", "3"}), kFailed);
  EXPECT_THAT(out_.str(), HasSubstr("failed with RESOURCE_EXHAUSTED: 3, e.g. queue is full"));
  out_.str("");
  EXPECT_EQ(Run({"--prompt", "bad", "--prompt", "good", "--requests", "4"}), kSucceeded);
  EXPECT_THAT(out_.str(), HasSubstr("4 requests"));
  EXPECT_THAT(out_.str(), HasSubstr("2 succeeded, 2 failed"));
}

TEST_F(LoadTest, RequestsAreAsAskedForAndRepeatable) {
  const std::vector<std::string> arguments = {"--prompt-tokens",
                                              "5",
                                              "--max-tokens",
                                              "9",
                                              "--ignore-eos",
                                              "--temperature",
                                              "0",
                                              "--logprobs",
                                              "3",
                                              "--seed",
                                              "40",
                                              "--requests",
                                              "2",
                                              "--model",
                                              "m"};
  EXPECT_EQ(Run(arguments), kSucceeded) << err_.str();
  EXPECT_EQ(Run(arguments), kSucceeded);
  ASSERT_THAT(generation_.requests, SizeIs(4));
  const v1::GenerateRequest& first = generation_.requests[0];
  EXPECT_THAT(first.token_ids().ids(), SizeIs(5));
  EXPECT_THAT(first.token_ids().ids(), Each(::testing::Lt(100u)));
  EXPECT_EQ(first.max_tokens(), 9u);
  EXPECT_TRUE(first.stopping().ignore_eos());
  EXPECT_EQ(first.sampling().seed(), 40u);
  EXPECT_EQ(first.sampling().temperature(), 0.0f);
  EXPECT_TRUE(first.output().return_token_ids());
  EXPECT_EQ(first.output().logprobs(), 3u);
  EXPECT_EQ(generation_.requests[1].sampling().seed(), 41u);
  EXPECT_NE(generation_.requests[1].SerializeAsString(), first.SerializeAsString());
  EXPECT_EQ(generation_.requests[2].SerializeAsString(), first.SerializeAsString());
}

TEST_F(LoadTest, LengthsAreDrawnFromRanges) {
  EXPECT_EQ(Run({"--prompt-tokens", "3-6", "--max-tokens", "8-9", "--requests", "40"}), kSucceeded)
      << err_.str();
  std::set<int> prompts;
  std::set<uint32_t> answers;
  for (const v1::GenerateRequest& request : generation_.requests) {
    prompts.insert(request.token_ids().ids_size());
    answers.insert(request.max_tokens());
  }
  EXPECT_THAT(prompts, ElementsAre(3, 4, 5, 6));
  EXPECT_THAT(answers, ElementsAre(8u, 9u));
}

TEST_F(LoadTest, PromptsComeFromAFileInTurn) {
  const std::string path = testing::TempDir() + "/prompts";
  std::ofstream(path) << "one\n\ntwo\n";
  EXPECT_EQ(Run({"--prompts-file", path, "--requests", "3"}), kSucceeded) << err_.str();
  ASSERT_THAT(generation_.requests, SizeIs(3));
  EXPECT_EQ(generation_.requests[0].prompt(), "one");
  EXPECT_EQ(generation_.requests[1].prompt(), "two");
  EXPECT_EQ(generation_.requests[2].prompt(), "one");
}

TEST_F(LoadTest, PageIsWritten) {
  const std::string path = testing::TempDir() + "/load.html";
  EXPECT_EQ(Run({"--requests", "2", "--html", path, "--slo", "ttft=1h"}), kSucceeded);
  std::ifstream file(path);
  const std::string page((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  EXPECT_THAT(page, HasSubstr("\"within_objectives\":2"));
  EXPECT_THAT(out_.str(), HasSubstr("goodput "));
}

TEST_F(LoadTest, WhatIsWrongIsNamedAndNothingSent) {
  for (const std::vector<std::string>& arguments :
       std::vector<std::vector<std::string>>{{"--concurrency", "0"},
                                             {"--concurrency", "2", "--rate", "3"},
                                             {"--rate", "0"},
                                             {"--rate", "nan"},
                                             {"--arrivals", "bursts"},
                                             {"--duration", "0s"},
                                             {"--duration", "soon"},
                                             {"--duration", "25h"},
                                             {"--warm-up", "-1s"},
                                             {"--slo", "ttft=1"},
                                             {"--slo", "p99=1s"},
                                             {"--slo", "itl=-1s"},
                                             {"--prompt-tokens", "0"},
                                             {"--prompt-tokens", "9-8"},
                                             {"--prompt-tokens", "1-2-3"},
                                             {"--max-tokens", "-5"},
                                             {"--max-tokens", "1000001"},
                                             {"--prompt-tokens", "3", "--prompt", "x"},
                                             {"--prompts-file", "/nowhere"},
                                             {"--html", "/nowhere/page.html"}}) {
    err_.str("");
    EXPECT_EQ(Run(arguments), kUsage) << ::testing::PrintToString(arguments);
    EXPECT_NE(err_.str(), "") << ::testing::PrintToString(arguments);
  }
  EXPECT_THAT(generation_.requests, SizeIs(0));
}

TEST_F(LoadTest, ServerThatIsNotThereOrLacksTheModelFailsAtOnce) {
  EXPECT_EQ(Run({"--model", "none"}), kFailed);
  EXPECT_THAT(err_.str(), HasSubstr("NOT_FOUND"));
  server_->Shutdown();
  EXPECT_EQ(Run({}), kFailed);
  EXPECT_THAT(err_.str(), HasSubstr("UNAVAILABLE"));
}

}  // namespace
}  // namespace firesteel::client
