// Every row of docs/errors.md, over real gRPC: that it comes, with that code and those details, and
// that no reason is missing there.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/cord.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
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

}  // namespace
}  // namespace firesteel::server
