#include "server/access_control.h"

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <set>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "server/logging.h"
#include "server/small_file.h"
#include "server/status.h"

namespace firesteel::server {
namespace {

constexpr size_t kMaxClients = 10'000;
constexpr size_t kMaxDigests = 8;  // of one client

absl::Status AtFile(const std::string& path, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("--auth-token-file ", path, ": ", what));
}

bool IsClientName(const std::string& name) {
  return !name.empty() && name.size() <= 128 &&
         std::all_of(name.begin(), name.end(), [](unsigned char c) {
           return std::isalnum(c) || absl::StrContains("-_.@/", static_cast<char>(c));
         });
}

// One hash, or a list of them.
absl::Status ParseDigests(const YAML::Node& value, std::vector<AccessControl::Digest>* digests) {
  std::vector<std::string> entries;
  if (value.IsScalar()) entries.push_back(value.Scalar());
  for (const YAML::Node& item : value) entries.push_back(item.IsScalar() ? item.Scalar() : "");
  for (const std::string& hex : entries) {
    const bool valid = hex.size() == 64 && std::all_of(hex.begin(), hex.end(), [](unsigned char c) {
                         return std::isxdigit(c);
                       });
    if (!valid) {
      return absl::InvalidArgumentError("sha256: an entry is not a SHA-256 of 64 hex digits");
    }
    AccessControl::Digest& digest = digests->emplace_back();
    for (size_t i = 0; i < digest.size(); ++i) {  // abseil's function differs from Debian to Debian
      std::from_chars(&hex[2 * i], &hex[2 * i] + 2, digest[i], 16);
    }
  }
  return absl::OkStatus();
}

// A whole number; yaml-cpp would take "-1" for an unsigned one.
template <typename Int>
absl::Status ParseLimit(const std::string& key, const YAML::Node& value, uint64_t max, Int* limit) {
  const std::string text = value.IsScalar() ? value.Scalar() : "";
  uint64_t number = 0;
  const bool digits =
      std::all_of(text.begin(), text.end(), [](unsigned char c) { return std::isdigit(c); });
  if (!digits || !absl::SimpleAtoi(text, &number) || number > max) {
    return absl::InvalidArgumentError(
        absl::StrCat(key, ": ", Quoted(text), " is not a whole number from 0 to ", max));
  }
  *limit = static_cast<Int>(number);
  return absl::OkStatus();
}

std::string CertificateName(const grpc::ServerContextBase& context) {
  const auto auth = context.auth_context();
  if (auth == nullptr || !auth->IsPeerAuthenticated()) return "";
  const auto names = auth->GetPeerIdentity();
  if (names.empty()) return "";
  return std::string(names.front().data(), names.front().size());
}

}  // namespace

AccessControl::Digest Sha256(absl::string_view bytes) {
  AccessControl::Digest digest{};
  EVP_Digest(bytes.data(), bytes.size(), digest.data(), nullptr, EVP_sha256(), nullptr);
  return digest;
}

absl::Status CheckAdmin(const Caller& caller) {
  if (caller.admin) return absl::OkStatus();
  return Refusal(kAdminOnly, absl::StrCat("client ", Quoted(caller.name),
                                          " is no admin; the token file says who is"));
}

absl::StatusOr<std::unique_ptr<AccessControl>> AccessControl::Create(const std::string& path,
                                                                     absl::Duration reload,
                                                                     const Clock* clock) {
  std::unique_ptr<AccessControl> access(new AccessControl(path, reload, clock));
  if (path.empty()) return access;
  const auto text = ReadSmallFile(path);
  if (!text.ok()) return AtFile(path, text.status().message());
  MutexLock lock(&access->mutex_);
  access->next_look_ = clock->Now() + reload;
  if (const absl::Status status = access->Take(*text); !status.ok()) return status;
  return access;
}

void AccessControl::Reload() {
  if (path_.empty()) return;
  const auto text = ReadSmallFile(path_);
  absl::Status status;
  {
    MutexLock lock(&mutex_);
    const std::string seen = text.ok() ? *text : "";
    if (seen == text_) return;
    text_ = seen;
    status = text.ok() ? Take(*text) : AtFile(path_, text.status().message());
  }
  if (status.ok()) {
    Log(LogLevel::kInfo, "tokens renewed", {{"file", path_}});
  } else {
    Log(LogLevel::kError, "the new tokens are not taken, the old ones go on",
        {{"error", std::string(status.message())}});
  }
}

bool AccessControl::TimeToLook() {
  MutexLock lock(&mutex_);
  const absl::Time now = clock_->Now();
  if (now < next_look_) return false;
  next_look_ = now + reload_;
  return true;
}

absl::Status AccessControl::Take(const std::string& text) {
  text_ = text;
  auto clients = Parse(text);
  if (!clients.ok()) return AtFile(path_, clients.status().message());
  for (Client& client : *clients) {
    const auto old = std::find_if(clients_.begin(), clients_.end(),
                                  [&](const Client& c) { return c.name == client.name; });
    if (old != clients_.end()) {
      client.quota = old->quota;
      client.quota->SetLimits(client.limits);
    } else {
      client.quota = std::make_shared<Quota>(client.name, client.limits, clock_);
    }
  }
  clients_ = *std::move(clients);
  return absl::OkStatus();
}

absl::StatusOr<std::vector<AccessControl::Client>> AccessControl::Parse(
    const std::string& text) try {
  const YAML::Node root = YAML::Load(text);
  if (!root.IsSequence() || root.size() == 0) {
    return absl::InvalidArgumentError("is not a YAML list of clients, or an empty one");
  }
  if (root.size() > kMaxClients) {
    return absl::InvalidArgumentError(
        absl::StrCat("has ", root.size(), " clients; at most ", kMaxClients, " are allowed"));
  }
  std::vector<Client> clients;
  std::set<std::string> names;
  for (const YAML::Node& node : root) {
    auto client = ParseClient(node);
    absl::Status status = client.status();
    if (status.ok() && !names.insert(client->name).second) {
      status = absl::InvalidArgumentError(
          absl::StrCat("name: ", Quoted(client->name), " is there twice"));
    }
    if (!status.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat("client ", clients.size() + 1, ": ", status.message()));
    }
    clients.push_back(*std::move(client));
  }
  return clients;
} catch (const YAML::Exception& e) {
  return absl::InvalidArgumentError(absl::StrCat("is not YAML: ", e.what()));
}

absl::StatusOr<AccessControl::Client> AccessControl::ParseClient(const YAML::Node& node) {
  if (!node.IsMap()) return absl::InvalidArgumentError("is not a list of `key: value` lines");
  Client client;
  for (const auto& entry : node) {
    const std::string key = entry.first.IsScalar() ? entry.first.Scalar() : "";
    const YAML::Node& value = entry.second;
    absl::Status status;
    if (key == "name" && value.IsScalar()) {
      client.name = value.Scalar();
    } else if (key == "sha256" && (value.IsScalar() || value.IsSequence())) {
      status = ParseDigests(value, &client.digests);
    } else if (key == "admin" && value.IsScalar() &&
               (value.Scalar() == "true" || value.Scalar() == "false")) {
      client.admin = value.Scalar() == "true";
    } else if (key == "max_concurrent_requests") {
      status = ParseLimit(key, value, 1'000'000, &client.limits.max_concurrent_requests);
    } else if (key == "tokens_per_minute") {
      status = ParseLimit(key, value, 1'000'000'000'000, &client.limits.tokens_per_minute);
    } else {
      status = absl::InvalidArgumentError(absl::StrCat(
          "key ", Quoted(key),
          " is unknown or has no value of its kind (name, sha256, admin: true or false, "
          "max_concurrent_requests, tokens_per_minute)"));
    }
    if (!status.ok()) return status;
  }
  if (!IsClientName(client.name)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "name: ", Quoted(client.name), " is not of letters, digits and -_.@/, at most 128"));
  }
  if (client.digests.empty() || client.digests.size() > kMaxDigests) {
    return absl::InvalidArgumentError(absl::StrCat("sha256: has ", client.digests.size(),
                                                   " entries; 1 to ", kMaxDigests, " are allowed"));
  }
  return client;
}

absl::StatusOr<Caller> AccessControl::Authenticate(const grpc::ServerContextBase& context) {
  if (path_.empty()) {
    return Caller{.name = CertificateName(context), .admin = true, .quota = nullptr};
  }
  if (TimeToLook()) Reload();
  const auto& metadata = context.client_metadata();
  const auto [first, last] = metadata.equal_range("authorization");
  if (first == last) return AuthenticateToken("");
  return AuthenticateToken(absl::string_view(first->second.data(), first->second.size()));
}

absl::StatusOr<Caller> AccessControl::AuthenticateToken(absl::string_view authorization) {
  constexpr absl::string_view kScheme = "bearer ";
  if (!absl::StartsWithIgnoreCase(authorization, kScheme)) {
    return Refusal(kTokenMissing, "authorization: no bearer token was sent");
  }
  const Digest digest = Sha256(authorization.substr(kScheme.size()));
  MutexLock lock(&mutex_);
  // Every digest is compared, whole: time tells nothing about them.
  const Client* found = nullptr;
  for (const Client& client : clients_) {
    for (const Digest& known : client.digests) {
      if (CRYPTO_memcmp(known.data(), digest.data(), digest.size()) == 0) found = &client;
    }
  }
  if (found == nullptr) return Refusal(kTokenUnknown, "authorization: the token is not known");
  return Caller{.name = found->name, .admin = found->admin, .quota = found->quota};
}

}  // namespace firesteel::server
