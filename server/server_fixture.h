// A server on the loopback with two scripted engines behind it, and a client of each service.

#ifndef FIRESTEEL_SERVER_SERVER_FIXTURE_H_
#define FIRESTEEL_SERVER_SERVER_FIXTURE_H_

#include <grpcpp/create_channel.h>
#include <grpcpp/generic/generic_stub.h>
#include <gtest/gtest.h>
#include <spdlog/sinks/null_sink.h>
#include <unistd.h>

#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/synchronization/notification.h"
#include "firesteel/v1/generation_service.grpc.pb.h"
#include "firesteel/v1/model_service.grpc.pb.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "server/answer_size.h"
#include "server/fake_engine.h"
#include "server/logging.h"
#include "server/server.h"
#include "server/test_client.h"

namespace firesteel::server {

using HealthResponse = grpc::health::v1::HealthCheckResponse;

/// The models are "alpha", the default one, and "beta".
class ServerTest : public testing::Test {
 protected:
  ServerTest() {
    SetUpLogging("off", LogFormat::kText, std::make_shared<spdlog::sinks::null_sink_mt>());
    Start(ServerConfig{.simd_target = "TEST", .threads = 3});
  }

  void Start(const ServerConfig& config) {
    auto metrics = std::make_unique<ServerMetrics>();
    auto models = std::make_unique<ModelRegistry>();
    for (const char* name : {"alpha", "beta"}) {
      auto observer = metrics->AddModel(name, FakeModelConfig());
      observer->StartCounting();
      ServedModel model;
      model.name = name;
      auto engine = std::make_unique<FakeEngine>(observer.get());
      (std::string(name) == "alpha" ? alpha_ : beta_) = engine.get();
      model.observer = std::move(observer);
      model.engine = std::move(engine);
      model.max_prompt_tokens = 127;
      model.max_message_bytes = config.max_message_bytes;
      model.max_answer_bytes = max_answer_bytes_;
      model.longest_token_text = LongestTokenText(FakeTokenizer(), FakeModelConfig().vocab_size);
      models->Put(std::move(model));
    }
    auto server = Server::Start(config, std::move(metrics), std::move(models));
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    channel_ = grpc::CreateChannel(server_->address(), grpc::InsecureChannelCredentials());
    generation_ = v1::GenerationService::NewStub(channel_);
    models_ = v1::ModelService::NewStub(channel_);
    health_ = grpc::health::v1::Health::NewStub(channel_);
  }

  /// Serves anew, so.
  void Restart(const ServerConfig& config) {
    server_.reset();
    Start(config);
  }

  /// The path of a file with this content.
  static std::string WriteFile(const std::string& name, const std::string& content) {
    const std::string path =
        testing::TempDir() + "/server_test_" + std::to_string(getpid()) + "_" + name;
    std::ofstream(path, std::ios::trunc) << content;
    return path;
  }

  static v1::GenerateRequest Request(const std::string& prompt = "hey") {
    v1::GenerateRequest request;
    request.set_prompt(prompt);
    return request;
  }

  grpc::Status Generate(const v1::GenerateRequest& request, v1::GenerateResponse* response) {
    grpc::ClientContext context;
    return generation_->Generate(&context, request, response);
  }

  grpc::Status HealthOf(const std::string& name, HealthResponse* response) {
    grpc::ClientContext context;
    grpc::health::v1::HealthCheckRequest request;
    request.set_service(name);
    return health_->Check(&context, request, response);
  }

  HealthResponse::ServingStatus StatusOfName(const std::string& name) {
    HealthResponse response;
    const grpc::Status status = HealthOf(name, &response);
    EXPECT_TRUE(status.ok()) << name << ": " << status.error_message();
    return response.status();
  }

  /// Sends these bytes as the request of a unary call.
  grpc::Status CallRaw(const std::string& method, const std::string& bytes,
                       std::string* answer = nullptr) {
    grpc::GenericStub stub(channel_);
    grpc::ClientContext context;
    const grpc::Slice slice(bytes);
    const grpc::ByteBuffer request(&slice, 1);
    grpc::ByteBuffer response;
    grpc::Status status;
    absl::Notification done;
    stub.UnaryCall(&context, method, grpc::StubOptions(), &request, &response, [&](grpc::Status s) {
      status = std::move(s);
      done.Notify();
    });
    done.WaitForNotification();
    grpc::Slice whole;
    if (answer != nullptr && response.Valid() && response.DumpToSingleSlice(&whole).ok()) {
      answer->assign(reinterpret_cast<const char*>(whole.begin()), whole.size());
    }
    return status;
  }

  std::string Scrape() const { return HttpGet(server_->metrics_address(), "/metrics"); }

  double Metric(const std::string& series) const {
    const auto value = MetricValue(Scrape(), series);
    EXPECT_TRUE(value.has_value()) << series;
    return value.value_or(-1);
  }

  /// The code under which the first call of a method that failed is counted. Waits for its end.
  std::string CodeOfFirst(const std::string& method, const std::string& service) const {
    while (true) {
      const std::string scrape = Scrape();
      for (const char* code :
           {"Canceled", "DeadlineExceeded", "InvalidArgument", "Unimplemented"}) {
        const std::string series = std::string("grpc_server_handled_total{grpc_code=\"") + code +
                                   "\",grpc_method=\"" + method + "\",grpc_service=\"" + service +
                                   "\"}";
        if (MetricValue(scrape, series).has_value()) return code;
      }
      std::this_thread::yield();
    }
  }

  uint64_t max_answer_bytes_ = uint64_t{4} << 20;  // of models from the next Start on
  std::unique_ptr<Server> server_;
  FakeEngine* alpha_ = nullptr;  // the default model
  FakeEngine* beta_ = nullptr;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::GenerationService::Stub> generation_;
  std::unique_ptr<v1::ModelService::Stub> models_;
  std::unique_ptr<grpc::health::v1::Health::Stub> health_;
};

/// A client whose flow-control window does not grow: what it does not read stays with the server.
inline std::shared_ptr<grpc::Channel> NarrowChannel(const std::string& address) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  arguments.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 1 << 16);
  return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
}

/// Every message of a stream, and its end.
struct Streamed {
  std::vector<v1::GenerateStreamResponse> messages;
  grpc::Status status;

  std::string text() const {
    std::string all;
    for (const auto& message : messages) all += message.sequence().text();
    return all;
  }
};

inline Streamed ReadAll(grpc::ClientReader<v1::GenerateStreamResponse>* reader) {
  Streamed out;
  v1::GenerateStreamResponse message;
  while (reader->Read(&message)) out.messages.push_back(message);
  out.status = reader->Finish();
  return out;
}

inline std::string FirstValue(const std::multimap<grpc::string_ref, grpc::string_ref>& metadata,
                              const std::string& key) {
  const auto entry = metadata.find(key);
  return entry == metadata.end() ? "" : std::string(entry->second.data(), entry->second.size());
}

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_SERVER_FIXTURE_H_
