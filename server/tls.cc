#include "server/tls.h"

#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509.h>

#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "runtime/threading/mutex.h"
#include "server/logging.h"
#include "server/small_file.h"

namespace firesteel::server {
namespace {

template <auto Free>
struct Deleter {
  template <typename T>
  void operator()(T* pointer) const {
    Free(pointer);
  }
};
using Bio = std::unique_ptr<BIO, Deleter<BIO_free>>;
using Certificate = std::unique_ptr<X509, Deleter<X509_free>>;
using Key = std::unique_ptr<EVP_PKEY, Deleter<EVP_PKEY_free>>;

/// The contents of the files.
struct Pem {
  std::string cert;
  std::string key;
  std::string client_ca;

  bool operator==(const Pem& other) const = default;
};

absl::Status AtFile(const char* option, const std::string& path, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("--", option, " ", path, ": ", what));
}

Certificate ParseCertificate(const std::string& pem) {
  const Bio bio(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())));
  Certificate certificate(PEM_read_bio_X509(bio.get(), nullptr, nullptr, nullptr));
  ERR_clear_error();
  return certificate;
}

Key ParseKey(const std::string& pem) {
  const Bio bio(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())));
  // A key with a passphrase is no use: nobody is there to type it.
  const auto no_passphrase = [](char*, int, int, void*) { return -1; };
  Key key(PEM_read_bio_PrivateKey(bio.get(), nullptr, no_passphrase, nullptr));
  ERR_clear_error();
  return key;
}

absl::StatusOr<Pem> ReadPem(const TlsFiles& files) {
  Pem pem;
  for (const auto& [option, path, to] : {std::tuple{"tls-cert", &files.cert, &pem.cert},
                                         {"tls-key", &files.key, &pem.key},
                                         {"tls-client-ca", &files.client_ca, &pem.client_ca}}) {
    if (path->empty()) continue;
    auto content = ReadSmallFile(*path);
    if (!content.ok()) return AtFile(option, *path, content.status().message());
    *to = *std::move(content);
  }
  return pem;
}

absl::Status CheckPem(const TlsFiles& files, const Pem& pem) {
  const Certificate certificate = ParseCertificate(pem.cert);
  if (certificate == nullptr) return AtFile("tls-cert", files.cert, "holds no PEM certificate");
  const Key key = ParseKey(pem.key);
  if (key == nullptr) {
    return AtFile("tls-key", files.key, "holds no PEM private key without a passphrase");
  }
  const bool fits = X509_check_private_key(certificate.get(), key.get()) == 1;
  ERR_clear_error();
  if (!fits) {
    return AtFile("tls-key", files.key,
                  absl::StrCat("does not fit the certificate in ", files.cert));
  }
  if (!files.client_ca.empty() && ParseCertificate(pem.client_ca) == nullptr) {
    return AtFile("tls-client-ca", files.client_ca, "holds no PEM certificate");
  }
  if (X509_cmp_current_time(X509_get0_notAfter(certificate.get())) < 0) {
    Log(LogLevel::kWarn, "the certificate has expired", {{"file", files.cert}});
  }
  return absl::OkStatus();
}

absl::StatusOr<Pem> Load(const TlsFiles& files) {
  auto pem = ReadPem(files);
  if (!pem.ok()) return pem;
  if (absl::Status status = CheckPem(files, *pem); !status.ok()) return status;
  return pem;
}

/// What gRPC asks whenever a connection is made. Thread-safe.
class CertificateSource {
 public:
  CertificateSource(TlsFiles files, absl::Duration reload, Pem pem)
      : files_(std::move(files)), reload_(reload), pem_(std::move(pem)) {}

  /// Lives as long as the process: the listener outlives its credentials and does not say when it
  /// has asked for the last time; a process has one or two of them.
  static CertificateSource* Make(const TlsFiles& files, absl::Duration reload, Pem pem) {
    static Mutex mutex;
    static auto* const all = new std::vector<std::unique_ptr<CertificateSource>>;
    MutexLock lock(&mutex);
    all->push_back(std::make_unique<CertificateSource>(files, reload, std::move(pem)));
    return all->back().get();
  }

  /// gRPC's callback.
  static grpc_ssl_certificate_config_reload_status Fetch(
      void* self, grpc_ssl_server_certificate_config** config) {
    return static_cast<CertificateSource*>(self)->Next(config);
  }

 private:
  grpc_ssl_certificate_config_reload_status Next(grpc_ssl_server_certificate_config** config)
      ABSL_LOCKS_EXCLUDED(mutex_) {
    MutexLock lock(&mutex_);
    if (handed_out_ && !Changed()) return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_UNCHANGED;
    grpc_ssl_pem_key_cert_pair pair = {pem_.key.c_str(), pem_.cert.c_str()};
    // gRPC insists on authorities also where no client certificate is asked for.
    const std::string& authorities = files_.client_ca.empty() ? pem_.cert : pem_.client_ca;
    *config = grpc_ssl_server_certificate_config_create(authorities.c_str(), &pair, 1);
    handed_out_ = true;
    return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_NEW;
  }

  bool Changed() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    const absl::Time now = absl::Now();
    if (now < next_look_) return false;
    next_look_ = now + reload_;
    auto pem = ReadPem(files_);
    if (pem.ok() && (*pem == pem_ || *pem == refused_)) return false;
    const absl::Status status = pem.ok() ? CheckPem(files_, *pem) : pem.status();
    if (!status.ok()) {
      Log(LogLevel::kError, "the new certificate is not taken, the old one goes on",
          {{"error", std::string(status.message())}});
      if (pem.ok()) refused_ = *std::move(pem);
      return false;
    }
    pem_ = *std::move(pem);
    Log(LogLevel::kInfo, "certificate renewed", {{"file", files_.cert}});
    return true;
  }

  const TlsFiles files_;
  const absl::Duration reload_;
  Mutex mutex_;
  Pem pem_ ABSL_GUARDED_BY(mutex_);
  Pem refused_ ABSL_GUARDED_BY(mutex_);  // so that it is logged once
  absl::Time next_look_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
  bool handed_out_ ABSL_GUARDED_BY(mutex_) = false;
};

/// gRPC's C credentials with that callback. Why not its FileWatcherCertificateProvider: that one
/// takes whatever the files hold, so a half-written renewal would cut off every new client.
class ReloadingCredentials final : public grpc::ServerCredentials {
 public:
  ReloadingCredentials(CertificateSource* source, bool client_certificates)
      : credentials_(grpc_ssl_server_credentials_create_with_options(
            grpc_ssl_server_credentials_create_options_using_config_fetcher(
                client_certificates ? GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY
                                    : GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE,
                &CertificateSource::Fetch, source))) {}
  ~ReloadingCredentials() override { grpc_server_credentials_release(credentials_); }

  // Tokens are checked by the handlers (access_control.h), with or without TLS.
  void SetAuthMetadataProcessor(const std::shared_ptr<grpc::AuthMetadataProcessor>&) override {}

 private:
  int AddPortToServer(const std::string& address, grpc_server* server) override {
    return grpc_server_add_http2_port(server, address.c_str(), credentials_);
  }

  grpc_server_credentials* const credentials_;
};

}  // namespace

absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakeServerCredentials(
    const TlsFiles& files, absl::Duration reload) {
  if (!files.enabled()) return grpc::InsecureServerCredentials();
  auto pem = Load(files);
  if (!pem.ok()) return pem.status();
  return std::make_shared<ReloadingCredentials>(
      CertificateSource::Make(files, reload, *std::move(pem)), !files.client_ca.empty());
}

}  // namespace firesteel::server
