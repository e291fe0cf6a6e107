// Who calls: bearer tokens, client certificates, and what each client may do.

#ifndef FIRESTEEL_SERVER_ACCESS_CONTROL_H_
#define FIRESTEEL_SERVER_ACCESS_CONTROL_H_

#include <grpcpp/server_context.h>

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "runtime/scheduler/clock.h"
#include "runtime/threading/mutex.h"
#include "server/quota.h"

namespace YAML {
class Node;
}

namespace firesteel::server {

/// Who calls, as authenticated.
struct Caller {
  std::string name;              // of the token file, or of the certificate; empty: nobody asked
  bool admin = true;             // may call AdminService
  std::shared_ptr<Quota> quota;  // null: no limits
};

/// Bearer tokens by their SHA-256, from a YAML file:
///
///     - name: team-a              # letters, digits and -_.@/, at most 128
///       sha256: [9f86d0…]         # of each token; two while a client changes from one to the
///       other admin: false max_concurrent_requests: 32   # 0 or absent: no limit
///       tokens_per_minute: 100000     # the same
///
/// Tokens are meant to be long and random (32 bytes), so a plain hash keeps them; the file is no
/// secret that opens anything, yet tells who there is. Without a file everybody may do everything
/// that the listener offers, under the name of the client certificate if there is one. Thread-safe.
class AccessControl {
 public:
  using Digest = std::array<uint8_t, 32>;

  /// `path` may be empty: no tokens. The file is looked at again when somebody calls and `reload`
  /// has passed since the last look. InvalidArgument, naming option, file and entry, where the file
  /// can't be used now. `clock` outlives it.
  static absl::StatusOr<std::unique_ptr<AccessControl>> Create(const std::string& path,
                                                               absl::Duration reload,
                                                               const Clock* clock = Clock::Real());

  /// Reads the file again, if it has another content than at the last attempt. What it holds counts
  /// from the next call on; limits of clients that stay keep what was used. A file that can't be
  /// used is logged, and everything stays as it was.
  void Reload() ABSL_LOCKS_EXCLUDED(mutex_);

  bool has_tokens() const { return !path_.empty(); }

  /// Who calls. Unauthenticated where a token is needed and none, or an unknown one, was sent.
  /// Takes the same time whichever token is wrong in whichever place.
  absl::StatusOr<Caller> Authenticate(const grpc::ServerContextBase& context)
      ABSL_LOCKS_EXCLUDED(mutex_);

  /// The same from the value of `authorization`.
  absl::StatusOr<Caller> AuthenticateToken(absl::string_view authorization)
      ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  struct Client {
    std::string name;
    std::vector<Digest> digests;
    bool admin = false;
    QuotaLimits limits;
    std::shared_ptr<Quota> quota;
  };

  AccessControl(std::string path, absl::Duration reload, const Clock* clock)
      : path_(std::move(path)), reload_(reload), clock_(clock) {}
  static absl::StatusOr<std::vector<Client>> Parse(const std::string& text);
  static absl::StatusOr<Client> ParseClient(const YAML::Node& node);
  bool TimeToLook() ABSL_LOCKS_EXCLUDED(mutex_);
  absl::Status Take(const std::string& text) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::string path_;
  const absl::Duration reload_;
  const Clock* const clock_;

  Mutex mutex_;
  absl::Time next_look_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
  std::string text_ ABSL_GUARDED_BY(mutex_);  // as last tried
  std::vector<Client> clients_ ABSL_GUARDED_BY(mutex_);
};

/// SHA-256.
AccessControl::Digest Sha256(absl::string_view bytes);

/// PermissionDenied unless the caller is an admin.
absl::Status CheckAdmin(const Caller& caller);

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_ACCESS_CONTROL_H_
