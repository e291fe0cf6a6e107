// What firesteel-convert does: writes packed files, shows and checks them.

#ifndef FIRESTEEL_TOOLS_CONVERT_COMMANDS_H_
#define FIRESTEEL_TOOLS_CONVERT_COMMANDS_H_

#include <functional>
#include <ostream>
#include <string>
#include <vector>

namespace firesteel::convert {

/// Runs the program with `arguments` (without its name). What was asked for goes to `out`, one line
/// about what is wrong to `err`. `on_temporary`, if any, is told the name of the unfinished file
/// before it is made, and "" when it is gone. Returns the exit status: 0, or 2 for any error.
int Run(const std::vector<std::string>& arguments, std::ostream& out, std::ostream& err,
        const std::function<void(const std::string&)>& on_temporary = {});

}  // namespace firesteel::convert

#endif  // FIRESTEEL_TOOLS_CONVERT_COMMANDS_H_
