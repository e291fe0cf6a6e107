#include "server/access_control.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "server/status.h"

namespace firesteel::server {
namespace {

using ::testing::HasSubstr;

std::string HexOf(const std::string& token) {
  const auto digest = Sha256(token);
  return absl::BytesToHexString(std::string(digest.begin(), digest.end()));
}

class FixedClock final : public Clock {
 public:
  absl::Time Now() const override { return now; }
  absl::Time now = absl::FromUnixSeconds(1'000'000);
};

class AccessControlTest : public testing::Test {
 protected:
  ~AccessControlTest() override { unlink(path_.c_str()); }

  void Write(const std::string& text) const { std::ofstream(path_, std::ios::trunc) << text; }
  absl::StatusOr<std::unique_ptr<AccessControl>> Create(const std::string& text) {
    Write(text);
    return AccessControl::Create(path_, absl::Seconds(10), &clock_);
  }

  const std::string path_ = absl::StrCat(testing::TempDir(), "/tokens_", getpid(), ".yaml");
  FixedClock clock_;
};

TEST(Sha256Test, IsTheStandards) {  // FIPS 180-4's example
  EXPECT_EQ(HexOf("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

TEST_F(AccessControlTest, TokensTellWhoCalls) {
  const auto access = Create(absl::StrCat("- name: a\n  sha256: ", HexOf("one"),
                                          "\n- name: b\n  admin: true\n  sha256: [", HexOf("two"),
                                          ", ", HexOf("three"), "]\n"));
  ASSERT_TRUE(access.ok()) << access.status();
  const auto a = (*access)->AuthenticateToken("Bearer one");
  ASSERT_TRUE(a.ok());
  EXPECT_EQ(a->name, "a");
  EXPECT_FALSE(a->admin);
  EXPECT_NE(a->quota, nullptr);
  EXPECT_EQ((*access)->AuthenticateToken("bearer two")->name, "b");
  EXPECT_TRUE((*access)->AuthenticateToken("Bearer three")->admin);
  for (const char* none : {"", "one", "Basic one", "Bearer"}) {
    EXPECT_THAT(std::string((*access)->AuthenticateToken(none).status().message()),
                HasSubstr("no bearer token"))
        << none;
  }
  for (const char* unknown : {"Bearer ", "Bearer on", "Bearer one ", "Bearer onee"}) {
    const absl::Status status = (*access)->AuthenticateToken(unknown).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kUnauthenticated) << unknown;
    EXPECT_THAT(std::string(status.message()), HasSubstr("not known"));
  }
}

TEST_F(AccessControlTest, RenewedFileCountsAndBrokenOneDoesNot) {
  const auto entry = [](const std::string& token) {
    return "- name: a\n  max_concurrent_requests: 1\n  sha256: " + HexOf(token) + "\n";
  };
  auto access = Create(entry("old"));
  ASSERT_TRUE(access.ok()) << access.status();
  const auto lease = (*access)->AuthenticateToken("Bearer old")->quota->Admit();
  Write(entry("new"));
  (*access)->Reload();
  EXPECT_FALSE((*access)->AuthenticateToken("Bearer old").ok());
  const auto caller = (*access)->AuthenticateToken("Bearer new");
  ASSERT_TRUE(caller.ok());
  EXPECT_FALSE(caller->quota->Admit().ok()) << "what is under way still counts";
  Write("- name: [");
  (*access)->Reload();
  EXPECT_TRUE((*access)->AuthenticateToken("Bearer new").ok());
  unlink(path_.c_str());
  (*access)->Reload();
  EXPECT_TRUE((*access)->AuthenticateToken("Bearer new").ok());
}

struct BadFile {
  const char* name;
  std::string text;
  std::string says;
};

void PrintTo(const BadFile& row, std::ostream* out) { *out << row.name; }

class BadTokenFileTest : public AccessControlTest, public testing::WithParamInterface<BadFile> {};

TEST_P(BadTokenFileTest, SaysWhatIsWrong) {
  const absl::Status status = Create(GetParam().text).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("--auth-token-file " + path_ + ": "));
  EXPECT_THAT(std::string(status.message()), HasSubstr(GetParam().says));
}

const std::string kHash(64, 'a');

INSTANTIATE_TEST_SUITE_P(
    All, BadTokenFileTest,
    testing::Values(
        BadFile{"Empty", "", "not a YAML list"}, BadFile{"NoYaml", "- [", "is not YAML"},
        BadFile{"NoList", "name: a", "not a YAML list"},
        BadFile{"NoMap", "- a", "client 1: is not a list of"},
        BadFile{"NoName", "- sha256: " + kHash, "client 1: name: \"\""},
        BadFile{"BadName", "- name: a b\n  sha256: " + kHash, "name: \"a b\""},
        BadFile{"NoHash", "- name: a", "sha256: has 0 entries"},
        BadFile{"ShortHash", "- name: a\n  sha256: abc", "not a SHA-256"},
        BadFile{"TokenForHash", "- name: a\n  sha256: " + std::string(64, 'x'), "not a SHA-256"},
        BadFile{"UnknownKey", "- name: a\n  token: b", "key \"token\" is unknown"},
        BadFile{"AdminPerhaps", "- name: a\n  admin: perhaps", "key \"admin\""},
        BadFile{"NegativeLimit", "- name: a\n  tokens_per_minute: -1", "\"-1\" is not a whole"},
        BadFile{"HugeLimit", "- name: a\n  max_concurrent_requests: 99999999999",
                "from 0 to 1000000"},
        BadFile{"Twice", "- name: a\n  sha256: " + kHash + "\n- name: a\n  sha256: " + kHash,
                "client 2: name: \"a\" is there twice"}),
    [](const auto& row) { return row.param.name; });

TEST(AccessControlPathTest, MissingFileIsNamed) {
  const auto access = AccessControl::Create("/no/such/file", absl::Seconds(10));
  EXPECT_THAT(std::string(access.status().message()),
              HasSubstr("--auth-token-file /no/such/file: cannot be read"));
}

// --- Quotas ---

TEST(QuotaTest, PlacesComeBack) {
  FixedClock clock;
  const auto quota =
      std::make_shared<Quota>("a", QuotaLimits{.max_concurrent_requests = 2}, &clock);
  auto first = quota->Admit();
  const auto second = quota->Admit();
  ASSERT_TRUE(first.ok() && second.ok());
  EXPECT_THAT(std::string(quota->Admit().status().message()),
              HasSubstr("client \"a\" has 2 requests under way"));
  first->reset();
  EXPECT_TRUE(quota->Admit().ok());
}

TEST(QuotaTest, DebtIsPaidOffByWaiting) {
  FixedClock clock;
  const auto quota = std::make_shared<Quota>("a", QuotaLimits{.tokens_per_minute = 60}, &clock);
  {
    const auto lease = quota->Admit();
    ASSERT_TRUE(lease.ok());
    (*lease)->Charge(89);
  }
  const absl::Status refused = quota->Admit().status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(RetryPushbackMs(refused), 30'000) << "29 of debt and one to spend, one a second";
  clock.now += absl::Seconds(30);
  EXPECT_TRUE(quota->Admit().ok());
  clock.now += absl::Hours(5);
  {
    const auto lease = quota->Admit();
    (*lease)->Charge(60);
  }
  EXPECT_FALSE(quota->Admit().ok()) << "no more than a minute's worth was saved up";
}

TEST(QuotaTest, NoLimitIsNone) {
  FixedClock clock;
  const auto quota = std::make_shared<Quota>("a", QuotaLimits{}, &clock);
  std::vector<std::unique_ptr<Quota::Lease>> leases;
  for (int i = 0; i < 1000; ++i) {
    auto lease = quota->Admit();
    ASSERT_TRUE(lease.ok());
    (*lease)->Charge(1'000'000);
    leases.push_back(*std::move(lease));
  }
}

}  // namespace
}  // namespace firesteel::server
