// Options whose value is a duration, such as 500ms or 2m.

#ifndef FIRESTEEL_TOOLS_CLIENT_DURATION_OPTION_H_
#define FIRESTEEL_TOOLS_CLIENT_DURATION_OPTION_H_

#include <string>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"

namespace firesteel::client {

/// Adds an option that takes a duration from `min` to a day; `field` outlives the parse.
inline void AddDurationOption(CLI::App& command, const char* name, absl::Duration& field,
                              absl::Duration min, const char* help) {
  command
      .add_option_function<std::string>(
          name,
          [name, min, &field](const std::string& text) {
            if (!absl::ParseDuration(text, &field) || field < min || field > absl::Hours(24)) {
              throw CLI::ValidationError(
                  name, absl::StrCat("'", text, "' is no duration from ", absl::FormatDuration(min),
                                     " to 24h; e.g. 500ms, 30s, 2m"));
            }
          },
          help)
      ->type_name("DURATION");
}

}  // namespace firesteel::client

#endif  // FIRESTEEL_TOOLS_CLIENT_DURATION_OPTION_H_
