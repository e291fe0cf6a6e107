#include "server/logging.h"

#include <gmock/gmock.h>
#include <grpc/support/log.h>
#include <gtest/gtest.h>
#include <spdlog/sinks/ostream_sink.h>

#include <sstream>

namespace firesteel::server {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

class LoggingTest : public testing::Test {
 protected:
  void SetUpWith(const std::string& level, LogFormat format) {
    SetUpLogging(level, format, std::make_shared<spdlog::sinks::ostream_sink_mt>(out_));
  }
  ~LoggingTest() override { ShutDownLogging(); }

  std::ostringstream out_;
};

TEST_F(LoggingTest, TextIsOneLineOfKeysAndValues) {
  SetUpWith("info", LogFormat::kText);
  Log(LogLevel::kInfo, "request", {{"id", "abc"}, {"tokens", 3}, {"error", "a b\n\"c\""}});
  EXPECT_THAT(out_.str(), HasSubstr(" info request id=abc tokens=3 error=\"a b\\n\\\"c\\\"\"\n"));
}

TEST_F(LoggingTest, JsonLinesParse) {
  SetUpWith("info", LogFormat::kJson);
  Log(LogLevel::kWarn, "odd", {{"bytes", "\xff\x01"}, {"ratio", 0.5}});
  const auto line = nlohmann::json::parse(out_.str());
  EXPECT_EQ(line["level"], "warn");
  EXPECT_EQ(line["message"], "odd");
  EXPECT_EQ(line["ratio"], 0.5);
  EXPECT_TRUE(line["time"].is_string());
}

TEST_F(LoggingTest, LevelIsHeeded) {
  SetUpWith("warn", LogFormat::kText);
  Log(LogLevel::kInfo, "quiet");
  EXPECT_THAT(out_.str(), IsEmpty());
  Log(LogLevel::kError, "loud");
  EXPECT_THAT(out_.str(), HasSubstr("error loud"));
}

TEST_F(LoggingTest, GrpcSpeaksThroughTheLog) {
  gpr_log_verbosity_init();  // as the start of gRPC does
  SetUpWith("info", LogFormat::kText);
  gpr_log(GPR_ERROR, "connection %d lost", 7);
  EXPECT_THAT(out_.str(), HasSubstr("warn grpc text=\"connection 7 lost\""));
  out_.str("");
  {
    const GrpcLogCapture capture;
    gpr_log(GPR_ERROR, "hidden");
  }
  EXPECT_THAT(out_.str(), Not(HasSubstr("hidden")));
}

TEST_F(LoggingTest, NothingHappensAfterTheEnd) {
  SetUpWith("info", LogFormat::kText);
  ShutDownLogging();
  Log(LogLevel::kError, "late");
  EXPECT_THAT(out_.str(), IsEmpty());
}

}  // namespace
}  // namespace firesteel::server
