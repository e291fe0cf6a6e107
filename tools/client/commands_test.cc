// The commands against a server in this process that answers by script.

#include <signal.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "firesteel/v1/generation_service.grpc.pb.h"
#include "firesteel/v1/model_service.grpc.pb.h"
#include "gmock/gmock.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "gtest/gtest.h"
#include "tools/client/chat.h"
#include "tools/client/generate.h"
#include "tools/client/health.h"
#include "tools/client/info.h"
#include "tools/client/interrupt.h"
#include "tools/client/test_server.h"
#include "tools/client/tokenize.h"

namespace firesteel::client {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::StartsWith;

// Streams "Once ", "upon" and a closing message. With the prompt "bad" it fails with a field
// violation, with "wait" it streams one piece and then waits until it is cancelled.
class FakeGeneration final : public v1::GenerationService::Service {
 public:
  grpc::Status Generate(grpc::ServerContext*, const v1::GenerateRequest* request,
                        v1::GenerateResponse* response) override {
    last_request = *request;
    v1::Sequence& sequence = *response->add_sequences();
    sequence.set_text("Once upon");
    sequence.set_finish_reason(v1::FINISH_REASON_LENGTH);
    response->mutable_usage()->set_generated_tokens(2);
    return grpc::Status::OK;
  }

  grpc::Status GenerateStream(grpc::ServerContext* context, const v1::GenerateRequest* request,
                              grpc::ServerWriter<v1::GenerateStreamResponse>* writer) override {
    last_request = *request;
    const auto& metadata = context->client_metadata();
    if (const auto id = metadata.find("x-request-id"); id != metadata.end()) {
      last_request_id.assign(id->second.data(), id->second.size());
      context->AddTrailingMetadata("x-request-id", last_request_id);
    }
    if (request->prompt() == "bad") return BadRequest();
    v1::GenerateStreamResponse message;
    message.mutable_sequence()->set_text("Once ");
    message.mutable_sequence()->add_token_ids(11);
    writer->Write(message);
    if (request->prompt() == "wait") {
      while (!context->IsCancelled()) absl::SleepFor(absl::Milliseconds(1));
      saw_cancel.Notify();
      return grpc::Status::CANCELLED;
    }
    message.mutable_sequence()->set_text("upon");
    message.mutable_sequence()->set_token_ids(0, 12);
    writer->Write(message);
    message.Clear();
    message.mutable_sequence()->set_finish_reason(v1::FINISH_REASON_EOS);
    message.mutable_usage()->set_prompt_tokens(3);
    message.mutable_usage()->set_generated_tokens(2);
    writer->Write(message);
    return grpc::Status::OK;
  }

  grpc::Status Tokenize(grpc::ServerContext*, const v1::TokenizeRequest* request,
                        v1::TokenizeResponse* response) override {
    if (request->add_bos()) response->add_tokens()->set_token_id(2);
    v1::Token& token = *response->add_tokens();
    token.set_token_id(17);
    token.set_text(" " + request->text());
    return grpc::Status::OK;
  }

  grpc::Status Detokenize(grpc::ServerContext*, const v1::DetokenizeRequest* request,
                          v1::DetokenizeResponse* response) override {
    response->set_text(absl::StrCat(request->token_ids_size(), " tokens"));
    return grpc::Status::OK;
  }

  grpc::Status Score(grpc::ServerContext* context, const v1::ScoreRequest* request,
                     v1::ScoreResponse* response) override {
    const auto& metadata = context->client_metadata();
    if (const auto token = metadata.find("authorization"); token != metadata.end()) {
      last_authorization.assign(token->second.data(), token->second.size());
    }
    response->add_tokens()->set_token_id(2);
    for (const char* word : {"one", "two"}) {
      v1::ScoredToken& token = *response->add_tokens();
      token.set_text(request->prompt().empty() ? "id" : word);
      token.set_logprob(-0.5f);
    }
    return grpc::Status::OK;
  }

  v1::GenerateRequest last_request;
  std::string last_request_id;
  std::string last_authorization;
  absl::Notification saw_cancel;

 private:
  static grpc::Status BadRequest() {
    google::rpc::BadRequest bad_request;
    bad_request.add_field_violations()->set_field("max_tokens");
    bad_request.mutable_field_violations(0)->set_description("is 0, at least 1");
    google::rpc::Status details;
    details.add_details()->PackFrom(bad_request);
    return {grpc::StatusCode::INVALID_ARGUMENT, "1 field is wrong", details.SerializeAsString()};
  }
};

class FakeModels final : public v1::ModelService::Service {
 public:
  grpc::Status ListModels(grpc::ServerContext*, const v1::ListModelsRequest*,
                          v1::ListModelsResponse* response) override {
    response->add_models()->set_name("first");
    response->add_models()->set_name("second");
    return grpc::Status::OK;
  }

  grpc::Status GetModel(grpc::ServerContext*, const v1::GetModelRequest* request,
                        v1::GetModelResponse* response) override {
    if (request->model() != "second") return {grpc::StatusCode::NOT_FOUND, "no such model"};
    response->mutable_model()->set_name("second");
    return grpc::Status::OK;
  }

  grpc::Status GetServerInfo(grpc::ServerContext*, const v1::GetServerInfoRequest*,
                             v1::GetServerInfoResponse* response) override {
    response->set_version("9.9");
    return grpc::Status::OK;
  }
};

// Keeps what is written, and tells when the first of it was flushed.
class ObservedOutput final : public std::stringbuf {
 public:
  absl::Notification flushed;

 private:
  int sync() override {
    if (!view().empty() && !flushed.HasBeenNotified()) flushed.Notify();
    return 0;
  }
};

std::string ContentOf(const std::string& path) {
  std::stringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

class CommandsTest : public ::testing::Test {
 protected:
  int Run(const std::vector<std::string>& arguments) {
    return console_.Run(server_, arguments,
                        [this](CLI::App& app, Console& console, int& exit_status) {
                          AddGenerateCommand(app, console, &interrupt_, exit_status);
                          AddChatCommand(app, console, &interrupt_, exit_status);
                          AddTokenizeCommand(app, console, &interrupt_, exit_status);
                          AddScoreCommand(app, console, &interrupt_, exit_status);
                          AddInfoCommand(app, console, &interrupt_, exit_status);
                          AddHealthCommand(app, console, &interrupt_, exit_status);
                        });
  }

  Interrupt interrupt_;  // first: all threads must inherit its signal mask
  FakeGeneration generation_;
  FakeModels models_;
  TestServer server_{&generation_, &models_};
  TestConsole console_;
  std::istringstream& in_ = console_.in;
  std::ostringstream& out_ = console_.out;
  std::ostringstream& err_ = console_.err;
};

TEST_F(CommandsTest, GenerateStreamsTextAndSummary) {
  EXPECT_EQ(Run({"generate", "a prompt"}), kSucceeded);
  EXPECT_EQ(out_.str(), "Once upon\n");
  EXPECT_THAT(err_.str(), StartsWith("[3 prompt + 2 generated tokens"));
  EXPECT_THAT(err_.str(), HasSubstr("finish eos]\n"));
  EXPECT_EQ(generation_.last_request.prompt(), "a prompt");
  EXPECT_FALSE(generation_.last_request.has_max_tokens());
  EXPECT_FALSE(generation_.last_request.sampling().has_temperature());
}

TEST_F(CommandsTest, GenerateSendsEveryOption) {
  EXPECT_EQ(Run({"generate",
                 "--model",
                 "m",
                 "--max-tokens",
                 "7",
                 "--temperature",
                 "0",
                 "--top-k",
                 "0",
                 "--top-p",
                 "0.5",
                 "--min-p",
                 "0.25",
                 "--seed",
                 "18446744073709551615",
                 "--stop",
                 "one",
                 "--stop",
                 "two",
                 "--ignore-eos",
                 "--request-id",
                 "abc",
                 "--deadline",
                 "30s",
                 "text"}),
            kSucceeded)
      << err_.str();
  const v1::GenerateRequest& request = generation_.last_request;
  EXPECT_EQ(request.model(), "m");
  EXPECT_EQ(request.prompt(), "text");
  EXPECT_EQ(request.max_tokens(), 7u);
  EXPECT_TRUE(request.sampling().has_temperature());  // 0 is a value, not an absence
  EXPECT_EQ(request.sampling().temperature(), 0.0f);
  EXPECT_TRUE(request.sampling().has_top_k());
  EXPECT_EQ(request.sampling().top_p(), 0.5f);
  EXPECT_EQ(request.sampling().min_p(), 0.25f);
  EXPECT_EQ(request.sampling().seed(), 18446744073709551615u);
  EXPECT_THAT(request.stopping().stop(), ElementsAre("one", "two"));
  EXPECT_TRUE(request.stopping().ignore_eos());
  EXPECT_EQ(generation_.last_request_id, "abc");
}

TEST_F(CommandsTest, GenerateSendsPenaltiesAndOutputs) {
  EXPECT_EQ(Run({"generate",
                 "--repetition-penalty",
                 "1.5",
                 "--presence-penalty",
                 "-1",
                 "--frequency-penalty",
                 "0.5",
                 "--logit-bias",
                 "7=-100",
                 "--logit-bias",
                 "8=2.5",
                 "--n",
                 "2",
                 "--logprobs",
                 "0",
                 "--echo",
                 "--min-tokens",
                 "3",
                 "--priority",
                 "-2",
                 "x"}),
            kSucceeded)
      << err_.str();
  const v1::GenerateRequest& request = generation_.last_request;
  EXPECT_EQ(request.sampling().repetition_penalty(), 1.5f);
  EXPECT_EQ(request.sampling().presence_penalty(), -1);
  EXPECT_EQ(request.sampling().frequency_penalty(), 0.5f);
  EXPECT_EQ(request.sampling().logit_bias().at(7), -100);
  EXPECT_EQ(request.sampling().logit_bias().at(8), 2.5f);
  EXPECT_EQ(request.n(), 2u);
  EXPECT_TRUE(request.output().has_logprobs());
  EXPECT_TRUE(request.output().echo());
  EXPECT_EQ(request.stopping().min_tokens(), 3u);
  EXPECT_EQ(request.priority(), -2);
}

TEST_F(CommandsTest, TokenizeShowsTokensOrTheirText) {
  EXPECT_EQ(Run({"tokenize", "cat"}), kSucceeded) << err_.str();
  EXPECT_EQ(out_.str(), "       2  \"\"\n      17  \" cat\"\n");
  EXPECT_EQ(err_.str(), "[2 tokens]\n");
  out_.str("");
  EXPECT_EQ(Run({"tokenize", "--no-bos", "--json", "cat"}), kSucceeded);
  EXPECT_THAT(out_.str(), HasSubstr(R"("token_id":17)"));
  out_.str("");
  EXPECT_EQ(Run({"tokenize", "--token-ids", "5 6,7"}), kSucceeded);
  EXPECT_EQ(out_.str(), "3 tokens\n");
}

TEST_F(CommandsTest, ScoreAddsUp) {
  EXPECT_EQ(Run({"score", "one two"}), kSucceeded) << err_.str();
  EXPECT_THAT(out_.str(), HasSubstr("         -  \"\"\n"));
  EXPECT_THAT(out_.str(), HasSubstr("   -0.5000  \"two\"\n"));
  EXPECT_EQ(err_.str(), "[2 tokens, log-likelihood -1.0000, perplexity 1.6487]\n");
  EXPECT_EQ(generation_.last_authorization, "");
}

TEST_F(CommandsTest, TokenComesFromAFile) {
  const std::string path = absl::StrCat(::testing::TempDir(), "/token_", getpid());
  std::ofstream(path) << "secret\n";
  EXPECT_EQ(Run({"score", "--token-file", path, "x"}), kSucceeded) << err_.str();
  EXPECT_EQ(generation_.last_authorization, "Bearer secret");
  unlink(path.c_str());
  EXPECT_EQ(Run({"score", "--token-file", path, "x"}), kUsage);
}

TEST_F(CommandsTest, ChatRemembersWhatWasSaid) {
  in_.str("Hello\n\nWho?\n");
  EXPECT_EQ(Run({"chat", "--system", "Be kind."}), kSucceeded) << err_.str();
  EXPECT_EQ(out_.str(), "Once upon\nOnce upon\n");
  EXPECT_EQ(generation_.last_request.prompt(),
            "User: Be kind.\nHello\nAssistant:Once upon\nUser: Who?\nAssistant:");
  EXPECT_THAT(generation_.last_request.stopping().stop(), ElementsAre("\nUser:"));
  in_.clear();
  in_.str("Hi\n");
  EXPECT_EQ(Run({"chat", "--template", "gemma", "--max-tokens", "5"}), kSucceeded);
  EXPECT_EQ(generation_.last_request.prompt(),
            "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n");
  EXPECT_EQ(generation_.last_request.max_tokens(), 5u);
}

TEST_F(CommandsTest, GenerateTakesAndShowsTokenIds) {
  EXPECT_EQ(Run({"generate", "--token-ids", "2, 17,5"}), kSucceeded);
  EXPECT_THAT(generation_.last_request.token_ids().ids(), ElementsAre(2u, 17u, 5u));
  EXPECT_TRUE(generation_.last_request.output().return_token_ids());
  EXPECT_EQ(out_.str(), "Once upon\ntoken ids: 11,12\n");
}

TEST_F(CommandsTest, GenerateReadsThePromptFromStandardInput) {
  in_.str("first line\nsecond\n");
  EXPECT_EQ(Run({"generate", "-"}), kSucceeded);
  EXPECT_EQ(generation_.last_request.prompt(), "first line\nsecond\n");
}

TEST_F(CommandsTest, GenerateTakesAnEmptyPrompt) {
  EXPECT_EQ(Run({"generate", ""}), kSucceeded) << err_.str();
  EXPECT_TRUE(generation_.last_request.has_prompt());
}

TEST_F(CommandsTest, GenerateJsonIsOneLineAMessage) {
  EXPECT_EQ(Run({"generate", "--json", "x"}), kSucceeded);
  std::istringstream lines(out_.str());
  std::vector<std::string> messages;
  for (std::string line; std::getline(lines, line);) messages.push_back(line);
  ASSERT_EQ(messages.size(), 3u);
  EXPECT_THAT(messages[0], HasSubstr(R"("text":"Once ")"));
  EXPECT_THAT(messages[2], HasSubstr(R"("finish_reason":"FINISH_REASON_EOS")"));
  EXPECT_EQ(err_.str(), "");
}

TEST_F(CommandsTest, GenerateWithoutStream) {
  EXPECT_EQ(Run({"generate", "--no-stream", "x"}), kSucceeded);
  EXPECT_EQ(out_.str(), "Once upon\n");
  out_.str("");
  EXPECT_EQ(Run({"generate", "--no-stream", "--json", "x"}), kSucceeded);
  EXPECT_THAT(out_.str(), StartsWith("{"));
  EXPECT_THAT(out_.str(), HasSubstr(R"("generated_tokens":2)"));
}

TEST_F(CommandsTest, GenerateShowsWhatWasWrong) {
  EXPECT_EQ(Run({"generate", "--request-id", "r-7", "bad"}), kFailed);
  EXPECT_EQ(out_.str(), "");
  EXPECT_EQ(err_.str(),
            "error: INVALID_ARGUMENT: 1 field is wrong\n"
            "  field max_tokens: is 0, at least 1\n"
            "  request id r-7\n");
}

TEST_F(CommandsTest, GenerateGivesUpAtTheDeadline) {
  EXPECT_EQ(Run({"generate", "--deadline", "100ms", "wait"}), kFailed);
  EXPECT_THAT(err_.str(), HasSubstr("error: DEADLINE_EXCEEDED"));
}

TEST_F(CommandsTest, UsageErrorsSendNothing) {
  for (const std::vector<std::string>& arguments :
       std::vector<std::vector<std::string>>{{"generate"},
                                             {"generate", "--max-tokens", "-1", "x"},
                                             {"generate", "--max-tokens", "4294967296", "x"},
                                             {"generate", "--temperature", "warm", "x"},
                                             {"generate", "--deadline", "soon", "x"},
                                             {"generate", "--deadline", "-3s", "x"},
                                             {"generate", "--token-ids", "2,x"},
                                             {"generate", "--token-ids", "-1"},
                                             {"generate", "--logit-bias", "7", "x"},
                                             {"generate", "--logit-bias", "x=1", "x"},
                                             {"generate", "--tls-cert", "/etc/hostname", "x"},
                                             {"generate", "--tls-ca", "/no/such/file", "x"},
                                             {"chat", "--template", "none"},
                                             {"tokenize", "--token-ids", "x"},
                                             {"generate", "--unknown", "x"},
                                             {"generate", "two", "prompts"},
                                             {"info", "surplus"}}) {
    err_.str("");
    EXPECT_EQ(Run(arguments), kUsage) << ::testing::PrintToString(arguments);
    EXPECT_NE(err_.str(), "") << ::testing::PrintToString(arguments);
  }
  EXPECT_EQ(generation_.last_request.ByteSizeLong(), 0u);
}

TEST_F(CommandsTest, InfoShowsServerAndModels) {
  EXPECT_EQ(Run({"info"}), kSucceeded);
  EXPECT_THAT(out_.str(), HasSubstr("firesteel-server 9.9"));
  EXPECT_THAT(out_.str(), HasSubstr("model first"));
  EXPECT_THAT(out_.str(), HasSubstr("model second"));
}

TEST_F(CommandsTest, InfoOfOneModelAsJson) {
  EXPECT_EQ(Run({"info", "--model", "second", "--json"}), kSucceeded);
  EXPECT_THAT(out_.str(), StartsWith(R"({"server":{"version":"9.9")"));
  EXPECT_THAT(out_.str(), HasSubstr(R"("models":[{"name":"second")"));
  EXPECT_EQ(Run({"info", "--model", "third"}), kFailed);
  EXPECT_THAT(err_.str(), HasSubstr("NOT_FOUND"));
}

TEST_F(CommandsTest, HealthIsTheExitStatus) {
  EXPECT_EQ(Run({"health"}), kSucceeded);
  EXPECT_EQ(out_.str(), "SERVING\n");
  EXPECT_EQ(Run({"health", "--tls"}), kFailed) << "of a server that speaks clear text";
  server_->GetHealthCheckService()->SetServingStatus("m", false);
  out_.str("");
  EXPECT_EQ(Run({"health", "--service", "m"}), kFailed);
  EXPECT_EQ(out_.str(), "NOT_SERVING\n");
  EXPECT_EQ(Run({"health", "--service", "unheard-of"}), kFailed);
  EXPECT_THAT(err_.str(), HasSubstr("NOT_FOUND"));
}

TEST_F(CommandsTest, HealthAsksAgainAndAgain) {
  EXPECT_EQ(Run({"health", "--repeat", "20", "--interval", "0"}), kSucceeded) << err_.str();
  EXPECT_THAT(out_.str(), StartsWith("SERVING; 20 answers, 0 of them not SERVING; p50 "));
  server_->GetHealthCheckService()->SetServingStatus("m", false);
  out_.str("");
  EXPECT_EQ(Run({"health", "--service", "m", "--repeat", "3", "--interval", "1ms", "--json"}),
            kFailed);
  EXPECT_THAT(out_.str(), HasSubstr(R"("not_serving":3,"status":"NOT_SERVING"})"));
  EXPECT_EQ(Run({"health", "--repeat", "0"}), kUsage);
  EXPECT_EQ(Run({"health", "--interval", "soon"}), kUsage);
}

// A container's health check against a server that demands certificates.
TEST(HealthTest, ShowsItsCertificateWhereOneIsDemanded) {
  const std::string dir = testing::TempDir() + "/health_test_" + std::to_string(getpid());
  ASSERT_EQ(
      std::system((FIRESTEEL_SOURCE_DIR "/server/foreign/make_certificates.sh " + dir).c_str()), 0)
      << "is openssl there?";
  grpc::SslServerCredentialsOptions options(
      GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  options.pem_root_certs = ContentOf(dir + "/ca.pem");
  options.pem_key_cert_pairs = {{ContentOf(dir + "/server.key"), ContentOf(dir + "/server.pem")}};
  FakeModels models;
  const TestServer server({&models}, grpc::SslServerCredentials(options));
  TestConsole console;
  Interrupt interrupt;
  const auto run = [&](std::vector<std::string> arguments) {
    return console.Run(server, std::move(arguments),
                       [&](CLI::App& app, Console& terminal, int& exit_status) {
                         AddHealthCommand(app, terminal, &interrupt, exit_status);
                       });
  };
  const std::vector<std::string> certificate = {"--tls-cert", dir + "/client.pem", "--tls-key",
                                                dir + "/client.key"};
  std::vector<std::string> whole = {"health", "--tls-ca", dir + "/ca.pem"};
  whole.insert(whole.end(), certificate.begin(), certificate.end());
  EXPECT_EQ(run(whole), kSucceeded) << console.err.str();
  EXPECT_EQ(console.out.str(), "SERVING\n");
  EXPECT_EQ(run({"health"}), kFailed) << "in clear text";
  EXPECT_EQ(run({"health", "--tls-ca", dir + "/ca.pem"}), kFailed) << "without a certificate";
  std::vector<std::string> distrustful = {"health", "--tls"};
  distrustful.insert(distrustful.end(), certificate.begin(), certificate.end());
  EXPECT_EQ(run(distrustful), kFailed) << "an authority that the system does not know";
  EXPECT_EQ(console.out.str(), "SERVING\n");
  std::filesystem::remove_all(dir);
}

TEST_F(CommandsTest, NoServerIsUnavailable) {
  server_->Shutdown();
  EXPECT_EQ(Run({"health"}), kFailed);
  EXPECT_THAT(err_.str(), HasSubstr("error: UNAVAILABLE"));
}

TEST_F(CommandsTest, CtrlCCancelsTheCall) {
  ObservedOutput output;
  static_cast<std::ostream&>(out_).rdbuf(&output);
  std::thread user([&output] {
    output.flushed.WaitForNotification();  // the client has shown something
    kill(getpid(), SIGINT);
  });
  EXPECT_EQ(Run({"generate", "wait"}), kInterrupted);
  user.join();
  generation_.saw_cancel.WaitForNotification();  // the server stops working, too
  EXPECT_EQ(output.str(), "Once \n");            // what came is shown and its line ended
  EXPECT_EQ(err_.str(), "interrupted: the request was cancelled\n");
}

}  // namespace
}  // namespace firesteel::client
