// What strangers could do with a server that is configured so: an operator should not find that out
// later.

#ifndef FIRESTEEL_SERVER_OPEN_DOORS_H_
#define FIRESTEEL_SERVER_OPEN_DOORS_H_

#include <string>
#include <vector>

#include "server/options.h"

namespace firesteel::server {

/// A warning about one address, which others than this machine may reach.
struct OpenDoor {
  std::string option;  // as a log field: "address"
  std::string address;
  std::string warning;
};

/// Empty where only this machine gets in, or every caller is known and nothing can be overheard.
/// Names of hosts count as public, but for "localhost": what they stand for may change.
std::vector<OpenDoor> OpenDoors(const ServerOptions& options);

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_OPEN_DOORS_H_
