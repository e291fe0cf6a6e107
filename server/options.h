// Everything that can be set about the server: one table of options drives the command line, the
// environment, the YAML file, --help and --print-config.

#ifndef FIRESTEEL_SERVER_OPTIONS_H_
#define FIRESTEEL_SERVER_OPTIONS_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kernels/tensor.h"
#include "runtime/checkpoint/weights.h"
#include "runtime/model/compute_type.h"
#include "runtime/scheduler/engine.h"
#include "server/metric_table.h"

namespace firesteel::server {

/// One --model: where it is, and the name that requests use.
struct ModelSpec {
  std::string name;
  std::string path;
  /// Options of its own, name and value, as its entry in the file gives them.
  std::vector<std::pair<std::string, std::string>> own = {};
};

/// Letters, digits and -_.:/, 1 to 128 of them.
bool IsModelName(const std::string& name);

enum class LogFormat : uint8_t { kText, kJson };

/// The effective options, checked one by one and against each other.
struct ServerOptions {
  std::vector<ModelSpec> models;  // the first is the default one
  std::string address = "127.0.0.1:50051";
  std::string admin_address;   // empty: AdminService is not served
  std::string health_address;  // empty: health is served at `address` only
  std::string metrics_address = "127.0.0.1:9464";
  WeightFormat weights;
  WeightMemory weights_memory = WeightMemory::kCopy;
  std::optional<ComputeType> compute;           // unset: what suits the weights
  std::optional<kernels::DType> kv_cache_type;  // unset: see KvCacheType
  uint32_t threads = 1;                         // the parser's default is DefaultThreadCount()
  EngineOptions engine;
  uint32_t max_prompt_tokens = 0;  // 0: what the context allows
  uint64_t max_message_bytes = 4u << 20;
  uint64_t max_answer_bytes = 4u << 20;
  absl::Duration withdraw = absl::ZeroDuration();  // health is withdrawn so long before all else
  absl::Duration drain = absl::Seconds(30);
  absl::Duration stall = absl::Seconds(30);
  absl::Duration reader_stall = absl::Seconds(60);
  uint64_t reader_buffer_bytes = 4u << 20;
  absl::Duration max_connection_age = absl::ZeroDuration();  // zero: without end
  std::string tls_cert;
  std::string tls_key;
  std::string tls_client_ca;
  std::string auth_token_file;
  absl::Duration credentials_reload = absl::Seconds(10);
  MetricBuckets metric_buckets;
  std::string log_level = "info";
  LogFormat log_format = LogFormat::kText;
  bool reflection = true;
  bool channelz = false;
  bool warmup = true;
  bool print_config = false;
  bool check = false;
};

/// The options that hold for the model of that name: its own where it has some, else those of all.
/// REQUIRES: ParseCommandLine made `options`.
ServerOptions OptionsOf(const std::string& model_name, const ServerOptions& options);

/// How keys and values are cached: as --kv-cache-type says. Without it bf16, unless --compute f32
/// was asked for: that is the parity mode, where nothing is rounded that need not be.
kernels::DType KvCacheType(const ServerOptions& options);

/// What the command line asks for.
struct CommandLine {
  enum class Action { kServe, kCheck, kPrint };
  Action action = Action::kServe;
  ServerOptions options;
  std::string text;  // kPrint: what to write to standard output (help, version, configuration)
};

/// The value of an environment variable, or nothing.
using Environment = std::function<std::optional<std::string>(const std::string& name)>;

/// The process's own environment.
Environment ProcessEnvironment();

/// Reads `arguments` (without the program's name), the environment (FIRESTEEL_MAX_BATCH_SIZE for
/// --max-batch-size; an empty variable counts as unset; several models are separated by commas) and
/// the YAML file of --config (max-batch-size, or max_batch_size). There a model may also be a map
/// of name, path and those options that a model can have of its own. The command line wins, then
/// the environment, then the file. InvalidArgument: one line that names the option, where its value
/// came from, the value and what is allowed.
absl::StatusOr<CommandLine> ParseCommandLine(const std::vector<std::string>& arguments,
                                             const Environment& environment);

/// The effective options as a YAML file that --config reads back.
std::string ToYaml(const ServerOptions& options);

/// The program's version.
const char* Version();

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_OPTIONS_H_
