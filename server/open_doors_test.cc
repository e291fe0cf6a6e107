#include "server/open_doors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace firesteel::server {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

/// Each warning as "option: its word in capitals".
std::vector<std::string> Warnings(const ServerOptions& options) {
  std::vector<std::string> out;
  for (const OpenDoor& door : OpenDoors(options)) {
    const bool anybody = door.warning.find("ANYBODY") != std::string::npos;
    EXPECT_NE(anybody, door.warning.find("CLEAR TEXT") != std::string::npos) << door.warning;
    EXPECT_EQ(door.address, door.option == "address" ? options.address : options.admin_address);
    out.push_back(door.option + (anybody ? ": ANYBODY" : ": CLEAR TEXT"));
  }
  return out;
}

ServerOptions At(const std::string& address) {
  ServerOptions options;
  options.address = address;
  return options;
}

TEST(OpenDoorsTest, TheDefaultHasNone) { EXPECT_THAT(Warnings(ServerOptions()), IsEmpty()); }

TEST(OpenDoorsTest, ThisMachineMayComeIn) {
  for (const char* address : {"127.0.0.1:1", "127.0.0.2:0", "[::1]:50051", "localhost:50051"}) {
    EXPECT_THAT(Warnings(At(address)), IsEmpty()) << address;
  }
}

TEST(OpenDoorsTest, OthersAreWarnedOf) {
  for (const char* address : {"0.0.0.0:50051", "[::]:0", "192.0.2.1:50051", "[2001:db8::1]:50051",
                              "server.example:50051", "127.example.com:50051"}) {
    EXPECT_THAT(Warnings(At(address)), ElementsAre("address: ANYBODY", "address: CLEAR TEXT"))
        << address;
  }
}

TEST(OpenDoorsTest, CredentialsAndEncryptionCloseThem) {
  ServerOptions tokens = At("0.0.0.0:50051");
  tokens.auth_token_file = "tokens.yaml";
  EXPECT_THAT(Warnings(tokens), ElementsAre("address: CLEAR TEXT"));
  ServerOptions tls = At("0.0.0.0:50051");
  tls.tls_cert = "chain.pem";
  EXPECT_THAT(Warnings(tls), ElementsAre("address: ANYBODY"));
  tls.tls_client_ca = "clients.pem";
  EXPECT_THAT(Warnings(tls), IsEmpty());
  tokens.tls_cert = "chain.pem";
  EXPECT_THAT(Warnings(tokens), IsEmpty());
}

TEST(OpenDoorsTest, AdminsHaveADoorOfTheirOwn) {
  ServerOptions options;
  options.admin_address = "0.0.0.0:50052";
  EXPECT_THAT(Warnings(options),
              ElementsAre("admin_address: ANYBODY", "admin_address: CLEAR TEXT"));
  options.admin_address = "127.0.0.1:50052";
  EXPECT_THAT(Warnings(options), IsEmpty());
}

}  // namespace
}  // namespace firesteel::server
