#include "server/options.h"

#include <yaml-cpp/yaml.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <map>
#include <set>
#include <sstream>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "runtime/checkpoint/packed_file.h"
#include "runtime/threading/cpu_topology.h"
#include "server/small_file.h"

#ifndef FIRESTEEL_VERSION
#error "FIRESTEEL_VERSION comes from the build"
#endif

namespace firesteel::server {
namespace {

constexpr size_t kMaxModels = 64;
constexpr size_t kMaxBuckets = 100;  // each is a time series for every layer of every model

// --- The kinds of value ---

/// Sets an option from text; the status says only what is wrong with the value.
using Setter = std::function<absl::Status(const std::string& value, ServerOptions& options)>;
/// The effective value as text that the setter takes; more than one for a repeatable option.
using Getter = std::function<std::vector<std::string>(const ServerOptions& options)>;

struct Option {
  const char* name;
  const char* type;  // as --help shows it
  std::string help;
  Setter set;
  Getter get;
  bool repeatable = false;
  bool is_switch = false;  // may stand alone: "on"
  bool is_action = false;  // no part of a configuration: not printed, not read from the file
  bool per_model = false;  // a model's entry in the file may have its own value
};

absl::Status Bad(const std::string& value, const std::string& why) {
  std::string shown = value.substr(0, 100);
  for (char& c : shown) {
    if (std::iscntrl(static_cast<unsigned char>(c))) c = '?';
  }
  return absl::InvalidArgumentError(absl::StrCat("'", shown, "' ", why));
}

template <typename Field>
using Accessor = Field& (*)(ServerOptions&);

// The accessors are written for setting; reading goes through a copy.
template <typename Field>
Field Read(Accessor<Field> field, const ServerOptions& options) {
  ServerOptions copy = options;
  return field(copy);
}

template <typename Int>
Option Whole(const char* name, const char* help, Int min, Int max, Accessor<Int> field) {
  return {.name = name,
          .type = "N",
          .help = help,
          .set = [=](const std::string& value, ServerOptions& options) -> absl::Status {
            uint64_t n = 0;
            if (!absl::SimpleAtoi(value, &n) || n < min || n > max) {
              return Bad(value, absl::StrCat("is not a whole number from ", min, " to ", max));
            }
            field(options) = static_cast<Int>(n);
            return absl::OkStatus();
          },
          .get = [=](const ServerOptions& options) -> std::vector<std::string> {
            return {absl::StrCat(Read(field, options))};
          }};
}

// Plain bytes, or with one of the suffixes KiB, MiB, GiB, TiB.
bool ParseBytes(const std::string& value, uint64_t* bytes) {
  static constexpr std::pair<const char*, int> kSuffixes[] = {
      {"KiB", 10}, {"MiB", 20}, {"GiB", 30}, {"TiB", 40}};
  absl::string_view digits = value;
  int shift = 0;
  for (const auto& [suffix, bits] : kSuffixes) {
    if (absl::ConsumeSuffix(&digits, suffix)) {
      shift = bits;
      break;
    }
  }
  if (digits.empty() || !std::all_of(digits.begin(), digits.end(),
                                     [](unsigned char c) { return std::isdigit(c) != 0; })) {
    return false;
  }
  uint64_t n = 0;
  if (!absl::SimpleAtoi(digits, &n) || n > (std::numeric_limits<uint64_t>::max() >> shift)) {
    return false;
  }
  *bytes = n << shift;
  return true;
}

template <typename Int>
Option Bytes(const char* name, const char* help, uint64_t min, uint64_t max, Accessor<Int> field) {
  return {.name = name,
          .type = "BYTES",
          .help = help,
          .set = [=](const std::string& value, ServerOptions& options) -> absl::Status {
            uint64_t n = 0;
            if (!ParseBytes(value, &n) || n < min || n > max) {
              return Bad(value, absl::StrCat("is not a number of bytes (KiB, MiB, GiB, TiB) from ",
                                             min, " to ", max));
            }
            field(options) = static_cast<Int>(n);
            return absl::OkStatus();
          },
          .get = [=](const ServerOptions& options) -> std::vector<std::string> {
            return {absl::StrCat(Read(field, options))};
          }};
}

// A decimal number of `unit`s.
Option Duration(const char* name, const char* type, const char* help, absl::Duration unit,
                double min, double max, Accessor<absl::Duration> field) {
  return {.name = name,
          .type = type,
          .help = help,
          .set = [=](const std::string& value, ServerOptions& options) -> absl::Status {
            double n = 0;
            if (!absl::SimpleAtod(value, &n) || !std::isfinite(n) || n < min || n > max) {
              return Bad(value, absl::StrCat("is not a number from ", min, " to ", max));
            }
            field(options) = n * unit;
            return absl::OkStatus();
          },
          .get = [=](const ServerOptions& options) -> std::vector<std::string> {
            return {absl::StrCat(absl::FDivDuration(Read(field, options), unit))};
          }};
}

bool ParseSwitch(const std::string& value, bool* on) {
  *on = value == "on" || value == "true";
  return *on || value == "off" || value == "false";
}

Option Switch(const char* name, const char* help, Accessor<bool> field) {
  return {.name = name,
          .type = "on|off",
          .help = help,
          .set = [=](const std::string& value, ServerOptions& options) -> absl::Status {
            if (!ParseSwitch(value, &field(options))) return Bad(value, "is neither on nor off");
            return absl::OkStatus();
          },
          .get = [=](const ServerOptions& options) -> std::vector<std::string> {
            return {Read(field, options) ? "on" : "off"};
          },
          .is_switch = true};
}

Option PerModel(Option option) {
  option.per_model = true;
  return option;
}

Option Action(const char* name, const char* help, Accessor<bool> field) {
  Option option = Switch(name, help, field);
  option.is_action = true;
  return option;
}

// One of some names.
template <typename Value>
Option Choice(const char* name, const char* type, const char* help,
              const std::vector<std::pair<std::string, Value>>& choices, Accessor<Value> field) {
  return {.name = name,
          .type = type,
          .help = help,
          .set = [=](const std::string& value, ServerOptions& options) -> absl::Status {
            std::vector<std::string> names;
            for (const auto& [choice, result] : choices) {
              if (choice == value) {
                field(options) = result;
                return absl::OkStatus();
              }
              names.push_back(choice);
            }
            return Bad(value, absl::StrCat("is not one of ", absl::StrJoin(names, ", ")));
          },
          .get = [=](const ServerOptions& options) -> std::vector<std::string> {
            for (const auto& [choice, result] : choices) {
              if (result == Read(field, options)) return {choice};
            }
            return {};
          }};
}

// HOST:PORT, where HOST is a name, an IPv4 address, or an IPv6 address in brackets. Anything that
// the two listeners' own syntax would give another meaning (lists, suffixes, URI schemes) is kept
// out.
bool IsHostAndPort(const std::string& value) {
  const size_t colon = value.rfind(':');
  if (colon == std::string::npos || colon == 0) return false;
  std::string host = value.substr(0, colon);
  const std::string port = value.substr(colon + 1);
  if (port.empty() || port.size() > 5 ||
      !std::all_of(port.begin(), port.end(), [](unsigned char c) { return std::isdigit(c); }) ||
      std::stoul(port) > 65535) {
    return false;
  }
  const bool brackets = host.size() > 2 && host.front() == '[' && host.back() == ']';
  if (brackets) host = host.substr(1, host.size() - 2);
  return std::all_of(host.begin(), host.end(), [brackets](unsigned char c) {
    return brackets ? std::isxdigit(c) || c == ':' || c == '.'
                    : std::isalnum(c) || c == '.' || c == '-' || c == '_';
  });
}

// Where the field may be empty, nothing is printed then.
Option Address(const char* name, const char* help, Accessor<std::string> field) {
  return {.name = name,
          .type = "HOST:PORT",
          .help = help,
          .set = [=](const std::string& value, ServerOptions& options) -> absl::Status {
            if (!IsHostAndPort(value)) {
              return Bad(value, "is not HOST:PORT (IPv6 in brackets, port from 0 to 65535)");
            }
            field(options) = value;
            return absl::OkStatus();
          },
          .get = [=](const ServerOptions& options) -> std::vector<std::string> {
            const std::string value = Read(field, options);
            return value.empty() ? std::vector<std::string>() : std::vector<std::string>{value};
          }};
}

// Upper bounds of a kind of histogram.
Option Buckets(const char* name, const char* help, Accessor<std::vector<double>> field) {
  return {.name = name,
          .type = "LIST",
          .help = help,
          .set = [=](const std::string& value, ServerOptions& options) -> absl::Status {
            std::vector<double> bounds;
            for (absl::string_view part : absl::StrSplit(value, ',')) {
              double bound = 0;
              if (!absl::SimpleAtod(part, &bound) || !std::isfinite(bound) ||
                  bound <= (bounds.empty() ? 0 : bounds.back())) {
                return Bad(value, "is no list of rising numbers above 0, such as 0.1,0.5,2");
              }
              bounds.push_back(bound);
            }
            if (bounds.size() > kMaxBuckets) {
              return Bad(value, absl::StrCat("has more than ", kMaxBuckets, " bounds"));
            }
            field(options) = std::move(bounds);
            return absl::OkStatus();
          },
          .get = [=](const ServerOptions& options) -> std::vector<std::string> {
            return {absl::StrJoin(Read(field, options), ",")};
          }};
}

// The path of a file; not set where empty. What it holds is checked where it is read.
Option File(const char* name, const char* help, Accessor<std::string> field) {
  return {.name = name,
          .type = "FILE",
          .help = help,
          .set = [=](const std::string& value, ServerOptions& options) -> absl::Status {
            if (value.empty()) return Bad(value, "is no path of a file");
            field(options) = value;
            return absl::OkStatus();
          },
          .get = [=](const ServerOptions& options) -> std::vector<std::string> {
            const std::string value = Read(field, options);
            return value.empty() ? std::vector<std::string>() : std::vector<std::string>{value};
          }};
}

// --- The options that no kind covers ---

// The last part of a path, without the ending of packed files.
std::string BaseName(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  const std::string last = path.substr(path.rfind('/') + 1);
  return std::string(absl::StripSuffix(last, kPackedExtension));
}

absl::Status SetModel(const std::string& value, ServerOptions& options) {
  const size_t equals = value.find('=');
  ModelSpec spec;
  spec.path = equals == std::string::npos ? value : value.substr(equals + 1);
  spec.name = equals == std::string::npos ? BaseName(value) : value.substr(0, equals);
  if (spec.path.empty()) return Bad(value, "has no path (name=path, or path)");
  if (!IsModelName(spec.name)) {
    return Bad(value,
               "gives no usable model name (name=path; letters, digits and -_.:/, at most 128)");
  }
  for (const ModelSpec& other : options.models) {
    if (other.name == spec.name) {
      return Bad(value, absl::StrCat("repeats the model name ", spec.name, " (use name=path)"));
    }
  }
  if (options.models.size() == kMaxModels) {
    return Bad(value, absl::StrCat("is one too many: at most ", kMaxModels, " models"));
  }
  options.models.push_back(std::move(spec));
  return absl::OkStatus();
}

Option Model() {
  return {.name = "model",
          .type = "[NAME=]DIR|FILE",
          .help =
              "A checkpoint folder or a packed file (firesteel-convert) to serve, and the name "
              "requests "
              "use (default: its own); repeatable, the first is the default model",
          .set = SetModel,
          .get = [](const ServerOptions& options) -> std::vector<std::string> {
            std::vector<std::string> values;
            for (const ModelSpec& spec : options.models) {
              values.push_back(absl::StrCat(spec.name, "=", spec.path));
            }
            return values;
          },
          .repeatable = true};
}

Option Weights() {
  return {.name = "weights",
          .type = "FORMAT",
          .help =
              "How weights are held in memory: auto keeps what the file has, else bf16, int8 or "
              "int4, the last two with exceptions such as int4,head=int8 (attention, predictor, "
              "ffn, head); a packed file is never converted",
          .set = [](const std::string& value, ServerOptions& options) -> absl::Status {
            const absl::StatusOr<WeightFormat> format = WeightFormat::Parse(value);
            if (!format.ok()) return Bad(value, std::string(format.status().message()));
            options.weights = *format;
            return absl::OkStatus();
          },
          .get = [](const ServerOptions& options) -> std::vector<std::string> {
            return {options.weights.Name()};
          }};
}

Option SublinearHead() {
  return {.name = "sublinear-head",
          .type = "on|off",
          .help =
              "Output head that reads a 2-bit copy of the embedding where the largest logits "
              "decide (default: on for embeddings above 64 MiB)",
          .set = [](const std::string& value, ServerOptions& options) -> absl::Status {
            bool on = false;
            if (!ParseSwitch(value, &on)) return Bad(value, "is neither on nor off");
            options.engine.sublinear_head = on;
            return absl::OkStatus();
          },
          .get = [](const ServerOptions& options) -> std::vector<std::string> {
            if (!options.engine.sublinear_head.has_value()) return {};
            return {*options.engine.sublinear_head ? "on" : "off"};
          },
          .is_switch = true};
}

// --- The table ---

const std::vector<Option>& Table() {
  using O = ServerOptions;
  using Compute = std::optional<ComputeType>;
  using KvType = std::optional<kernels::DType>;
  static const auto* const table = new std::vector<Option>{
      Model(),
      Address(
          "address", "Where gRPC listens; port 0 picks a free one",
          +[](O& o) -> std::string& { return o.address; }),
      Address(
          "admin-address",
          "Where AdminService (load, unload, reload models) is served; nowhere without it",
          +[](O& o) -> std::string& { return o.admin_address; }),
      Address(
          "health-address",
          "Where the health service is served in clear text, too, for probes that know no "
          "certificates; nowhere without it",
          +[](O& o) -> std::string& { return o.health_address; }),
      Address(
          "metrics-address", "Where Prometheus metrics are served, at /metrics",
          +[](O& o) -> std::string& { return o.metrics_address; }),
      PerModel(Weights()),
      PerModel(Choice<WeightMemory>(
          "weights-memory", "copy|shared",
          "Where weights of packed files are: in memory of our own, or in the mapped file, so that "
          "servers of one machine share them",
          {{"copy", WeightMemory::kCopy}, {"shared", WeightMemory::kShared}},
          +[](O& o) -> WeightMemory& { return o.weights_memory; })),
      PerModel(Choice<Compute>(
          "compute", "auto|f32|bf16",
          "Precision of activations and products: f32 is the parity mode; auto is integers where "
          "weights are int8 or int4, bf16 where the CPU has matrix units for it, else f32",
          {{"auto", std::nullopt}, {"f32", ComputeType::kF32}, {"bf16", ComputeType::kBF16}},
          +[](O& o) -> Compute& { return o.compute; })),
      Whole<uint32_t>(
          "threads",
          "Compute threads (default: the smaller of cpuset, cgroup quota and physical cores)", 1,
          1024, +[](O& o) -> uint32_t& { return o.threads; }),
      PerModel(Whole<uint32_t>(
          "max-batch-size", "Sequences that run at once", 1, 4096,
          +[](O& o) -> uint32_t& { return o.engine.max_batch_size; })),
      PerModel(Whole<uint32_t>(
          "max-batch-tokens", "Tokens computed in one step: decodes and prefill chunk", 1, 65536,
          +[](O& o) -> uint32_t& { return o.engine.max_batch_tokens; })),
      PerModel(Whole<uint32_t>(
          "max-queue-requests", "Requests that may wait; one more is refused", 1, 1'000'000,
          +[](O& o) -> uint32_t& { return o.engine.max_queue_requests; })),
      PerModel(Whole<uint32_t>(
          "max-queue-tokens", "Prompt tokens that may wait; more are refused", 1, 1'000'000'000,
          +[](O& o) -> uint32_t& { return o.engine.max_queue_tokens; })),
      PerModel(Duration(
          "max-queue-ms", "MS",
          "Longest wait, as estimated: a request whose turn would come later is refused; 0: any",
          absl::Milliseconds(1), 0, 86'400'000,
          +[](O& o) -> absl::Duration& { return o.engine.max_queue_wait; })),
      PerModel(Duration(
          "ageing-seconds", "SECONDS",
          "Who has been the next of its client for so long goes before every priority",
          absl::Seconds(1), 0.001, 86'400,
          +[](O& o) -> absl::Duration& { return o.engine.ageing; })),
      PerModel(Bytes<size_t>(
          "kv-cache-bytes", "Memory for keys and values of each model; 0: a share of the memory", 0,
          uint64_t{1} << 46, +[](O& o) -> size_t& { return o.engine.kv_cache_bytes; })),
      PerModel(Switch(
          "prefix-cache", "Prompts are kept for later ones of the same client that begin alike",
          +[](O& o) -> bool& { return o.engine.prefix_cache; })),
      PerModel(Switch(
          "optimistic-admission",
          "Requests join by what they take of the KV cache at first, not by their worst case; "
          "where "
          "it gets full, those that joined last are computed anew later",
          +[](O& o) -> bool& { return o.engine.optimistic_admission; })),
      PerModel(Choice<KvType>(
          "kv-cache-type", "auto|f32|bf16",
          "How keys and values are cached; auto is f32 with --compute f32, bf16 otherwise",
          {{"auto", std::nullopt}, {"f32", kernels::DType::kF32}, {"bf16", kernels::DType::kBF16}},
          +[](O& o) -> KvType& { return o.kv_cache_type; })),
      PerModel(Whole<uint32_t>(
          "max-prompt-tokens", "Longest prompt; 0: what the model's context allows", 0, 100'000'000,
          +[](O& o) -> uint32_t& { return o.max_prompt_tokens; })),
      Bytes<uint64_t>(
          "max-message-bytes", "Largest request message", 1024, std::numeric_limits<int32_t>::max(),
          +[](O& o) -> uint64_t& { return o.max_message_bytes; }),
      PerModel(Bytes<uint64_t>(
          "max-answer-bytes",
          "Largest answer of a unary call, decided before any work, and largest message of a "
          "stream",
          64 << 10, std::numeric_limits<int32_t>::max(),
          +[](O& o) -> uint64_t& { return o.max_answer_bytes; })),
      PerModel(Duration(
          "target-itl-ms", "MS",
          "Time between two tokens to aim at by shorter prefill chunks; 0: 1.3 times that without "
          "prompts, more where several wait",
          absl::Milliseconds(1), 0, 60'000,
          +[](O& o) -> absl::Duration& { return o.engine.target_itl; })),
      Duration(
          "withdraw-seconds", "SECONDS",
          "Time between SIGTERM, when health turns NOT_SERVING, and refusing new requests",
          absl::Seconds(1), 0, 3'600, +[](O& o) -> absl::Duration& { return o.withdraw; }),
      Duration(
          "drain-seconds", "SECONDS", "Time that running requests have after SIGTERM",
          absl::Seconds(1), 0, 86'400, +[](O& o) -> absl::Duration& { return o.drain; }),
      Duration(
          "stall-seconds", "SECONDS",
          "Health turns NOT_SERVING where work waits and no step ends for so long",
          absl::Seconds(1), 0.1, 86'400, +[](O& o) -> absl::Duration& { return o.stall; }),
      Duration(
          "reader-stall-seconds", "SECONDS",
          "A stream is ended whose reader takes nothing for so long", absl::Seconds(1), 0.1, 86'400,
          +[](O& o) -> absl::Duration& { return o.reader_stall; }),
      Bytes<uint64_t>(
          "reader-buffer-bytes",
          "A stream is ended for whose reader more than this waits to be sent", 1024,
          uint64_t{1} << 40, +[](O& o) -> uint64_t& { return o.reader_buffer_bytes; }),
      Duration(
          "max-connection-age-seconds", "SECONDS",
          "Connections older than this are closed once their calls have ended; 0: never",
          absl::Seconds(1), 0, 2'000'000,
          +[](O& o) -> absl::Duration& { return o.max_connection_age; }),
      Switch(
          "reflection", "gRPC server reflection", +[](O& o) -> bool& { return o.reflection; }),
      Switch(
          "channelz", "gRPC's view of connections and calls (channelz), on the admin address",
          +[](O& o) -> bool& { return o.channelz; }),
      Switch(
          "warmup", "One short generation a model before serving",
          +[](O& o) -> bool& { return o.warmup; }),
      Buckets(
          "latency-buckets", "Bounds of all histograms of seconds",
          +[](O& o) -> std::vector<double>& { return o.metric_buckets.latency; }),
      Buckets(
          "fraction-buckets", "Bounds of all histograms of fractions",
          +[](O& o) -> std::vector<double>& { return o.metric_buckets.fraction; }),
      Buckets(
          "count-buckets", "Bounds of all histograms of tokens, positions and sequences",
          +[](O& o) -> std::vector<double>& { return o.metric_buckets.count; }),
      Choice<std::string>(
          "log-level", "LEVEL", "trace, debug, info, warn, error or off",
          {{"trace", "trace"},
           {"debug", "debug"},
           {"info", "info"},
           {"warn", "warn"},
           {"error", "error"},
           {"off", "off"}},
          +[](O& o) -> std::string& { return o.log_level; }),
      Choice<LogFormat>(
          "log-format", "text|json", "Form of the log lines on standard error",
          {{"text", LogFormat::kText}, {"json", LogFormat::kJson}},
          +[](O& o) -> LogFormat& { return o.log_format; }),
      PerModel(SublinearHead()),
      File(
          "tls-cert", "Certificate chain in PEM; with it gRPC speaks TLS only",
          +[](O& o) -> std::string& { return o.tls_cert; }),
      File(
          "tls-key", "Private key of that certificate, in PEM, without a passphrase",
          +[](O& o) -> std::string& { return o.tls_key; }),
      File(
          "tls-client-ca",
          "Authorities of client certificates, in PEM; with it every client needs one",
          +[](O& o) -> std::string& { return o.tls_client_ca; }),
      File(
          "auth-token-file", "Clients, the SHA-256 of their bearer tokens, and their limits (YAML)",
          +[](O& o) -> std::string& { return o.auth_token_file; }),
      Duration(
          "credentials-reload-seconds", "SECONDS",
          "How often certificates and tokens are looked at for changes", absl::Seconds(1), 0.01,
          86'400, +[](O& o) -> absl::Duration& { return o.credentials_reload; }),
      Action(
          "print-config", "Print the effective configuration as YAML and exit",
          +[](O& o) -> bool& { return o.print_config; }),
      Action(
          "check", "Load everything, generate one token, and exit",
          +[](O& o) -> bool& { return o.check; }),
  };
  return *table;
}

const Option* FindOption(absl::string_view name) {
  for (const Option& option : Table()) {
    if (name == option.name) return &option;
  }
  return nullptr;
}

std::string EnvironmentName(const std::string& option) {
  std::string name = absl::StrCat("FIRESTEEL_", option);
  for (char& c : name) c = c == '-' ? '_' : static_cast<char>(std::toupper(c));
  return name;
}

// --- The three sources ---

/// The values of one option and where they came from, for messages.
struct Given {
  std::string source;
  std::vector<std::string> values;
  /// What else the entry of each value says; of models only. Empty, or as long as `values`.
  std::vector<std::vector<std::pair<std::string, std::string>>> own = {};
};
using Values = std::map<std::string, Given>;

absl::Status FileError(const std::string& path, const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat("--config ", path, ": ", what));
}

std::string OptionName(const YAML::Node& key) {
  return absl::StrReplaceAll(key.Scalar(), {{"_", "-"}});
}

// A model as a map: name (or that of the path), path, and options of its own.
absl::Status AddYamlModel(const std::string& path, const YAML::Node& map, Given* given) {
  std::map<std::string, std::string> entries;
  for (const auto& entry : map) {
    if (!entry.first.IsScalar() || !entry.second.IsScalar()) {
      return FileError(path, "model: an entry has a key or a value that is no plain text");
    }
    if (!entries.emplace(OptionName(entry.first), entry.second.Scalar()).second) {
      return FileError(path, absl::StrCat("model: an entry has the key '",
                                          entry.first.Scalar().substr(0, 100), "' twice"));
    }
  }
  const std::string model_path = std::exchange(entries["path"], "");
  std::string name = std::exchange(entries["name"], "");
  if (model_path.empty()) return FileError(path, "model: an entry has no path");
  if (name.empty()) name = BaseName(model_path);
  if (!IsModelName(name)) {
    return FileError(path, absl::StrCat("model: '", name.substr(0, 100),
                                        "' is no usable model name (letters, digits and -_.:/, at "
                                        "most 128)"));
  }
  entries.erase("path");
  entries.erase("name");
  for (const auto& [key, value] : entries) {
    const Option* const option = FindOption(key);
    if (option == nullptr || !option->per_model) {
      return FileError(path, absl::StrCat("model ", name.substr(0, 100), ": '", key.substr(0, 100),
                                          "' is no option that a model can have of its own"));
    }
  }
  given->values.push_back(absl::StrCat(name, "=", model_path));
  given->own.resize(given->values.size());
  given->own.back().assign(entries.begin(), entries.end());
  return absl::OkStatus();
}

absl::Status AddYamlList(const std::string& path, const std::string& key, const YAML::Node& list,
                         Given* given) {
  for (const auto& item : list) {
    if (item.IsMap()) {
      const absl::Status status = AddYamlModel(path, item, given);
      if (!status.ok()) return status;
    } else if (item.IsScalar()) {
      given->values.push_back(item.Scalar());
    } else {
      return FileError(path, absl::StrCat(key, ": an entry is neither text nor a map"));
    }
  }
  given->own.resize(given->values.size());
  return absl::OkStatus();
}

absl::Status AddYamlEntry(const std::string& path, const YAML::Node& key_node,
                          const YAML::Node& value, Values* values) {
  if (!key_node.IsScalar()) return FileError(path, "a key is not a plain name");
  const std::string key = OptionName(key_node);
  const Option* option = FindOption(key);
  if (option == nullptr || option->is_action) {
    return FileError(path, absl::StrCat("unknown key '", key_node.Scalar().substr(0, 100), "'"));
  }
  Given given{.source = absl::StrCat(path, ": ", option->name), .values = {}};
  if (value.IsScalar()) {
    given.values = {value.Scalar()};
  } else if (value.IsSequence() && option->repeatable) {
    const absl::Status status = AddYamlList(path, key, value, &given);
    if (!status.ok()) return status;
  } else {
    return FileError(path, absl::StrCat(key, ": needs one plain value",
                                        option->repeatable ? ", or a list of them" : ""));
  }
  if (!values->emplace(option->name, std::move(given)).second) {
    return FileError(path, absl::StrCat("key '", key, "' is given twice"));
  }
  return absl::OkStatus();
}

absl::StatusOr<Values> ReadYaml(const std::string& path) {
  const auto text = ReadSmallFile(path);
  if (!text.ok()) return FileError(path, std::string(text.status().message()));
  Values values;
  try {
    const YAML::Node root = YAML::Load(*text);
    if (root.IsNull()) return values;  // an empty file
    if (!root.IsMap()) return FileError(path, "is not a list of `key: value` lines");
    for (const auto& entry : root) {
      const absl::Status status = AddYamlEntry(path, entry.first, entry.second, &values);
      if (!status.ok()) return status;
    }
  } catch (const YAML::Exception& e) {
    return FileError(path, absl::StrCat("is not YAML: ", e.what()));
  }
  return values;
}

Values ReadEnvironment(const Environment& environment) {
  Values values;
  for (const Option& option : Table()) {
    const std::string name = EnvironmentName(option.name);
    const std::optional<std::string> text = environment(name);
    if (!text.has_value() || text->empty()) continue;
    Given given{.source = name, .values = {}};
    if (option.repeatable) {
      given.values = absl::StrSplit(*text, ',', absl::SkipEmpty());
    } else {
      given.values = {*text};
    }
    values.emplace(option.name, std::move(given));
  }
  return values;
}

/// What stands on the command line besides options of the table.
struct Flags {
  Values values;
  std::string config;
  bool version = false;
  std::string help;  // its text, where asked for
};

std::string Footer() {
  std::vector<std::string> own;
  for (const Option& option : Table()) {
    if (option.per_model) own.emplace_back(option.name);
  }
  return absl::StrCat(
      "Every option is also an environment variable (FIRESTEEL_MAX_BATCH_SIZE for "
      "--max-batch-size) and a key of\n"
      "the YAML file (max-batch-size: 32). The command line wins, then the environment, then the "
      "file.\n"
      "In the file a model may also be a map of name, path and values of its own for:\n",
      absl::StrJoin(own, ", "),
      ".\n"
      "FIRESTEEL_SIMD_TARGET restricts the kernels to one SIMD target.");
}

absl::StatusOr<Flags> ReadFlags(const std::vector<std::string>& arguments) {
  Flags flags;
  CLI::App app{"Serves Spark Transformers over gRPC.", "firesteel-server"};
  app.footer(Footer());
  app.add_option("--config", flags.config, "A YAML file of options")->type_name("FILE");
  app.add_flag("--version", flags.version, "Print the version and exit");
  std::map<std::string, std::pair<CLI::Option*, std::vector<std::string>>> found;
  for (const Option& option : Table()) {
    auto& slot = found[option.name];
    slot.first = app.add_option(absl::StrCat("--", option.name), slot.second, option.help)
                     ->type_name(option.type)
                     ->allow_extra_args(false);
    if (option.is_switch) slot.first->expected(0, 1)->default_str("");
  }
  app.allow_extras();
  try {
    app.parse(std::vector<std::string>(arguments.rbegin(), arguments.rend()));
    const std::vector<std::string> rest = app.remaining();
    if (!rest.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat("unknown option '", rest.front(), "' (see --help)"));
    }
  } catch (const CLI::CallForHelp&) {
    flags.help = app.help();
    return flags;
  } catch (const CLI::ParseError& e) {
    return absl::InvalidArgumentError(e.what());
  }
  for (auto& [name, slot] : found) {
    auto& [cli, values] = slot;
    if (cli->count() == 0) continue;
    for (std::string& value : values) {
      if (FindOption(name)->is_switch && value.empty()) value = "on";
    }
    if (values.empty()) values = {"on"};
    flags.values[name] = Given{.source = absl::StrCat("--", name), .values = std::move(values)};
  }
  return flags;
}

// --- Together ---

// The options of one model from those of all.
absl::StatusOr<ServerOptions> WithOwn(const ModelSpec& spec, ServerOptions options) {
  for (const auto& [name, value] : spec.own) {
    const absl::Status status = FindOption(name)->set(value, options);
    if (!status.ok()) {
      return absl::InvalidArgumentError(absl::StrCat(name, ": ", status.message()));
    }
  }
  return options;
}

absl::Status Apply(const Option& option, const Given& given, ServerOptions* options) {
  if (given.values.size() > 1 && !option.repeatable) {
    return absl::InvalidArgumentError(
        absl::StrCat(given.source, ": is given ", given.values.size(), " times"));
  }
  for (size_t i = 0; i < given.values.size(); ++i) {
    const absl::Status status = option.set(given.values[i], *options);
    if (!status.ok()) {
      return absl::InvalidArgumentError(absl::StrCat(given.source, ": ", status.message()));
    }
    if (given.own.empty()) continue;
    ModelSpec& spec = options->models.back();
    spec.own = given.own[i];
    const absl::Status own = WithOwn(spec, *options).status();
    if (!own.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat(given.source, " ", spec.name, ": ", own.message()));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckBatch(const ServerOptions& options) {
  if (options.engine.max_batch_tokens < options.engine.max_batch_size) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--max-batch-tokens: '", options.engine.max_batch_tokens, "' is below --max-batch-size (",
        options.engine.max_batch_size, "): every running sequence needs one token a step"));
  }
  return absl::OkStatus();
}

absl::Status CheckTogether(const ServerOptions& options) {
  if (const absl::Status status = CheckBatch(options); !status.ok()) return status;
  for (const ModelSpec& spec : options.models) {
    const absl::Status status = CheckBatch(OptionsOf(spec.name, options));
    if (!status.ok()) {
      return absl::InvalidArgumentError(absl::StrCat("model ", spec.name, ": ", status.message()));
    }
  }
  if (options.tls_cert.empty() != options.tls_key.empty()) {
    return absl::InvalidArgumentError(
        options.tls_key.empty()
            ? absl::StrCat("--tls-key: is needed beside --tls-cert '", options.tls_cert, "'")
            : absl::StrCat("--tls-cert: is needed beside --tls-key '", options.tls_key, "'"));
  }
  if (!options.tls_client_ca.empty() && options.tls_cert.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--tls-cert: is needed beside --tls-client-ca '", options.tls_client_ca, "'"));
  }
  if (options.channelz && options.admin_address.empty()) {
    return absl::InvalidArgumentError("--channelz: needs --admin-address, where it is served");
  }
  if (options.models.empty() && !options.print_config) {
    return absl::InvalidArgumentError(
        "--model: at least one model is needed (a checkpoint folder or a packed file)");
  }
  return absl::OkStatus();
}

}  // namespace

ServerOptions OptionsOf(const std::string& model_name, const ServerOptions& options) {
  for (const ModelSpec& spec : options.models) {
    if (spec.name != model_name) continue;
    auto own = WithOwn(spec, options);
    if (own.ok()) return *std::move(own);  // as Apply saw to
  }
  return options;
}

kernels::DType KvCacheType(const ServerOptions& options) {
  if (options.kv_cache_type.has_value()) return *options.kv_cache_type;
  return options.compute == ComputeType::kF32 ? kernels::DType::kF32 : kernels::DType::kBF16;
}

bool IsModelName(const std::string& name) {
  return !name.empty() && name.size() <= 128 &&
         std::all_of(name.begin(), name.end(), [](unsigned char c) {
           return std::isalnum(c) || c == '-' || c == '_' || c == '.' || c == ':' || c == '/';
         });
}

const char* Version() { return FIRESTEEL_VERSION; }

Environment ProcessEnvironment() {
  return [](const std::string& name) -> std::optional<std::string> {
    const char* value = std::getenv(name.c_str());
    if (value == nullptr) return std::nullopt;
    return value;
  };
}

namespace {

void EmitModels(const std::vector<ModelSpec>& models, YAML::Emitter* out) {
  *out << YAML::BeginSeq;
  for (const ModelSpec& spec : models) {
    if (spec.own.empty()) {
      *out << absl::StrCat(spec.name, "=", spec.path);
      continue;
    }
    *out << YAML::BeginMap << YAML::Key << "name" << YAML::Value << spec.name << YAML::Key << "path"
         << YAML::Value << spec.path;
    for (const auto& [name, value] : spec.own) {
      *out << YAML::Key << name << YAML::Value << value;
    }
    *out << YAML::EndMap;
  }
  *out << YAML::EndSeq;
}

}  // namespace

std::string ToYaml(const ServerOptions& options) {
  YAML::Emitter out;
  out << YAML::BeginMap;
  for (const Option& option : Table()) {
    const std::vector<std::string> values = option.get(options);
    if (option.is_action || (values.empty() && !option.repeatable)) continue;
    out << YAML::Key << option.name << YAML::Value;
    if (option.repeatable) {
      EmitModels(options.models, &out);
    } else {
      out << values.front();
    }
  }
  out << YAML::EndMap;
  return absl::StrCat(out.c_str(), "\n");
}

absl::StatusOr<CommandLine> ParseCommandLine(const std::vector<std::string>& arguments,
                                             const Environment& environment) {
  auto flags = ReadFlags(arguments);
  if (!flags.ok()) return flags.status();
  CommandLine out;
  if (!flags->help.empty() || flags->version) {
    out.action = CommandLine::Action::kPrint;
    out.text = flags->version ? absl::StrCat("firesteel-server ", Version(), "\n") : flags->help;
    return out;
  }

  // Weakest first: a stronger source replaces the whole value, also that of a repeatable option.
  Values values;
  std::string config = flags->config;
  if (config.empty()) config = environment("FIRESTEEL_CONFIG").value_or("");
  if (!config.empty()) {
    auto file = ReadYaml(config);
    if (!file.ok()) return file.status();
    values = *std::move(file);
  }
  for (auto& [name, given] : ReadEnvironment(environment)) values[name] = given;
  for (auto& [name, given] : flags->values) values[name] = given;

  out.options.threads = static_cast<uint32_t>(DefaultThreadCount());
  for (const Option& option : Table()) {
    const auto given = values.find(option.name);
    if (given == values.end()) continue;
    const absl::Status status = Apply(option, given->second, &out.options);
    if (!status.ok()) return status;
  }
  if (const absl::Status status = CheckTogether(out.options); !status.ok()) return status;

  if (out.options.print_config) {
    out.action = CommandLine::Action::kPrint;
    out.text = ToYaml(out.options);
  } else if (out.options.check) {
    out.action = CommandLine::Action::kCheck;
  }
  return out;
}

}  // namespace firesteel::server
