// The server's log: lines on standard error, as text or JSON, with named fields.
//
// Prompts and generated text never go here. Strings that come from outside are escaped.

#ifndef FIRESTEEL_SERVER_LOGGING_H_
#define FIRESTEEL_SERVER_LOGGING_H_

#include <spdlog/common.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "server/options.h"

namespace firesteel::server {

/// Named values of a log line, in the order in which they are written.
using LogFields = nlohmann::ordered_json;

enum class LogLevel { kTrace, kDebug, kInfo, kWarn, kError };

/// Sends the log to `sink` in this form, and gRPC's own messages with it. `level` as in
/// --log-level. Call it before the first line is logged; not thread-safe.
void SetUpLogging(const std::string& level, LogFormat format, spdlog::sink_ptr sink);

/// The same to standard error, through a queue of its own: where nobody reads standard error, lines
/// are dropped, the server goes on.
void SetUpLogging(const std::string& level, LogFormat format);

/// Writes what is queued. Call it before the process ends.
void ShutDownLogging();

/// Writes one line. `fields` is an object. Thread-safe, does not throw.
void Log(LogLevel level, const std::string& message, const LogFields& fields = LogFields::object());

/// While one lives, gRPC logs nothing: for start-up, where the one line that the user sees is ours.
/// One at a time.
class GrpcLogCapture {
 public:
  GrpcLogCapture();
  ~GrpcLogCapture();
  GrpcLogCapture(const GrpcLogCapture&) = delete;
  GrpcLogCapture& operator=(const GrpcLogCapture&) = delete;
};

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_LOGGING_H_
