#include "server/open_doors.h"

#include <string_view>

namespace firesteel::server {
namespace {

bool IsLoopback(std::string_view address) {
  const std::string_view host = address.substr(0, address.rfind(':'));
  return host == "localhost" || host == "[::1]" ||
         (host.starts_with("127.") && host.find_first_not_of("0123456789.") == host.npos);
}

}  // namespace

std::vector<OpenDoor> OpenDoors(const ServerOptions& options) {
  const bool known = !options.auth_token_file.empty() || !options.tls_client_ca.empty();
  const bool encrypted = !options.tls_cert.empty();
  std::vector<OpenDoor> doors;
  const auto look = [&](const char* option, const std::string& address, const char* to_anybody) {
    if (address.empty() || IsLoopback(address)) return;
    if (!known) doors.push_back({option, address, to_anybody});
    if (!encrypted) {
      doors.push_back({option, address,
                       "what is sent to and from this address travels in CLEAR TEXT, tokens too: "
                       "give --tls-cert and --tls-key, or put a TLS proxy in front"});
    }
  };
  look("address", options.address,
       "ANYBODY who reaches this address may use the models: give --auth-token-file or "
       "--tls-client-ca, or listen on 127.0.0.1");
  look("admin_address", options.admin_address,
       "ANYBODY who reaches this address may load and unload models: give --auth-token-file or "
       "--tls-client-ca, or listen on 127.0.0.1");
  return doors;
}

}  // namespace firesteel::server
