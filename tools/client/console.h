// Where a command of the client reads and writes, and what its exit status says.

#ifndef FIRESTEEL_TOOLS_CLIENT_CONSOLE_H_
#define FIRESTEEL_TOOLS_CLIENT_CONSOLE_H_

#include <istream>
#include <ostream>

namespace firesteel::client {

/// Exit statuses of the program.
enum ExitStatus : int {
  kSucceeded = 0,
  kFailed = 1,         // the RPC failed, or the server is not serving
  kUsage = 2,          // the command line is wrong; nothing was sent
  kInterrupted = 130,  // Ctrl-C, as shells count it: 128 + SIGINT
};

/// The three streams of the process, or a test's. Results go to `out`, all else to `err`. Holds
/// references only; they outlive it.
struct Console {
  std::istream& in;
  std::ostream& out;
  std::ostream& err;
  bool out_is_terminal = false;  // control characters in generated text are then made visible
};

}  // namespace firesteel::client

#endif  // FIRESTEEL_TOOLS_CLIENT_CONSOLE_H_
