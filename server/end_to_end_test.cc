// The real program with the bundled model, as its users start it.

#include <fcntl.h>
#include <gmock/gmock.h>
#include <grpcpp/create_channel.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <future>
#include <optional>
#include <set>
#include <sstream>
#include <thread>
#include <vector>

#include "firesteel/v1/generation_service.grpc.pb.h"
#include "firesteel/v1/model_service.grpc.pb.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "runtime/checkpoint/packed_file.h"
#include "runtime/tokenizer/tokenizer.h"
#include "server/test_client.h"
#include "testdata/goldens.h"

namespace firesteel::server {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

std::string ModelPath() { return std::string(FIRESTEEL_SOURCE_DIR) + "/models/spark-stories"; }

std::string ReadFile(const std::string& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

/// The program as a child process; its standard output and error go to files.
class Program {
 public:
  explicit Program(std::vector<std::string> arguments,
                   const std::vector<std::string>& environment = {}) {
    static int count = 0;
    const std::string base =
        testing::TempDir() + "/e2e_" + std::to_string(getpid()) + "_" + std::to_string(count++);
    out_path_ = base + ".out";
    err_path_ = base + ".err";
    std::ofstream(out_path_).flush();
    arguments.insert(arguments.begin(), FIRESTEEL_SERVER_PROGRAM);
    // A SIGHUP that comes before the program takes signals waits for it.
    sigset_t hangup, before;
    sigemptyset(&hangup);
    sigaddset(&hangup, SIGHUP);
    pthread_sigmask(SIG_BLOCK, &hangup, &before);
    pid_ = fork();
    if (pid_ == 0) Exec(arguments, environment);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  ~Program() {
    if (running_) {
      kill(pid_, SIGKILL);
      Wait();
    }
    std::filesystem::remove(out_path_);
    std::filesystem::remove(err_path_);
  }

  /// Its exit status; 128 + the signal that ended it.
  int Wait() {
    int status = 0;
    waitpid(pid_, &status, 0);
    running_ = false;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }

  void Signal(int number) const { kill(pid_, number); }
  std::string out() const { return ReadFile(out_path_); }
  std::string err() const { return ReadFile(err_path_); }

  /// Waits for the line "listening on A, metrics on B". False where the program ended first.
  bool WaitUntilServing() {
    while (true) {
      const std::string text = out();
      const size_t comma = text.find(", metrics on ");
      const size_t end = text.find('\n');
      if (text.rfind("listening on ", 0) == 0 && end != std::string::npos) {
        address_ = text.substr(13, comma - 13);
        metrics_address_ = text.substr(comma + 13, end - comma - 13);
        return true;
      }
      int status = 0;
      if (waitpid(pid_, &status, WNOHANG) == pid_) {
        running_ = false;
        ADD_FAILURE() << "the server ended: " << err();
        return false;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
  }

  const std::string& address() const { return address_; }
  std::string Scrape() const { return HttpGet(metrics_address_, "/metrics"); }

 private:
  // In the child, up to execv: nothing but system calls.
  void Exec(const std::vector<std::string>& arguments,
            const std::vector<std::string>& environment) const {
    for (const std::string& variable : environment) putenv(const_cast<char*>(variable.c_str()));
    dup2(open(out_path_.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600), STDOUT_FILENO);
    dup2(open(err_path_.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600), STDERR_FILENO);
    std::vector<char*> argv;
    for (const std::string& argument : arguments)
      argv.push_back(const_cast<char*>(argument.c_str()));
    argv.push_back(nullptr);
    execv(argv[0], argv.data());
    _exit(127);
  }

  pid_t pid_ = -1;
  bool running_ = true;
  std::string out_path_;
  std::string err_path_;
  std::string address_;
  std::string metrics_address_;
};

std::vector<std::string> ServerArguments(std::vector<std::string> more = {}) {
  std::vector<std::string> all = {
      "--model",           ModelPath(),   "--address",        "127.0.0.1:0",
      "--metrics-address", "127.0.0.1:0", "--kv-cache-bytes", "256MiB"};
  all.insert(all.end(), more.begin(), more.end());
  return all;
}

v1::GenerateRequest Story(uint32_t max_tokens) {
  v1::GenerateRequest request;
  request.set_prompt("Once upon a time");
  request.set_max_tokens(max_tokens);
  request.mutable_sampling()->set_temperature(0);
  request.mutable_stopping()->set_ignore_eos(true);
  request.mutable_output()->set_return_token_ids(true);
  return request;
}

struct Streamed {
  std::string text;
  std::vector<uint32_t> token_ids;
  v1::GenerateStreamResponse last;
  grpc::Status status;
};

Streamed Stream(v1::GenerationService::Stub* stub, const v1::GenerateRequest& request) {
  grpc::ClientContext context;
  const auto reader = stub->GenerateStream(&context, request);
  Streamed out;
  v1::GenerateStreamResponse message;
  while (reader->Read(&message)) {
    out.text += message.sequence().text();
    for (const uint32_t id : message.sequence().token_ids()) out.token_ids.push_back(id);
    out.last = message;
  }
  out.status = reader->Finish();
  return out;
}

class EndToEndTest : public testing::Test {
 protected:
  void Start(const std::vector<std::string>& more = {}) {
    server_.emplace(ServerArguments(more));
    ASSERT_TRUE(server_->WaitUntilServing());
    channel_ = grpc::CreateChannel(server_->address(), grpc::InsecureChannelCredentials());
    generation_ = v1::GenerationService::NewStub(channel_);
  }

  double Metric(const std::string& name) const {
    const auto value = MetricValue(server_->Scrape(), name);
    EXPECT_TRUE(value.has_value()) << name;
    return value.value_or(-1);
  }

  std::optional<Program> server_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::GenerationService::Stub> generation_;
};

constexpr char kModel[] = "{model_name=\"spark-stories\"}";

TEST_F(EndToEndTest, StreamsAStoryAndCountsIt) {
  Start();
  EXPECT_EQ(
      Metric("firesteel_requests_total{finish_reason=\"length\",model_name=\"spark-stories\"}"), 0)
      << "the warm-up is not counted";
  const Streamed story = Stream(generation_.get(), Story(40));
  ASSERT_TRUE(story.status.ok()) << story.status.error_message();
  EXPECT_EQ(story.token_ids.size(), 40u);
  EXPECT_GT(story.text.size(), 60u);
  EXPECT_EQ(story.last.sequence().finish_reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(story.last.usage().generated_tokens(), 40u);
  EXPECT_GT(story.last.timings().total().nanos() + story.last.timings().total().seconds(), 0);
  EXPECT_GT(story.last.sparsity().ffn_active_fraction(), 0.04);
  EXPECT_LT(story.last.sparsity().ffn_active_fraction(), 0.12);

  v1::GenerateResponse whole;
  grpc::ClientContext context;
  ASSERT_TRUE(generation_->Generate(&context, Story(40), &whole).ok());
  EXPECT_EQ(whole.sequences(0).text(), story.text) << "streamed or not, the same";

  const std::string scrape = server_->Scrape();
  const auto value = [&scrape](const std::string& series) {
    return MetricValue(scrape, series).value_or(-1);
  };
  EXPECT_EQ(
      value("firesteel_requests_total{finish_reason=\"length\",model_name=\"spark-stories\"}"), 2);
  EXPECT_EQ(value(std::string("firesteel_generation_tokens_total") + kModel), 80);
  EXPECT_EQ(value(std::string("firesteel_prompt_tokens_total") + kModel),
            2 * story.last.usage().prompt_tokens());
  EXPECT_EQ(value(std::string("firesteel_time_to_first_token_seconds_count") + kModel), 2);
  EXPECT_EQ(value(std::string("firesteel_inter_token_latency_seconds_count") + kModel), 78);
  EXPECT_EQ(value(std::string("firesteel_kv_cache_usage_ratio") + kModel), 0);
  for (int layer = 0; layer < 7; ++layer) {
    const std::string labels =
        "{layer=\"" + std::to_string(layer) + "\",model_name=\"spark-stories\"}";
    const double mean = value("firesteel_ffn_active_fraction_sum" + labels) /
                        value("firesteel_ffn_active_fraction_count" + labels);
    EXPECT_GT(mean, 0.03) << layer;
    EXPECT_LT(mean, 0.12) << layer;
    EXPECT_GT(value("firesteel_ffn_topk_ratio" + labels), 0.4) << layer;
  }
}

// The held-out text as prompts: /metrics says of each layer what the reference program says.
TEST_F(EndToEndTest, SparsityAsServedIsTheReferences) {
  const std::string source = FIRESTEEL_SOURCE_DIR;
  const auto expected = LoadValidStats(source + "/testdata/valid_stats.json", "spark-stories");
  ASSERT_TRUE(expected.ok()) << expected.status();
  Start();
  std::ifstream file(source + "/tools/reference/valid_ids.txt");
  double positions = 0;
  for (std::string line; std::getline(file, line);) {
    v1::GenerateRequest request = Story(1);  // one token: only the prompt is computed
    std::stringstream ids(line);
    // The two longest fill the context of 1,024 and give up their last token for the one to
    // generate.
    for (uint32_t id; request.token_ids().ids_size() < 1023 && ids >> id;) {
      request.mutable_token_ids()->add_ids(id);
    }
    positions += request.token_ids().ids_size();
    ASSERT_TRUE(Stream(generation_.get(), request).status.ok());
  }
  const std::string scrape = server_->Scrape();
  const auto mean = [&](const std::string& family, size_t layer) {
    const std::string labels =
        "{layer=\"" + std::to_string(layer) + "\",model_name=\"spark-stories\"}";
    EXPECT_EQ(MetricValue(scrape, family + "_count" + labels), positions);
    return MetricValue(scrape, family + "_sum" + labels).value_or(-1) / positions;
  };
  for (size_t layer = 0; layer < expected->ffn_active_fraction.size(); ++layer) {
    EXPECT_NEAR(mean("firesteel_ffn_active_fraction", layer), expected->ffn_active_fraction[layer],
                0.001)
        << "layer " << layer;
    EXPECT_NEAR(
        mean("firesteel_attention_attended_positions", layer) / expected->attended_positions[layer],
        1, 0.01)
        << "layer " << layer;
  }
}

TEST_F(EndToEndTest, ThirtyTwoStreamsCompleteAndAgree) {
  Start();
  const Streamed alone = Stream(generation_.get(), Story(48));
  ASSERT_TRUE(alone.status.ok());
  std::vector<std::future<Streamed>> calls;
  for (int i = 0; i < 32; ++i) {
    calls.push_back(
        std::async(std::launch::async, [this] { return Stream(generation_.get(), Story(48)); }));
  }
  for (auto& call : calls) {
    const Streamed story = call.get();
    EXPECT_TRUE(story.status.ok()) << story.status.error_message();
    EXPECT_EQ(story.token_ids, alone.token_ids) << "batch-mates change nothing";
  }
  EXPECT_EQ(Metric(std::string("firesteel_kv_cache_usage_ratio") + kModel), 0);
  EXPECT_EQ(Metric(std::string("firesteel_requests_running") + kModel), 0);
}

// Each of 16 streams needs the same memory; with half of them gone, half of it is free.
TEST_F(EndToEndTest, KilledStreamsFreeTheirMemory) {
  Start({"--max-batch-size", "16"});
  struct Call {
    grpc::ClientContext context;
    std::unique_ptr<grpc::ClientReader<v1::GenerateStreamResponse>> reader;
  };
  std::vector<std::unique_ptr<Call>> calls;
  v1::GenerateStreamResponse message;
  for (int i = 0; i < 16; ++i) {
    calls.push_back(std::make_unique<Call>());
    calls.back()->reader = generation_->GenerateStream(&calls.back()->context, Story(400));
  }
  for (auto& call : calls) ASSERT_TRUE(call->reader->Read(&message));
  const double usage = Metric(std::string("firesteel_kv_cache_usage_ratio") + kModel);
  ASSERT_EQ(Metric(std::string("firesteel_requests_running") + kModel), 16);
  ASSERT_GT(usage, 0);

  for (int i = 0; i < 8; ++i) calls[static_cast<size_t>(i)]->context.TryCancel();
  const std::string cancelled =
      "firesteel_requests_total{finish_reason=\"cancelled\",model_name=\"spark-stories\"}";
  while (Metric(cancelled) < 8) std::this_thread::yield();
  const std::string scrape = server_->Scrape();
  ASSERT_EQ(MetricValue(scrape, std::string("firesteel_requests_running") + kModel), 8)
      << "the others must still run for this to say something";
  EXPECT_NEAR(*MetricValue(scrape, std::string("firesteel_kv_cache_usage_ratio") + kModel),
              usage / 2, 1e-9);
  for (size_t i = 8; i < 16; ++i) {
    while (calls[i]->reader->Read(&message)) continue;
    EXPECT_TRUE(calls[i]->reader->Finish().ok());
    EXPECT_EQ(message.usage().generated_tokens(), 400u);
  }
  EXPECT_EQ(Metric(std::string("firesteel_kv_cache_usage_ratio") + kModel), 0);
}

TEST_F(EndToEndTest, TerminationLetsRunningStreamsFinish) {
  Start();
  grpc::ClientContext context;
  const auto reader = generation_->GenerateStream(&context, Story(300));
  v1::GenerateStreamResponse message;
  ASSERT_TRUE(reader->Read(&message));
  server_->Signal(SIGTERM);
  while (reader->Read(&message)) continue;
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(message.usage().generated_tokens(), 300u);
  EXPECT_EQ(server_->Wait(), 0);
  EXPECT_THAT(server_->err(), AllOf(HasSubstr("draining"), HasSubstr("all_finished=true")));
}

TEST_F(EndToEndTest, DrainTimeIsKept) {
  Start({"--drain-seconds", "0"});
  grpc::ClientContext context;
  const auto reader = generation_->GenerateStream(&context, Story(900));
  v1::GenerateStreamResponse message;
  ASSERT_TRUE(reader->Read(&message));
  server_->Signal(SIGINT);
  while (reader->Read(&message)) continue;
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(server_->Wait(), 0);
}

TEST_F(EndToEndTest, SecondInterruptEndsAtOnce) {
  Start({"--drain-seconds", "3600", "--max-batch-size", "1"});
  // More work than a test would wait for.
  std::vector<std::future<Streamed>> calls;
  for (int i = 0; i < 64; ++i) {
    calls.push_back(
        std::async(std::launch::async, [this] { return Stream(generation_.get(), Story(900)); }));
  }
  while (Metric(std::string("firesteel_requests_waiting") + kModel) < 60) std::this_thread::yield();
  server_->Signal(SIGINT);
  while (server_->err().find("draining") == std::string::npos) std::this_thread::yield();
  server_->Signal(SIGINT);
  EXPECT_EQ(server_->Wait(), 128 + SIGINT);
  for (auto& call : calls) EXPECT_FALSE(call.get().status.ok());
}

TEST_F(EndToEndTest, PromptTextStaysOutOfTheLog) {
  Start({"--log-level", "trace", "--log-format", "json"});
  v1::GenerateRequest request = Story(2);
  request.set_prompt("Xylophone secret");
  grpc::ClientContext context;
  context.AddMetadata("x-request-id", "find-me");
  context.AddMetadata("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
  v1::GenerateResponse response;
  ASSERT_TRUE(generation_->Generate(&context, request, &response).ok());
  server_->Signal(SIGTERM);
  EXPECT_EQ(server_->Wait(), 0);
  const std::string log = server_->err();
  EXPECT_THAT(log, AllOf(HasSubstr("\"request_id\":\"find-me\""),
                         HasSubstr("\"traceparent\":\"00-0af7651916cd43dd8448eb211c80319c"),
                         HasSubstr("\"generated_tokens\":2")));
  EXPECT_THAT(log, Not(HasSubstr("Xylophone")));
}

TEST(ProgramTest, SeveralModelsShareAServer) {
  Program server(ServerArguments({"--model", "twin=" + ModelPath(), "--compute", "f32"}));
  ASSERT_TRUE(server.WaitUntilServing());
  const auto channel = grpc::CreateChannel(server.address(), grpc::InsecureChannelCredentials());
  const auto stub = v1::GenerationService::NewStub(channel);
  v1::GenerateRequest request = Story(5);
  request.set_model("twin");
  grpc::ClientContext context;
  v1::GenerateResponse response;
  ASSERT_TRUE(stub->Generate(&context, request, &response).ok());
  EXPECT_EQ(response.model(), "twin");
  const std::string scrape = server.Scrape();
  EXPECT_EQ(MetricValue(scrape, "firesteel_generation_tokens_total{model_name=\"twin\"}"), 5);
  EXPECT_EQ(MetricValue(scrape, "firesteel_generation_tokens_total{model_name=\"spark-stories\"}"),
            0);
}

TEST(ProgramTest, ModelsHaveLimitsOfTheirOwn) {
  const std::string config =
      testing::TempDir() + "/e2e_" + std::to_string(getpid()) + "_limits.yaml";
  std::ofstream(config) << "max-batch-size: 8\nkv-cache-bytes: 64MiB\nmodel:\n"
                        << "  - name: narrow\n    path: " << ModelPath()
                        << "\n    max-batch-size: 2\n    max-prompt-tokens: 5\n"
                        << "    max-queue-requests: 3\n    kv-cache-bytes: 32MiB\n"
                        << "  - wide=" << ModelPath() << "\n";
  Program server(
      {"--config", config, "--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0"});
  ASSERT_TRUE(server.WaitUntilServing());
  const auto channel = grpc::CreateChannel(server.address(), grpc::InsecureChannelCredentials());
  const auto models = v1::ModelService::NewStub(channel);
  const auto limits_of = [&models](const std::string& name) {
    grpc::ClientContext context;
    v1::GetModelRequest request;
    request.set_model(name);
    v1::GetModelResponse response;
    EXPECT_TRUE(models->GetModel(&context, request, &response).ok());
    return response.model().limits();
  };
  const v1::ModelLimits wide = limits_of("wide");
  EXPECT_EQ(wide.max_batch_size(), 8u);
  EXPECT_EQ(wide.max_prompt_tokens(), 1023u);
  const auto expect_narrow = [&] {
    const v1::ModelLimits narrow = limits_of("narrow");
    EXPECT_EQ(narrow.max_batch_size(), 2u);
    EXPECT_EQ(narrow.max_prompt_tokens(), 5u);
    EXPECT_EQ(narrow.max_queue_requests(), 3u);
    EXPECT_EQ(narrow.kv_cache_capacity_tokens(), wide.kv_cache_capacity_tokens() / 2);
  };
  expect_narrow();
  const auto generation = v1::GenerationService::NewStub(channel);
  v1::GenerateRequest request = Story(2);
  request.set_prompt("Once upon a time there was a little robot");
  for (const char* model : {"wide", "narrow"}) {
    request.set_model(model);
    grpc::ClientContext context;
    v1::GenerateResponse response;
    EXPECT_EQ(generation->Generate(&context, request, &response).ok(), model[0] == 'w');
  }
  // A name keeps its limits when its model is loaded anew.
  server.Signal(SIGHUP);
  const auto replaced = [&server] {
    const std::string log = server.err();
    const size_t first = log.find("model replaced");
    return first != std::string::npos && log.find("model replaced", first + 1) != std::string::npos;
  };
  while (!replaced()) std::this_thread::sleep_for(std::chrono::milliseconds(10));
  expect_narrow();
  std::filesystem::remove(config);
}

// Who renews certificates or models does not know how far a server has come: the wish is kept.
TEST(ProgramTest, ReloadIsKeptUntilTheServerServes) {
  Program server(ServerArguments());
  server.Signal(SIGHUP);
  ASSERT_TRUE(server.WaitUntilServing());
  while (server.err().find("model replaced") == std::string::npos) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  server.Signal(SIGTERM);
  EXPECT_EQ(server.Wait(), 0) << server.err();
}

// The same model out of its folder and out of a packed file, copied and mapped: one answer.
TEST(ProgramTest, PackedFilesAreServed) {
  const std::string path =
      testing::TempDir() + "/e2e_" + std::to_string(getpid()) + "_story.firesteel";
  {
    auto source = OpenFolderSource(ModelPath(), WeightFormat::kI8, 2);
    ASSERT_TRUE(source.ok()) << source.status();
    const auto tokenizer = Tokenizer::ReadModel(ModelPath());
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    ASSERT_TRUE(WritePackedFile(source->get(), {.tokenizer = *tokenizer}, path).ok());
  }
  std::set<std::string> texts;
  for (const std::vector<std::string>& arguments :
       {std::vector<std::string>{"--model", "m=" + ModelPath(), "--weights", "int8"},
        {"--model", "m=" + path},
        {"--model", "m=" + path, "--weights-memory", "shared"}}) {
    std::vector<std::string> all = {"--address",   "127.0.0.1:0",      "--metrics-address",
                                    "127.0.0.1:0", "--kv-cache-bytes", "64MiB"};
    all.insert(all.end(), arguments.begin(), arguments.end());
    Program server(all);
    ASSERT_TRUE(server.WaitUntilServing());
    const auto channel = grpc::CreateChannel(server.address(), grpc::InsecureChannelCredentials());
    const auto stub = v1::GenerationService::NewStub(channel);
    const Streamed story = Stream(stub.get(), Story(40));
    ASSERT_TRUE(story.status.ok()) << story.status.error_message();
    texts.insert(story.text);
  }
  EXPECT_EQ(texts.size(), 1u);
  EXPECT_GT(texts.begin()->size(), 60u);

  Program other({"--check", "--model", path, "--weights", "bf16"});
  EXPECT_EQ(other.Wait(), 2);
  EXPECT_THAT(other.err(), HasSubstr("holds int8 weights, not bf16"));
  Program named({"--check", "--model", path});
  EXPECT_EQ(named.Wait(), 0);
  EXPECT_THAT(named.out(), HasSubstr("_story generated")) << "the name has no ending";
  std::filesystem::remove(path);
}

TEST(ProgramTest, CheckLoadsAndGenerates) {
  Program program({"--check", "--model", ModelPath()});
  EXPECT_EQ(program.Wait(), 0);
  EXPECT_THAT(program.out(), HasSubstr("ok: model spark-stories"));
}

TEST(ProgramTest, PrintConfigNeedsNoModel) {
  Program program({"--print-config", "--threads", "7"});
  EXPECT_EQ(program.Wait(), 0);
  EXPECT_THAT(program.out(), HasSubstr("threads: 7"));
}

struct BadStart {
  const char* name;
  std::vector<std::string> arguments;
  std::vector<std::string> environment;
  std::vector<std::string> says;
};

void PrintTo(const BadStart& row, std::ostream* out) { *out << row.name; }

class BadStartTest : public testing::TestWithParam<BadStart> {};

TEST_P(BadStartTest, SaysOneLineAndExitsWithTwo) {
  Program program(GetParam().arguments, GetParam().environment);
  EXPECT_EQ(program.Wait(), 2);
  EXPECT_EQ(program.out(), "");
  const std::string err = program.err();
  const std::string last = err.substr(err.rfind('\n', err.size() - 2) + 1);
  EXPECT_EQ(last.rfind("firesteel-server: ", 0), 0u) << err;
  for (const std::string& part : GetParam().says) EXPECT_THAT(last, HasSubstr(part));
}

INSTANTIATE_TEST_SUITE_P(
    All, BadStartTest,
    testing::Values(
        BadStart{"UnknownOption", {"--frobnicate"}, {}, {"--frobnicate"}},
        BadStart{"NoModel", {}, {}, {"--model"}},
        BadStart{"BadValue", {"--model", "/m", "--threads", "x"}, {}, {"--threads", "'x'"}},
        BadStart{
            "BadVariable", {"--model", "/m"}, {"FIRESTEEL_WARMUP=perhaps"}, {"FIRESTEEL_WARMUP"}},
        BadStart{"BadSimdTarget",
                 {"--model", ModelPath()},
                 {"FIRESTEEL_SIMD_TARGET=ABACUS"},
                 {"FIRESTEEL_SIMD_TARGET", "ABACUS"}},
        BadStart{
            "MissingFolder", {"--model", "/no/such/folder"}, {}, {"--model", "/no/such/folder"}},
        BadStart{"AddressNotOurs",
                 {"--model", ModelPath(), "--address", "192.0.2.1:1", "--metrics-address",
                  "127.0.0.1:0"},
                 {},
                 {"--address", "192.0.2.1:1"}},
        BadStart{"MetricsAddressNotOurs",
                 {"--model", ModelPath(), "--address", "127.0.0.1:0", "--metrics-address",
                  "192.0.2.1:1"},
                 {},
                 {"--metrics-address", "192.0.2.1:1"}},
        BadStart{"KvCacheTooSmall",
                 {"--model", ModelPath(), "--kv-cache-bytes", "1"},
                 {},
                 {"kv-cache-bytes"}}),
    [](const auto& row) { return row.param.name; });

}  // namespace
}  // namespace firesteel::server
