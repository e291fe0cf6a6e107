// Models that come and go while a server serves, over real gRPC.

#include "server/model_manager.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <future>
#include <memory>

#include "firesteel/v1/admin_service.grpc.pb.h"
#include "google/rpc/error_details.pb.h"
#include "server/generation.h"
#include "server/request_translation.h"
#include "server/server_fixture.h"

namespace firesteel::server {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class NobodyListens final : public OutputListener {
 public:
  void OnOutput() override {}
};

class ModelManagerTest : public ServerTest {
 protected:
  ModelManagerTest() {
    ServerConfig config;
    config.admin_address = "127.0.0.1:0";
    config.drain = drain_;
    config.load_model = load_model_ = [this](const ModelSpec& spec) -> absl::StatusOr<ServedModel> {
      if (spec.path == "/broken") return absl::InvalidArgumentError("config.json: is damaged");
      if (spec.path == "/slow") {
        if (!loading_.HasBeenNotified()) loading_.Notify();
        release_.WaitForNotification();
      }
      ++loads_;
      ServedModel model;
      model.name = spec.name;
      model.path = spec.path;
      auto engine = std::make_unique<FakeEngine>();
      engine->AnswerAll(answers_);
      loaded_ = engine.get();
      model.engine = std::move(engine);
      model.max_prompt_tokens = 127;
      return model;
    };
    Restart(config);
    admin_ = v1::AdminService::NewStub(
        grpc::CreateChannel(server_->admin_address(), grpc::InsecureChannelCredentials()));
  }

  grpc::Status Load(const std::string& name, const std::string& path) {
    grpc::ClientContext context;
    v1::LoadModelRequest request;
    request.set_name(name);
    request.set_path(path);
    return admin_->LoadModel(&context, request, &load_);
  }

  grpc::Status Unload(const std::string& name) {
    grpc::ClientContext context;
    v1::UnloadModelRequest request;
    request.set_name(name);
    v1::UnloadModelResponse response;
    return admin_->UnloadModel(&context, request, &response);
  }

  // Returns in the midst of the load of a model gamma, which goes on when it is released.
  void BeginToLoad(ModelManager* manager, std::future<absl::Status>* done) {
    const auto promise = std::make_shared<std::promise<absl::Status>>();
    *done = promise->get_future();
    ASSERT_TRUE(manager
                    ->Load({.name = "gamma", .path = "/slow"},
                           [promise](const auto& model) { promise->set_value(model.status()); })
                    .ok());
    loading_.WaitForNotification();
  }

  std::vector<std::string> Names() {
    grpc::ClientContext context;
    v1::GetServerInfoResponse info;
    EXPECT_TRUE(models_->GetServerInfo(&context, {}, &info).ok());
    return {info.models().begin(), info.models().end()};
  }

  const absl::Duration drain_ = absl::Seconds(60);
  std::atomic<int> loads_ = 0;
  absl::Notification loading_, release_;  // of the one model at "/slow"
  uint32_t answers_ = 0;                  // of engines to be loaded, as AnswerAll has it
  LoadFunction load_model_;
  FakeEngine* loaded_ = nullptr;  // by the last load
  v1::LoadModelResponse load_;
  std::unique_ptr<v1::AdminService::Stub> admin_;
};

TEST_F(ModelManagerTest, LoadedModelServes) {
  ASSERT_TRUE(Load("gamma", "/somewhere").ok());
  EXPECT_EQ(load_.model().name(), "gamma");
  EXPECT_FALSE(load_.model().is_default());
  EXPECT_THAT(Names(), ElementsAre("alpha", "beta", "gamma"));
  EXPECT_EQ(StatusOfName("gamma"), HealthResponse::SERVING);
  loaded_->AnswerAll(1);
  v1::GenerateRequest request = Request();
  request.set_model("gamma");
  v1::GenerateResponse response;
  EXPECT_TRUE(Generate(request, &response).ok());
}

TEST_F(ModelManagerTest, ReplacedModelFinishesWhatItHasBegun) {
  grpc::ClientContext context;
  const auto reader = generation_->GenerateStream(&context, Request());
  const auto handle = alpha_->WaitForRequest(0);
  ASSERT_TRUE(Load("alpha", "/new").ok());
  EXPECT_THAT(Names(), ElementsAre("alpha", "beta")) << "in its place";
  loaded_->AnswerAll(2);
  v1::GenerateResponse response;
  ASSERT_TRUE(Generate(Request(), &response).ok()) << "by the new one";
  EXPECT_EQ(loaded_->num_admitted(), 1u);
  alpha_->Emit(handle, "to the end");
  alpha_->Finish(handle, FakeResult(FinishReason::kEos));
  const Streamed all = ReadAll(reader.get());
  EXPECT_TRUE(all.status.ok()) << all.status.error_message();
  EXPECT_EQ(all.text(), "to the end");
}

TEST_F(ModelManagerTest, BrokenModelLeavesTheOldOne) {
  const grpc::Status status = Load("alpha", "/broken");
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(status.error_message(), HasSubstr("config.json: is damaged"));
  alpha_->AnswerAll(1);
  v1::GenerateResponse response;
  EXPECT_TRUE(Generate(Request(), &response).ok());
}

TEST_F(ModelManagerTest, UnloadedModelIsGone) {
  ASSERT_TRUE(Unload("alpha").ok());
  EXPECT_THAT(Names(), ElementsAre("beta")) << "which is the default one now";
  v1::GenerateRequest request = Request();
  request.set_model("alpha");
  v1::GenerateResponse response;
  EXPECT_EQ(Generate(request, &response).error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(StatusOfName("alpha"), HealthResponse::NOT_SERVING);
  EXPECT_EQ(Unload("alpha").error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(Unload("").error_code(), grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(ModelManagerTest, WrongSpecsAreViolations) {
  const grpc::Status status = Load("a b", "");
  const auto bad = FindDetail<google::rpc::BadRequest>(status);
  ASSERT_TRUE(bad.has_value());
  EXPECT_EQ(bad->field_violations(0).field(), "name");
  EXPECT_EQ(bad->field_violations(1).field(), "path");
}

TEST_F(ModelManagerTest, ReloadTakesTheOldPath) {
  ASSERT_TRUE(Load("gamma", "/somewhere").ok());
  FakeEngine* const before = loaded_;
  grpc::ClientContext context;
  v1::ReloadModelRequest request;
  request.set_name("gamma");
  v1::ReloadModelResponse response;
  ASSERT_TRUE(admin_->ReloadModel(&context, request, &response).ok());
  EXPECT_EQ(response.model().name(), "gamma");
  EXPECT_NE(loaded_, before);
}

TEST_F(ModelManagerTest, AdminsHaveTheirOwnAddress) {
  const auto stranger = v1::AdminService::NewStub(channel_);
  grpc::ClientContext context;
  v1::UnloadModelRequest request;
  request.set_name("alpha");
  v1::UnloadModelResponse response;
  EXPECT_EQ(stranger->UnloadModel(&context, request, &response).error_code(),
            grpc::StatusCode::UNIMPLEMENTED);
  // And nothing else is served there.
  grpc::ClientContext other_context;
  v1::GenerateResponse generated;
  const grpc::Status status =
      v1::GenerationService::NewStub(
          grpc::CreateChannel(server_->admin_address(), grpc::InsecureChannelCredentials()))
          ->Generate(&other_context, Request(), &generated);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNIMPLEMENTED);
  EXPECT_EQ(FindDetail<google::rpc::ErrorInfo>(status)->reason(), "METHOD_NOT_FOUND");
}

// Two admins, each of whom takes out another of two models: one of them is refused.
TEST_F(ModelManagerTest, LastModelStaysWhoeverComesFirst) {
  for (int i = 0; i < 50; ++i) {
    auto other = std::async(std::launch::async, [this] { return Unload("beta"); });
    const bool alpha = Unload("alpha").ok(), beta = other.get().ok();
    EXPECT_NE(alpha, beta);
    ASSERT_EQ(Names().size(), 1u);
    ASSERT_TRUE(Load(alpha ? "alpha" : "beta", "/new").ok());
  }
}

TEST_F(ModelManagerTest, ModelUnloadedWhileItIsLoadedAgainStaysAway) {
  ServedModel gamma;
  gamma.name = "gamma";
  gamma.path = "/slow";
  gamma.engine = std::make_unique<FakeEngine>();
  ModelRegistry registry;
  registry.Put(std::move(gamma));
  ServedModel delta;
  delta.name = "delta";
  delta.engine = std::make_unique<FakeEngine>();
  registry.Put(std::move(delta));
  ModelManager manager(&registry, load_model_, [] {}, drain_);
  std::promise<absl::Status> done;
  ASSERT_TRUE(
      manager.Reload("gamma", [&](const auto& model) { done.set_value(model.status()); }).ok());
  loading_.WaitForNotification();
  ASSERT_TRUE(manager.Unload("gamma").ok());
  release_.Notify();
  EXPECT_EQ(done.get_future().get().code(), absl::StatusCode::kNotFound);
  EXPECT_FALSE(registry.Find("gamma").ok());
}

// However often it is asked for meanwhile, once.
TEST_F(ModelManagerTest, ReloadDuringALoadComesAfterIt) {
  ModelRegistry registry;
  std::atomic<int> changes = 0;
  absl::Notification twice;
  const auto changed = [&] {
    if (++changes == 2) twice.Notify();
  };
  ModelManager manager(&registry, load_model_, changed, drain_);
  std::future<absl::Status> done;
  ASSERT_NO_FATAL_FAILURE(BeginToLoad(&manager, &done));
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(manager.ReloadAll().ok());
  EXPECT_EQ(loads_, 0);
  release_.Notify();
  EXPECT_TRUE(done.get().ok());
  twice.WaitForNotification();
  EXPECT_EQ(loads_, 2);
}

TEST_F(ModelManagerTest, ModelThatIsLoadedDuringAStopIsNotPutIn) {
  ModelRegistry registry;
  ModelManager manager(&registry, load_model_, [] {}, drain_);
  std::future<absl::Status> done;
  ASSERT_NO_FATAL_FAILURE(BeginToLoad(&manager, &done));
  manager.Close();
  EXPECT_EQ(manager.Unload("gamma").code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(manager.ReloadAll().code(), absl::StatusCode::kUnavailable);
  release_.Notify();
  EXPECT_EQ(done.get().code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(registry.models().empty());
}

// A request that has found its model, and finds it draining: what has come in its place takes it.
TEST_F(ModelManagerTest, RequestGoesToWhatIsInTheModelsPlace) {
  for (const bool replaced : {true, false}) {
    ModelRegistry registry;
    const auto put = [&registry](const std::string& name) {
      ServedModel model;
      model.name = name;
      auto engine = std::make_unique<FakeEngine>();
      FakeEngine* const out = engine.get();
      model.engine = std::move(engine);
      model.max_prompt_tokens = 127;
      const ModelRegistry::Model old = registry.Put(std::move(model));
      if (old != nullptr) old->engine->BeginDrain();
      return out;
    };
    put("gamma");
    put("delta");
    ModelRegistry::Model kept;  // as by a manager, until nobody uses it
    FakeEngine* successor = nullptr;
    const auto changed_on_the_way = [&](const ServedModel& model) {
      if (kept == nullptr) {
        kept = *registry.Find("gamma");
        if (replaced) {
          successor = put("gamma");
        } else {
          EXPECT_TRUE(registry.Remove("gamma").ok());
          kept->engine->BeginDrain();
        }
      }
      return TranslateRequest(Request(), model);
    };
    const auto generation = Generation::Start(registry, "gamma", changed_on_the_way, CallMetadata(),
                                              Caller(), std::make_shared<NobodyListens>());
    if (replaced) {
      EXPECT_TRUE(generation.ok()) << generation.status();
      EXPECT_EQ(successor->num_admitted(), 1u);
    } else {
      EXPECT_EQ(generation.status().code(), absl::StatusCode::kNotFound);
    }
  }
}

// What a replaced model still runs when its time is up is cancelled.
TEST_F(ModelManagerTest, ReplacedModelIsGivenItsTime) {
  ServerConfig config;
  config.admin_address = "127.0.0.1:0";
  config.drain = absl::ZeroDuration();
  config.load_model = load_model_;
  Restart(config);
  admin_ = v1::AdminService::NewStub(
      grpc::CreateChannel(server_->admin_address(), grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  const auto reader = generation_->GenerateStream(&context, Request());
  alpha_->WaitForRequest(0);
  ASSERT_TRUE(Load("alpha", "/new").ok());
  const Streamed all = ReadAll(reader.get());
  EXPECT_EQ(all.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(FindDetail<google::rpc::ErrorInfo>(all.status)->reason(), "SERVER_DRAINING");
  EXPECT_EQ(StatusOfName("alpha"), HealthResponse::SERVING);
}

// Requests go on while models are replaced under them: none fails.
TEST_F(ModelManagerTest, ReloadUnderLoadFailsNothing) {
  beta_->AnswerAll(3);
  answers_ = 3;
  std::atomic<bool> stop = false;
  std::vector<std::future<int>> clients;
  for (int i = 0; i < 4; ++i) {
    clients.push_back(std::async(std::launch::async, [&] {
      int failed = 0;
      while (!stop) {
        v1::GenerateRequest request = Request();
        request.set_model("beta");
        v1::GenerateResponse response;
        failed += Generate(request, &response).ok() ? 0 : 1;
      }
      return failed;
    }));
  }
  for (int i = 0; i < 20; ++i) ASSERT_TRUE(Load("beta", "/new").ok());
  stop = true;
  for (auto& client : clients) EXPECT_EQ(client.get(), 0);
}

}  // namespace
}  // namespace firesteel::server
