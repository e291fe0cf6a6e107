// TLS for the gRPC listeners, with certificates that can be renewed on disk while connections live.

#ifndef FIRESTEEL_SERVER_TLS_H_
#define FIRESTEEL_SERVER_TLS_H_

#include <grpcpp/security/server_credentials.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace firesteel::server {

/// PEM files. Without a certificate there is no TLS; with client authorities every client needs a
/// certificate that one of them has signed.
struct TlsFiles {
  std::string cert;       // the chain, the server's own first
  std::string key;        // its private key, without a passphrase
  std::string client_ca;  // may be empty

  bool enabled() const { return !cert.empty(); }
};

/// Server credentials: plain text where TLS is not enabled. With it the files are looked at again
/// when a connection is made and `reload` has passed since the last look. What was put there is
/// taken if it is whole and fits together; otherwise an error is logged and the old certificate
/// goes on. Connections that stand are never touched. InvalidArgument, naming option and file,
/// where the files can't be used now.
absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakeServerCredentials(
    const TlsFiles& files, absl::Duration reload);

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_TLS_H_
