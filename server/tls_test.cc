// TLS as served: who gets in, and what happens when the files are renewed. Needs the openssl
// program.

#include "server/tls.h"

#include <gmock/gmock.h>
#include <grpcpp/security/credentials.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "server/server_fixture.h"

namespace firesteel::server {
namespace {

using ::testing::HasSubstr;

std::string ReadAllOf(const std::string& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

class TlsTest : public ServerTest {
 protected:
  TlsTest() : dir_(testing::TempDir() + "/tls_test_" + std::to_string(getpid())) {
    Make(dir_);
    files_ = {.cert = dir_ + "/server.pem", .key = dir_ + "/server.key", .client_ca = ""};
  }
  ~TlsTest() override { std::filesystem::remove_all(dir_); }

  static void Make(const std::string& dir) {
    const std::string command =
        std::string(FIRESTEEL_SOURCE_DIR) + "/server/foreign/make_certificates.sh " + dir;
    ASSERT_EQ(std::system(command.c_str()), 0) << "is openssl there?";
  }

  void RestartWithTls() {
    ServerConfig config;
    config.tls = files_;
    config.credentials_reload = absl::ZeroDuration();
    Restart(config);
  }

  /// A connection of its own that trusts `ca`, with a client certificate where `client` names one.
  grpc::Status Call(const std::string& ca, const std::string& client = "") {
    grpc::SslCredentialsOptions options;
    options.pem_root_certs = ReadAllOf(ca);
    if (!client.empty()) {
      options.pem_private_key = ReadAllOf(client + ".key");
      options.pem_cert_chain = ReadAllOf(client + ".pem");
    }
    grpc::ChannelArguments arguments;
    arguments.SetInt("test.connection", ++connections_);
    const auto channel =
        grpc::CreateCustomChannel(server_->address(), grpc::SslCredentials(options), arguments);
    grpc::ClientContext context;
    v1::GetServerInfoResponse response;
    return v1::ModelService::NewStub(channel)->GetServerInfo(&context, {}, &response);
  }

  const std::string dir_;
  TlsFiles files_;
  int connections_ = 0;
};

TEST_F(TlsTest, ClientsThatTrustTheAuthorityGetIn) {
  RestartWithTls();
  EXPECT_TRUE(Call(dir_ + "/ca.pem").ok());
  Make(dir_ + "/other");
  EXPECT_EQ(Call(dir_ + "/other/ca.pem").error_code(), grpc::StatusCode::UNAVAILABLE);
  grpc::ClientContext context;
  v1::GetServerInfoResponse response;
  EXPECT_EQ(models_->GetServerInfo(&context, {}, &response).error_code(),
            grpc::StatusCode::UNAVAILABLE)
      << "plain text";
}

// Docker's health check and Kubernetes' probes have no certificates.
TEST_F(TlsTest, ProbesNeedNoneAndSeeTheSame) {
  files_.client_ca = dir_ + "/ca.pem";
  ServerConfig config;
  config.tls = files_;
  config.health_address = "127.0.0.1:0";
  Restart(config);
  const auto channel =
      grpc::CreateChannel(server_->health_address(), grpc::InsecureChannelCredentials());
  health_ = grpc::health::v1::Health::NewStub(channel);
  EXPECT_EQ(StatusOfName(""), HealthResponse::SERVING);
  EXPECT_EQ(StatusOfName("beta"), HealthResponse::SERVING);
  beta_->SetMakingProgress(false);
  server_->health().Check();
  EXPECT_EQ(StatusOfName(""), HealthResponse::NOT_SERVING);
  EXPECT_EQ(StatusOfName("alpha"), HealthResponse::SERVING);

  grpc::ClientContext context;
  v1::GenerateResponse response;
  EXPECT_EQ(v1::GenerationService::NewStub(channel)
                ->Generate(&context, Request(), &response)
                .error_code(),
            grpc::StatusCode::UNIMPLEMENTED)
      << "nothing else is served in clear text";
}

TEST_F(TlsTest, ClientCertificatesAreDemandedAndName) {
  files_.client_ca = dir_ + "/ca.pem";
  RestartWithTls();
  EXPECT_EQ(Call(dir_ + "/ca.pem").error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_TRUE(Call(dir_ + "/ca.pem", dir_ + "/client").ok());
  Make(dir_ + "/other");
  EXPECT_EQ(Call(dir_ + "/ca.pem", dir_ + "/other/client").error_code(),
            grpc::StatusCode::UNAVAILABLE);

  alpha_->AnswerAll(1);
  grpc::SslCredentialsOptions options = {ReadAllOf(dir_ + "/ca.pem"),
                                         ReadAllOf(dir_ + "/client.key"),
                                         ReadAllOf(dir_ + "/client.pem")};
  const auto stub = v1::GenerationService::NewStub(
      grpc::CreateChannel(server_->address(), grpc::SslCredentials(options)));
  grpc::ClientContext context;
  v1::GenerateResponse response;
  ASSERT_TRUE(stub->Generate(&context, Request(), &response).ok());
  EXPECT_EQ(alpha_->request(alpha_->WaitForRequest(0)).client, "test-client");
}

TEST_F(TlsTest, RenewedCertificateIsTakenAndBrokenOneIsNot) {
  RestartWithTls();
  Make(dir_ + "/new");
  const auto put = [this](const std::string& name) {
    std::filesystem::copy_file(dir_ + "/new/" + name, dir_ + "/" + name,
                               std::filesystem::copy_options::overwrite_existing);
  };
  put("server.pem");  // the key is not there yet: they don't fit
  EXPECT_TRUE(Call(dir_ + "/ca.pem").ok()) << "the old one goes on";
  put("server.key");
  EXPECT_TRUE(Call(dir_ + "/new/ca.pem").ok());
  EXPECT_FALSE(Call(dir_ + "/ca.pem").ok());
  std::ofstream(dir_ + "/server.pem", std::ios::trunc) << "nonsense";
  EXPECT_TRUE(Call(dir_ + "/new/ca.pem").ok());
  std::filesystem::remove(dir_ + "/server.key");
  EXPECT_TRUE(Call(dir_ + "/new/ca.pem").ok());
}

// Connections that stand are not touched: neither what streams on them, nor what begins later.
TEST_F(TlsTest, RenewalLeavesConnectionsAlone) {
  files_.client_ca = dir_ + "/ca.pem";
  RestartWithTls();
  const grpc::SslCredentialsOptions options = {ReadAllOf(dir_ + "/ca.pem"),
                                               ReadAllOf(dir_ + "/client.key"),
                                               ReadAllOf(dir_ + "/client.pem")};
  const auto channel = grpc::CreateChannel(server_->address(), grpc::SslCredentials(options));
  const auto stub = v1::GenerationService::NewStub(channel);
  grpc::ClientContext context;
  const auto reader = stub->GenerateStream(&context, Request());
  const auto handle = alpha_->WaitForRequest(0);

  // Everything is new: certificate, key, and who may connect.
  Make(dir_ + "/new");
  for (const char* name : {"server.key", "server.pem", "ca.pem"}) {
    std::filesystem::copy_file(dir_ + "/new/" + name, dir_ + "/" + name,
                               std::filesystem::copy_options::overwrite_existing);
  }
  EXPECT_TRUE(Call(dir_ + "/new/ca.pem", dir_ + "/new/client").ok());
  EXPECT_EQ(Call(dir_ + "/new/ca.pem", dir_ + "/client").error_code(),
            grpc::StatusCode::UNAVAILABLE)
      << "the old authority is no longer trusted";

  EXPECT_EQ(channel->GetState(false), GRPC_CHANNEL_READY);
  alpha_->Emit(handle, "still here");
  alpha_->Finish(handle, FakeResult(FinishReason::kEos));
  const Streamed all = ReadAll(reader.get());
  EXPECT_TRUE(all.status.ok()) << all.status.error_message();
  EXPECT_EQ(all.text(), "still here");
  alpha_->AnswerAll(1);
  grpc::ClientContext later;
  v1::GenerateResponse response;
  EXPECT_TRUE(stub->Generate(&later, Request(), &response).ok());
}

TEST_F(TlsTest, UnusableFilesAreNamedByOption) {
  const auto error = [](const TlsFiles& files) {
    return std::string(MakeServerCredentials(files, absl::Seconds(1)).status().message());
  };
  TlsFiles files = files_;
  files.cert = "/no/such/file";
  EXPECT_EQ(error(files), "--tls-cert /no/such/file: cannot be read");
  files = files_;
  std::swap(files.cert, files.key);
  EXPECT_THAT(error(files), HasSubstr("holds no PEM certificate"));
  files = files_;
  files.key = dir_ + "/client.key";
  EXPECT_THAT(error(files), HasSubstr("--tls-key " + files.key + ": does not fit"));
  files.key = dir_;
  EXPECT_THAT(error(files), HasSubstr("--tls-key " + dir_ + ": cannot be read"));
  files = files_;
  files.client_ca = dir_ + "/server.key";
  EXPECT_THAT(error(files), HasSubstr("--tls-client-ca"));
}

}  // namespace
}  // namespace firesteel::server
