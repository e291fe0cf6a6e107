// firesteel-convert: checkpoint folders to packed serving files.

#include <signal.h>
#include <unistd.h>

#include <cstring>
#include <exception>
#include <iostream>
#include <string>
#include <vector>

#include "tools/convert/commands.h"

namespace {

// The unfinished file, for the handler; "" where there is none.
char unfinished[4096];

// Removes the unfinished file, then ends as the signal would have. Only calls that are safe here.
void CleanUp(int number) {
  if (unfinished[0] != '\0') unlink(unfinished);
  signal(number, SIG_DFL);
  raise(number);
}

void Remember(const std::string& path) {
  unfinished[0] = '\0';
  // The first byte last: the handler sees a whole name or none. A name too long is left behind.
  if (path.empty() || path.size() >= sizeof(unfinished)) return;
  std::memcpy(unfinished + 1, path.c_str() + 1, path.size());
  unfinished[0] = path[0];
}

}  // namespace

int main(int argc, char** argv) {
  for (const int number : {SIGINT, SIGTERM, SIGHUP}) {
    // One that the caller ignores (nohup) stays ignored.
    if (signal(number, CleanUp) == SIG_IGN) signal(number, SIG_IGN);
  }
  try {
    return firesteel::convert::Run(std::vector<std::string>(argv + 1, argv + argc), std::cout,
                                   std::cerr, Remember);
  } catch (const std::exception& error) {
    std::cerr << "firesteel-convert: " << error.what() << std::endl;
    return 2;
  }
}
