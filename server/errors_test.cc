// Every row of docs/errors.md, over real gRPC: that it comes, with that code and those details, and
// that no reason is missing there.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <functional>
#include <future>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/cord.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "firesteel/v1/admin_service.grpc.pb.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "inference/grpc_service.grpc.pb.h"
#include "server/access_control.h"
#include "server/server_fixture.h"
#include "server/status.h"

namespace firesteel::server {
namespace {

using ::testing::Contains;
using ::testing::Key;

/// A row of the table: the client's own library may end a call of a `local` one.
struct Row {
  std::string code;
  std::set<std::string> details;
  bool local = false;
};

std::string Trim(absl::string_view text) { return std::string(absl::StripAsciiWhitespace(text)); }

/// By reason.
std::map<std::string, Row> DocumentedRows() {
  std::map<std::string, Row> rows;
  std::ifstream file(FIRESTEEL_SOURCE_DIR "/docs/errors.md");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("| `", 0) != 0) continue;
    const std::vector<std::string> cells = absl::StrSplit(line, '|');
    if (cells.size() < 6) continue;
    const std::string name = Trim(cells[1]);
    if (std::islower(static_cast<unsigned char>(name[1]))) continue;  // the table of metadata
    Row row;
    row.code = Trim(cells[2]);
    for (const absl::string_view detail :
         absl::StrSplit(cells[3], absl::ByAnyChar(" ,"), absl::SkipEmpty())) {
      if (detail == "local") {
        row.local = true;
      } else {
        row.details.insert(std::string(detail));
      }
    }
    EXPECT_TRUE(rows.emplace(name.substr(1, name.size() - 2), row).second) << name;
  }
  return rows;
}

class ErrorsTest : public ServerTest, public testing::WithParamInterface<ErrorReason> {
 public:
  using Trigger = std::function<grpc::Status(ErrorsTest*)>;

  grpc::Status AnswerTo(const v1::GenerateRequest& request) {
    v1::GenerateResponse response;
    return Generate(request, &response);
  }

  grpc::Status WithRefusal(absl::Status refusal) {
    alpha_->RefuseNext(std::move(refusal));
    return AnswerTo(Request());
  }

  /// Serves anew with one client, whose token is "token" and whose entry has these further lines.
  void RestartWithClient(const std::string& lines, ServerConfig config = {}) {
    config.auth_token_file = WriteFile(
        "tokens.yaml",
        "- name: someone\n  sha256: " + absl::BytesToHexString(HashOf("token")) + "\n" + lines);
    Restart(config);
  }

  static std::string HashOf(const std::string& token) {
    const auto digest = Sha256(token);
    return std::string(digest.begin(), digest.end());
  }

  static std::unique_ptr<grpc::ClientContext> WithToken(const std::string& token) {
    auto context = std::make_unique<grpc::ClientContext>();
    context->AddMetadata("authorization", "Bearer " + token);
    return context;
  }

  grpc::Status AnswerWithToken(const std::string& token) {
    v1::GenerateResponse response;
    return generation_->Generate(WithToken(token).get(), Request(), &response);
  }

  /// Serves anew with AdminService, which loads by this function.
  std::unique_ptr<v1::AdminService::Stub> RestartWithAdmin(LoadFunction load = nullptr) {
    ServerConfig config;
    config.admin_address = "127.0.0.1:0";
    config.load_model = std::move(load);
    Restart(config);
    return v1::AdminService::NewStub(
        grpc::CreateChannel(server_->admin_address(), grpc::InsecureChannelCredentials()));
  }

  static grpc::Status Load(v1::AdminService::Stub* admin) {
    grpc::ClientContext context;
    v1::LoadModelRequest request;
    request.set_name("gamma");
    request.set_path("/somewhere");
    v1::LoadModelResponse response;
    return admin->LoadModel(&context, request, &response);
  }

  static grpc::Status Unload(v1::AdminService::Stub* admin, const std::string& name,
                             grpc::ClientContext* context) {
    v1::UnloadModelRequest request;
    request.set_name(name);
    v1::UnloadModelResponse response;
    return admin->UnloadModel(context, request, &response);
  }

  static const std::map<std::string, Trigger>& Triggers();
};

const std::map<std::string, ErrorsTest::Trigger>& ErrorsTest::Triggers() {
  static const auto* const triggers = new std::map<std::string, Trigger>{
      {"INVALID_REQUEST",
       [](ErrorsTest* t) {
         v1::GenerateRequest request = Request();
         request.set_max_tokens(0);
         return t->AnswerTo(request);
       }},
      {"MALFORMED_REQUEST",
       [](ErrorsTest* t) {
         return t->CallRaw("/firesteel.v1.GenerationService/Generate", "\xff\xff");
       }},
      {"MODEL_NOT_FOUND",
       [](ErrorsTest* t) {
         v1::GenerateRequest request = Request();
         request.set_model("gamma");
         return t->AnswerTo(request);
       }},
      {"OVERLOADED",
       [](ErrorsTest* t) {
         return t->WithRefusal(
             WithRetryDelay(absl::ResourceExhaustedError("queue: full"), absl::Seconds(2)));
       }},
      {"EXCEEDS_CAPACITY",
       [](ErrorsTest* t) {
         return t->WithRefusal(absl::ResourceExhaustedError("kv_cache: too small"));
       }},
      {"TOO_MANY_REQUESTS",
       [](ErrorsTest* t) {
         t->RestartWithClient("  max_concurrent_requests: 1\n");
         const auto context = WithToken("token");
         const auto reader = t->generation_->GenerateStream(context.get(), Request());
         t->alpha_->WaitForRequest(0);
         const grpc::Status status = t->AnswerWithToken("token");
         context->TryCancel();
         ReadAll(reader.get());
         return status;
       }},
      {"TOKENS_USED_UP",
       [](ErrorsTest* t) {
         t->RestartWithClient("  tokens_per_minute: 1\n");
         t->alpha_->AnswerAll(5);
         EXPECT_TRUE(t->AnswerWithToken("token").ok()) << "an account may be overdrawn once";
         return t->AnswerWithToken("token");
       }},
      {"TOKEN_MISSING",
       [](ErrorsTest* t) {
         t->RestartWithClient("");
         return t->AnswerTo(Request());
       }},
      {"TOKEN_UNKNOWN",
       [](ErrorsTest* t) {
         t->RestartWithClient("");
         return t->AnswerWithToken("tokem");
       }},
      {"ADMIN_ONLY",
       [](ErrorsTest* t) {
         ServerConfig config;
         config.admin_address = "127.0.0.1:0";
         t->RestartWithClient("  admin: false\n", config);
         const auto admin = v1::AdminService::NewStub(
             grpc::CreateChannel(t->server_->admin_address(), grpc::InsecureChannelCredentials()));
         return Unload(admin.get(), "beta", WithToken("token").get());
       }},
      {"MODEL_NOT_LOADABLE",
       [](ErrorsTest* t) {
         const auto admin = t->RestartWithAdmin(
             [](const ModelSpec&) { return absl::InvalidArgumentError("no such folder"); });
         return Load(admin.get());
       }},
      {"LAST_MODEL",
       [](ErrorsTest* t) {
         const auto admin = t->RestartWithAdmin();
         grpc::ClientContext first, second;
         EXPECT_TRUE(Unload(admin.get(), "beta", &first).ok());
         return Unload(admin.get(), "alpha", &second);
       }},
      {"LOAD_IN_PROGRESS",
       [](ErrorsTest* t) {
         absl::Notification begun, go_on;
         const auto admin = t->RestartWithAdmin([&](const ModelSpec&) {
           begun.Notify();
           go_on.WaitForNotification();
           return absl::InvalidArgumentError("after all not");
         });
         auto other = std::async(std::launch::async, [&admin] { return Load(admin.get()); });
         begun.WaitForNotification();
         const grpc::Status status = Load(admin.get());
         go_on.Notify();
         EXPECT_FALSE(other.get().ok());
         return status;
       }},
      {"READER_STALLED",
       [](ErrorsTest* t) {
         ServerConfig config;
         config.reader_stall.write = absl::Milliseconds(50);
         t->Restart(config);
         const auto stub = v1::GenerationService::NewStub(NarrowChannel(t->server_->address()));
         grpc::ClientContext context;
         const auto reader = stub->GenerateStream(&context, Request());
         const auto handle = t->alpha_->WaitForRequest(0);
         t->alpha_->Emit(handle, std::string(200'000, 'x'));
         t->alpha_->Emit(handle, std::string(200'000, 'y'));
         t->alpha_->WaitForCancel(handle);  // nothing was read: the request leaves the batch
         return ReadAll(reader.get()).status;
       }},
      {"SERVER_DRAINING",
       [](ErrorsTest* t) {
         t->alpha_->BeginDrain();
         return t->AnswerTo(Request());
       }},
      {"METHOD_NOT_FOUND",
       [](ErrorsTest* t) { return t->CallRaw("/firesteel.v1.GenerationService/Sing", ""); }},
      {"REQUEST_CANCELLED",
       [](ErrorsTest* t) {
         grpc::ClientContext context;
         const auto reader = t->generation_->GenerateStream(&context, Request());
         t->alpha_->WaitForRequest(0);
         context.TryCancel();
         return ReadAll(reader.get()).status;
       }},
      {"DEADLINE_EXCEEDED",
       [](ErrorsTest* t) {
         grpc::ClientContext context;
         context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(50));
         return ReadAll(t->generation_->GenerateStream(&context, Request()).get()).status;
       }},
      {"INTERNAL_ERROR",
       [](ErrorsTest* t) { return t->WithRefusal(absl::InternalError("numbers went bad")); }},
  };
  return *triggers;
}

TEST_P(ErrorsTest, ComesAsDocumented) {
  const ErrorReason& reason = GetParam();
  const auto rows = DocumentedRows();
  ASSERT_THAT(rows, Contains(Key(reason.name))) << "docs/errors.md has no row for it";
  const Row& row = rows.at(reason.name);
  EXPECT_EQ(row.code, absl::StatusCodeToString(reason.code));
  ASSERT_THAT(Triggers(), Contains(Key(reason.name)));

  const grpc::Status status = Triggers().at(reason.name)(this);
  EXPECT_EQ(static_cast<int>(status.error_code()), static_cast<int>(reason.code));
  EXPECT_NE(status.error_message(), "");
  google::rpc::Status wire;
  ASSERT_TRUE(wire.ParseFromString(status.error_details()));
  if (row.local && wire.details().empty()) return;
  const auto info = FindDetail<google::rpc::ErrorInfo>(status);
  ASSERT_TRUE(info.has_value());
  EXPECT_EQ(info->reason(), reason.name);
  EXPECT_EQ(info->domain(), kErrorDomain);
  std::set<std::string> details;
  for (const auto& any : wire.details()) {
    const std::string type = any.type_url().substr(any.type_url().rfind('.') + 1);
    if (type != "ErrorInfo") details.insert(type);
  }
  EXPECT_EQ(details, row.details);
}

INSTANTIATE_TEST_SUITE_P(All, ErrorsTest, testing::ValuesIn(kErrorReasons),
                         [](const auto& row) { return std::string(row.param.name); });

TEST(ErrorDocumentationTest, NamesNoReasonThatTheServerLacks) {
  for (const auto& entry : DocumentedRows()) {
    const std::string& name = entry.first;
    EXPECT_TRUE(std::any_of(std::begin(kErrorReasons), std::end(kErrorReasons),
                            [&name](const ErrorReason& reason) { return name == reason.name; }))
        << name;
  }
}

// --- The service config that the document publishes, as it stands there ---

std::string PublishedServiceConfig() {
  std::ifstream file(FIRESTEEL_SOURCE_DIR "/docs/errors.md");
  std::string config;
  bool inside = false;
  for (std::string line; std::getline(file, line);) {
    if (inside && line == "```") break;
    if (inside) config += line + "\n";
    inside = inside || line == "```json";
  }
  return config;
}

class ServiceConfigTest : public ServerTest {
 protected:
  /// A client with that config and a connection of its own.
  ServiceConfigTest() {
    grpc::ChannelArguments arguments;
    arguments.SetServiceConfigJSON(PublishedServiceConfig());
    arguments.SetInt("test.own_connection", 1);
    channel_ = grpc::CreateCustomChannel(server_->address(), grpc::InsecureChannelCredentials(),
                                         arguments);
    generation_ = v1::GenerationService::NewStub(channel_);
    alpha_->AnswerAll(1);
  }

  grpc::Status AnswerAfter(absl::Status refusal) {
    alpha_->RefuseNext(std::move(refusal));
    v1::GenerateResponse response;
    return Generate(Request(), &response);
  }
};

TEST_F(ServiceConfigTest, RetriesWhatWaitingCures) {
  const absl::Status full =
      WithRetryDelay(absl::ResourceExhaustedError("queue: full"), absl::Milliseconds(1));
  EXPECT_TRUE(AnswerAfter(full).ok());
  EXPECT_TRUE(AnswerAfter(absl::UnavailableError("draining")).ok());
  EXPECT_EQ(AnswerAfter(absl::ResourceExhaustedError("kv_cache: too small")).error_code(),
            grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(AnswerAfter(absl::InternalError("broken")).error_code(), grpc::StatusCode::INTERNAL);
  EXPECT_EQ(alpha_->num_admitted(), 2u);

  const auto kserve = inference::GRPCInferenceService::NewStub(channel_);
  inference::ModelInferRequest request;
  auto* const input = request.add_inputs();
  input->set_name("text_input");
  input->set_datatype("BYTES");
  input->add_shape(1);
  input->mutable_contents()->add_bytes_contents("hey");
  alpha_->RefuseNext(full);
  grpc::ClientContext context;
  inference::ModelInferResponse response;
  EXPECT_TRUE(kserve->ModelInfer(&context, request, &response).ok());
}

TEST_F(ServiceConfigTest, SendsNothingToWhoIsNotServing) {
  v1::GenerateResponse response;
  ASSERT_TRUE(Generate(Request(), &response).ok());
  alpha_->SetMakingProgress(false);
  server_->health().Check();
  // The channel's own Watch sees it by and by.
  while (channel_->GetState(false) == GRPC_CHANNEL_READY) {
    channel_->WaitForStateChange(GRPC_CHANNEL_READY, std::chrono::system_clock::time_point::max());
  }
  auto call = std::async(std::launch::async, [&] { return Generate(Request(), &response); });
  EXPECT_EQ(call.wait_for(std::chrono::milliseconds(50)), std::future_status::timeout);
  EXPECT_EQ(alpha_->num_admitted(), 1u);
  alpha_->SetMakingProgress(true);
  server_->health().Check();
  EXPECT_TRUE(call.get().ok()) << "it waits for a server that serves";
  EXPECT_EQ(alpha_->num_admitted(), 2u);
}

}  // namespace
}  // namespace firesteel::server
