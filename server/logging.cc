#include "server/logging.h"

#include <grpc/support/log.h>
#include <spdlog/async.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <atomic>
#include <cctype>
#include <exception>
#include <utility>

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace firesteel::server {
namespace {

constexpr size_t kQueuedLines = 8192;

std::atomic<LogFormat> g_format{LogFormat::kText};
std::atomic<bool> g_capture_grpc{false};

spdlog::level::level_enum ToSpdlog(LogLevel level) {
  switch (level) {
    case LogLevel::kTrace:
      return spdlog::level::trace;
    case LogLevel::kDebug:
      return spdlog::level::debug;
    case LogLevel::kInfo:
      return spdlog::level::info;
    case LogLevel::kWarn:
      return spdlog::level::warn;
    case LogLevel::kError:
      break;
  }
  return spdlog::level::err;
}

const char* LevelName(LogLevel level) {
  static constexpr const char* kNames[] = {"trace", "debug", "info", "warn", "error"};
  return kNames[static_cast<int>(level)];
}

std::string Now() {
  return absl::FormatTime("%Y-%m-%dT%H:%M:%E6SZ", absl::Now(), absl::UTCTimeZone());
}

// Bytes that are no UTF-8 are replaced, control characters and quotes escaped: a line stays a line.
std::string Dump(const LogFields& value) {
  return value.dump(-1, ' ', true, LogFields::error_handler_t::replace);
}

std::string TextValue(const LogFields& value) {
  if (!value.is_string()) return Dump(value);
  const auto& text = value.get_ref<const std::string&>();
  const bool bare = !text.empty() && std::all_of(text.begin(), text.end(), [](unsigned char c) {
    return std::isalnum(c) || (c < 0x80 && std::ispunct(c) && c != '"' && c != '=' && c != '\\');
  });
  return bare ? text : Dump(value);
}

std::string TextLine(LogLevel level, const std::string& message, const LogFields& fields) {
  std::string line = Now() + " " + LevelName(level) + " " + message;
  for (const auto& [key, value] : fields.items()) line += " " + key + "=" + TextValue(value);
  return line;
}

std::string JsonLine(LogLevel level, const std::string& message, const LogFields& fields) {
  LogFields line = {{"time", Now()}, {"level", LevelName(level)}, {"message", message}};
  line.update(fields);
  return Dump(line);
}

// gRPC reports failures of single connections as errors; for the operator they are at most a
// warning.
void LogFromGrpc(gpr_log_func_args* args) {
  if (g_capture_grpc.load(std::memory_order_relaxed)) return;
  const LogLevel level =
      args->severity == GPR_LOG_SEVERITY_ERROR ? LogLevel::kWarn : LogLevel::kDebug;
  Log(level, "grpc", {{"text", args->message}});
}

void Install(const std::string& level, LogFormat format, std::shared_ptr<spdlog::logger> logger) {
  g_format.store(format, std::memory_order_relaxed);
  logger->set_pattern("%v");
  logger->set_level(spdlog::level::from_str(level));
  logger->flush_on(spdlog::level::trace);
  logger->set_error_handler([](const std::string&) {});
  spdlog::set_default_logger(std::move(logger));
  gpr_set_log_function(LogFromGrpc);
}

}  // namespace

void SetUpLogging(const std::string& level, LogFormat format, spdlog::sink_ptr sink) {
  Install(level, format, std::make_shared<spdlog::logger>("firesteel", std::move(sink)));
}

void SetUpLogging(const std::string& level, LogFormat format) {
  spdlog::init_thread_pool(kQueuedLines, 1);
  Install(level, format,
          std::make_shared<spdlog::async_logger>(
              "firesteel", std::make_shared<spdlog::sinks::stderr_sink_mt>(), spdlog::thread_pool(),
              spdlog::async_overflow_policy::overrun_oldest));
}

void ShutDownLogging() { spdlog::shutdown(); }

void Log(LogLevel level, const std::string& message, const LogFields& fields) {
  try {
    spdlog::logger* const logger = spdlog::default_logger_raw();
    if (logger == nullptr || !logger->should_log(ToSpdlog(level))) return;
    const bool json = g_format.load(std::memory_order_relaxed) == LogFormat::kJson;
    const std::string line =
        json ? JsonLine(level, message, fields) : TextLine(level, message, fields);
    logger->log(ToSpdlog(level), spdlog::string_view_t(line));
  } catch (const std::exception&) {
    // Nowhere to say so.
  }
}

GrpcLogCapture::GrpcLogCapture() { g_capture_grpc.store(true); }
GrpcLogCapture::~GrpcLogCapture() { g_capture_grpc.store(false); }

}  // namespace firesteel::server
