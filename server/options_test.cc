#include "server/options.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <map>

#include "runtime/threading/cpu_topology.h"

namespace firesteel::server {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

using Variables = std::map<std::string, std::string>;

absl::StatusOr<CommandLine> Parse(const std::vector<std::string>& arguments,
                                  const Variables& variables = {}) {
  return ParseCommandLine(arguments, [&](const std::string& name) -> std::optional<std::string> {
    const auto entry = variables.find(name);
    if (entry == variables.end()) return std::nullopt;
    return entry->second;
  });
}

ServerOptions ParseOk(std::vector<std::string> arguments, const Variables& variables = {}) {
  arguments.push_back("--model=/m/one");
  const auto command = Parse(arguments, variables);
  EXPECT_TRUE(command.ok()) << command.status();
  return command.ok() ? command->options : ServerOptions();
}

std::string ParseError(const std::vector<std::string>& arguments, const Variables& variables = {}) {
  const auto command = Parse(arguments, variables);
  EXPECT_FALSE(command.ok());
  EXPECT_EQ(command.status().code(), absl::StatusCode::kInvalidArgument);
  const std::string message(command.status().message());
  EXPECT_THAT(message, Not(HasSubstr("\n"))) << "one line";
  return message;
}

/// A file that is gone with the test.
class ConfigFile {
 public:
  explicit ConfigFile(const std::string& text)
      : path_(std::filesystem::path(testing::TempDir()) /
              ("firesteel_options_" + std::to_string(getpid()) + ".yaml")) {
    std::ofstream(path_) << text;
  }
  ~ConfigFile() { std::filesystem::remove(path_); }
  std::string path() const { return path_.string(); }

 private:
  const std::filesystem::path path_;
};

TEST(OptionsTest, DefaultsAreThoseOfTheContract) {
  const ServerOptions options = ParseOk({});
  EXPECT_EQ(options.address, "127.0.0.1:50051");
  EXPECT_EQ(options.metrics_address, "127.0.0.1:9464");
  EXPECT_EQ(options.weights, WeightFormat::kAuto);
  EXPECT_EQ(options.weights_memory, WeightMemory::kCopy);
  EXPECT_FALSE(options.compute.has_value());
  EXPECT_EQ(options.threads, DefaultThreadCount());
  EXPECT_EQ(options.engine.max_batch_size, EngineOptions().max_batch_size);
  EXPECT_EQ(options.drain, absl::Seconds(30));
  EXPECT_EQ(options.stall, absl::Seconds(30));
  EXPECT_TRUE(options.reflection);
  EXPECT_TRUE(options.warmup);
  EXPECT_EQ(options.log_format, LogFormat::kText);
}

TEST(OptionsTest, EveryValueReachesItsField) {
  const ServerOptions options = ParseOk({"--address",
                                         "[::1]:0",
                                         "--metrics-address=localhost:1",
                                         "--weights",
                                         "bf16",
                                         "--weights-memory",
                                         "shared",
                                         "--compute",
                                         "f32",
                                         "--threads",
                                         "3",
                                         "--max-batch-size",
                                         "4",
                                         "--max-batch-tokens",
                                         "64",
                                         "--max-queue-requests",
                                         "5",
                                         "--max-queue-tokens",
                                         "600",
                                         "--max-queue-ms",
                                         "250",
                                         "--ageing-seconds",
                                         "2.5",
                                         "--kv-cache-bytes",
                                         "2MiB",
                                         "--prefix-cache",
                                         "off",
                                         "--optimistic-admission",
                                         "--kv-cache-type",
                                         "bf16",
                                         "--max-prompt-tokens",
                                         "7",
                                         "--max-message-bytes",
                                         "64KiB",
                                         "--max-answer-bytes",
                                         "1MiB",
                                         "--target-itl-ms",
                                         "12.5",
                                         "--drain-seconds",
                                         "1.5",
                                         "--stall-seconds",
                                         "9",
                                         "--latency-buckets",
                                         "0.25, 1,2.5",
                                         "--fraction-buckets",
                                         "0.5",
                                         "--count-buckets",
                                         "1,1e3",
                                         "--reflection",
                                         "off",
                                         "--warmup",
                                         "off",
                                         "--log-level",
                                         "debug",
                                         "--log-format",
                                         "json",
                                         "--sublinear-head",
                                         "off"});
  EXPECT_EQ(options.address, "[::1]:0");
  EXPECT_EQ(options.metrics_address, "localhost:1");
  EXPECT_EQ(options.weights, WeightFormat::kBF16);
  EXPECT_EQ(options.weights_memory, WeightMemory::kShared);
  EXPECT_EQ(options.compute, ComputeType::kF32);
  EXPECT_EQ(options.threads, 3u);
  EXPECT_EQ(options.engine.max_batch_size, 4u);
  EXPECT_EQ(options.engine.max_batch_tokens, 64u);
  EXPECT_EQ(options.engine.max_queue_requests, 5u);
  EXPECT_EQ(options.engine.max_queue_tokens, 600u);
  EXPECT_EQ(options.engine.max_queue_wait, absl::Milliseconds(250));
  EXPECT_EQ(options.engine.ageing, absl::Seconds(2.5));
  EXPECT_EQ(options.engine.kv_cache_bytes, 2u << 20);
  EXPECT_FALSE(options.engine.prefix_cache);
  EXPECT_TRUE(options.engine.optimistic_admission);
  EXPECT_EQ(options.kv_cache_type, kernels::DType::kBF16);
  EXPECT_EQ(options.max_prompt_tokens, 7u);
  EXPECT_EQ(options.max_message_bytes, 64u << 10);
  EXPECT_EQ(options.max_answer_bytes, 1u << 20);
  EXPECT_EQ(options.engine.target_itl, absl::Microseconds(12500));
  EXPECT_EQ(options.drain, absl::Milliseconds(1500));
  EXPECT_EQ(options.stall, absl::Seconds(9));
  EXPECT_EQ(options.metric_buckets.latency, (std::vector<double>{0.25, 1, 2.5}));
  EXPECT_EQ(options.metric_buckets.fraction, std::vector<double>{0.5});
  EXPECT_EQ(options.metric_buckets.count, (std::vector<double>{1, 1000}));
  EXPECT_FALSE(options.reflection);
  EXPECT_FALSE(options.warmup);
  EXPECT_EQ(options.log_level, "debug");
  EXPECT_EQ(options.log_format, LogFormat::kJson);
  EXPECT_EQ(options.engine.sublinear_head, false);
}

TEST(OptionsTest, TheCacheIsOfF32WhereF32WasAskedFor) {
  using kernels::DType;
  struct Case {
    std::vector<std::string> arguments;
    DType expected;
  };
  for (const Case& c :
       std::vector<Case>{{{}, DType::kBF16},
                         {{"--compute", "auto"}, DType::kBF16},
                         {{"--compute", "bf16"}, DType::kBF16},
                         {{"--compute", "f32"}, DType::kF32},
                         {{"--compute", "f32", "--kv-cache-type", "auto"}, DType::kF32},
                         {{"--compute", "f32", "--kv-cache-type", "bf16"}, DType::kBF16},
                         {{"--compute", "bf16", "--kv-cache-type", "f32"}, DType::kF32},
                         {{"--kv-cache-type", "f32"}, DType::kF32}}) {
    EXPECT_EQ(KvCacheType(ParseOk(c.arguments)), c.expected)
        << ::testing::PrintToString(c.arguments);
  }
  EXPECT_EQ(KvCacheType(ParseOk({}, {{"FIRESTEEL_KV_CACHE_TYPE", "f32"}})), DType::kF32);
  EXPECT_THAT(ParseError({"--kv-cache-type", "int8"}),
              AllOf(HasSubstr("--kv-cache-type"), HasSubstr("int8"), HasSubstr("bf16")));
}

TEST(OptionsTest, ModelsHaveNamesOfTheirOwnOrOfTheirFolder) {
  const auto command = Parse({"--model", "big=/m/x", "--model", "/m/spark-stories/"});
  ASSERT_TRUE(command.ok()) << command.status();
  ASSERT_EQ(command->options.models.size(), 2u);
  EXPECT_EQ(command->options.models[0].name, "big");
  EXPECT_EQ(command->options.models[0].path, "/m/x");
  EXPECT_EQ(command->options.models[1].name, "spark-stories");
  EXPECT_EQ(command->options.models[1].path, "/m/spark-stories/");
}

TEST(OptionsTest, FlagWinsThenEnvironmentThenFile) {
  const ConfigFile file("max-batch-size: 1\nmax_queue_requests: 2\nthreads: 3\nmodel: [/m/file]\n");
  const auto command =
      Parse({"--config", file.path(), "--max-batch-size", "11"},
            {{"FIRESTEEL_MAX_BATCH_SIZE", "21"}, {"FIRESTEEL_MAX_QUEUE_REQUESTS", "22"}});
  ASSERT_TRUE(command.ok()) << command.status();
  EXPECT_EQ(command->options.engine.max_batch_size, 11u);
  EXPECT_EQ(command->options.engine.max_queue_requests, 22u);
  EXPECT_EQ(command->options.threads, 3u);
  EXPECT_EQ(command->options.models.at(0).path, "/m/file");
}

TEST(OptionsTest, AStrongerSourceReplacesAllModels) {
  const ConfigFile file("model:\n  - a=/m/a\n  - b=/m/b\n");
  const auto from_environment =
      Parse({}, {{"FIRESTEEL_CONFIG", file.path()}, {"FIRESTEEL_MODEL", "c=/m/c,/m/d"}});
  ASSERT_TRUE(from_environment.ok()) << from_environment.status();
  ASSERT_EQ(from_environment->options.models.size(), 2u);
  EXPECT_EQ(from_environment->options.models[0].name, "c");
  EXPECT_EQ(from_environment->options.models[1].name, "d");
}

TEST(OptionsTest, EmptyAndUnknownVariablesAreNoOptions) {
  const ServerOptions options =
      ParseOk({}, {{"FIRESTEEL_THREADS", ""}, {"FIRESTEEL_TEST_MODELS", "/x"}});
  EXPECT_EQ(options.threads, DefaultThreadCount());
}

TEST(OptionsTest, SwitchMayStandAlone) {
  EXPECT_TRUE(ParseOk({"--warmup", "--threads", "1"}).warmup);
  EXPECT_FALSE(ParseOk({}, {{"FIRESTEEL_WARMUP", "false"}}).warmup);
}

TEST(OptionsTest, PrintedConfigurationReadsBackAsItself) {
  const auto printed = Parse({"--print-config", "--model", "a=/m/a", "--model", "/m/b",
                              "--kv-cache-bytes", "1GiB", "--drain-seconds", "2.5"});
  ASSERT_TRUE(printed.ok()) << printed.status();
  EXPECT_EQ(printed->action, CommandLine::Action::kPrint);
  EXPECT_THAT(printed->text,
              AllOf(HasSubstr("kv-cache-bytes: 1073741824"), HasSubstr("drain-seconds: 2.5"),
                    HasSubstr("a=/m/a"), HasSubstr("b=/m/b"), Not(HasSubstr("print-config"))));
  const ConfigFile file(printed->text);
  const auto again = Parse({"--config", file.path()});
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(ToYaml(again->options), printed->text);
}

TEST(OptionsTest, ModelsMayHaveOptionsOfTheirOwn) {
  const ConfigFile file(
      "max-batch-size: 16\nkv-cache-bytes: 1GiB\n"
      "model:\n"
      "  - small=/m/small\n"
      "  - name: big\n    path: /m/b=g\n    max_batch_size: 4\n    kv-cache-bytes: 2MiB\n"
      "    max-prompt-tokens: 77\n    max-queue-requests: 3\n    weights: int8\n"
      "  - path: /m/other/\n    max-batch-tokens: 64\n");
  const auto command = Parse({"--config", file.path()});
  ASSERT_TRUE(command.ok()) << command.status();
  const ServerOptions& all = command->options;
  ASSERT_EQ(all.models.size(), 3u);
  EXPECT_EQ(all.models[1].path, "/m/b=g");
  EXPECT_EQ(all.models[2].name, "other");
  EXPECT_EQ(all.engine.max_batch_size, 16u);

  const ServerOptions big = OptionsOf("big", all);
  EXPECT_EQ(big.engine.max_batch_size, 4u);
  EXPECT_EQ(big.engine.kv_cache_bytes, 2u << 20);
  EXPECT_EQ(big.max_prompt_tokens, 77u);
  EXPECT_EQ(big.engine.max_queue_requests, 3u);
  EXPECT_EQ(big.weights, WeightFormat::kI8);
  EXPECT_EQ(OptionsOf("other", all).engine.max_batch_tokens, 64u);
  for (const char* name : {"small", "other", "loaded-later"}) {
    const ServerOptions general = OptionsOf(name, all);
    EXPECT_EQ(general.engine.max_batch_size, 16u) << name;
    EXPECT_EQ(general.engine.kv_cache_bytes, 1u << 30) << name;
    EXPECT_EQ(general.max_prompt_tokens, 0u) << name;
  }

  // --print-config tells of them and reads back as itself.
  const std::string printed = ToYaml(all);
  EXPECT_THAT(printed, AllOf(HasSubstr("name: big"), HasSubstr("max-prompt-tokens: 77"),
                             HasSubstr("- small=/m/small")));
  const ConfigFile again_file(printed);
  const auto again = Parse({"--config", again_file.path()});
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(ToYaml(again->options), printed);
  EXPECT_EQ(OptionsOf("big", again->options).engine.max_batch_size, 4u);
}

TEST(OptionsTest, OptionsOfAModelAreCheckedAsOthersAre) {
  const auto error = [](const std::string& entry) {
    const ConfigFile file("max-batch-size: 16\nmodel:\n  - path: /m/a\n" + entry);
    return ParseError({"--config", file.path()});
  };
  EXPECT_THAT(error("    max-batch-size: none\n"),
              AllOf(HasSubstr(".yaml: model a: max-batch-size: 'none'"), HasSubstr("1 to 4096")));
  EXPECT_THAT(error("    max-batch-tokens: 8\n"),
              AllOf(HasSubstr("model a"), HasSubstr("'8' is below --max-batch-size (16)")));
  EXPECT_THAT(error("    address: 127.0.0.1:1\n"), HasSubstr("model a: 'address'"));
  EXPECT_THAT(error("    max-batch: 8\n"), HasSubstr("model a: 'max-batch'"));
  EXPECT_THAT(error("    max-batch-size: [1, 2]\n"), HasSubstr("no plain text"));
  EXPECT_THAT(error("    max-batch-size: 1\n    max_batch_size: 2\n"), HasSubstr("twice"));
  EXPECT_THAT(error("  - name: b\n"), HasSubstr("no path"));
  EXPECT_THAT(error("  - name: b=c\n    path: /m/b\n"), HasSubstr("'b=c'"));
  EXPECT_THAT(error("  - name: a\n    path: /m/b\n"), HasSubstr("repeats the model name a"));
  EXPECT_THAT(error("  - [x]\n"), HasSubstr("neither text nor a map"));
}

TEST(OptionsTest, ChannelzIsServedToAdmins) {
  EXPECT_THAT(ParseError({"--model", "/m/a", "--channelz"}), HasSubstr("--admin-address"));
  EXPECT_TRUE(ParseOk({"--channelz", "--admin-address", "127.0.0.1:0"}).channelz);
  EXPECT_FALSE(ParseOk({}).channelz);
}

TEST(OptionsTest, HelpAndVersionNeedNothingElse) {
  const auto help = Parse({"--help"});
  ASSERT_TRUE(help.ok());
  EXPECT_EQ(help->action, CommandLine::Action::kPrint);
  EXPECT_THAT(help->text, AllOf(HasSubstr("--max-batch-size"), HasSubstr("--config")));
  const auto version = Parse({"--version"});
  ASSERT_TRUE(version.ok());
  EXPECT_EQ(version->text, std::string("firesteel-server ") + Version() + "\n");
}

TEST(OptionsTest, CheckIsAnActionOfItsOwn) {
  const auto command = Parse({"--check", "--model", "/m/a"});
  ASSERT_TRUE(command.ok()) << command.status();
  EXPECT_EQ(command->action, CommandLine::Action::kCheck);
}

TEST(OptionsTest, AModelIsNeeded) { EXPECT_THAT(ParseError({}), HasSubstr("--model")); }

TEST(OptionsTest, OptionsOfOperationReachTheirFields) {
  const ServerOptions defaults = ParseOk({});
  EXPECT_EQ(defaults.admin_address, "");
  EXPECT_EQ(defaults.health_address, "");
  EXPECT_EQ(defaults.withdraw, absl::ZeroDuration());
  EXPECT_EQ(defaults.max_connection_age, absl::ZeroDuration());
  const ServerOptions options =
      ParseOk({"--admin-address=127.0.0.1:0", "--health-address=127.0.0.1:1", "--tls-cert=c",
               "--tls-key=k", "--tls-client-ca=a", "--auth-token-file=t",
               "--credentials-reload-seconds=2", "--withdraw-seconds=5", "--reader-stall-seconds=7",
               "--reader-buffer-bytes=1MiB", "--max-connection-age-seconds=3600"});
  EXPECT_EQ(options.admin_address, "127.0.0.1:0");
  EXPECT_EQ(options.health_address, "127.0.0.1:1");
  EXPECT_EQ(options.tls_cert, "c");
  EXPECT_EQ(options.tls_key, "k");
  EXPECT_EQ(options.tls_client_ca, "a");
  EXPECT_EQ(options.auth_token_file, "t");
  EXPECT_EQ(options.credentials_reload, absl::Seconds(2));
  EXPECT_EQ(options.withdraw, absl::Seconds(5));
  EXPECT_EQ(options.reader_stall, absl::Seconds(7));
  EXPECT_EQ(options.reader_buffer_bytes, uint64_t{1} << 20);
  EXPECT_EQ(options.max_connection_age, absl::Hours(1));
  const auto printed = Parse({"--print-config", "--tls-cert=c", "--tls-key=k"});
  ASSERT_TRUE(printed.ok());
  EXPECT_THAT(printed->text, AllOf(HasSubstr("tls-cert: c"), Not(HasSubstr("auth-token-file"))));
}

struct BadCase {
  const char* name;
  std::vector<std::string> arguments;
  std::vector<std::string> says;
};

void PrintTo(const BadCase& row, std::ostream* out) { *out << row.name; }

class BadOptionTest : public testing::TestWithParam<BadCase> {};

TEST_P(BadOptionTest, IsRefusedByNameAndValue) {
  std::vector<std::string> arguments = {"--model", "/m/a"};
  arguments.insert(arguments.end(), GetParam().arguments.begin(), GetParam().arguments.end());
  const std::string message = ParseError(arguments);
  for (const std::string& part : GetParam().says) EXPECT_THAT(message, HasSubstr(part));
}

INSTANTIATE_TEST_SUITE_P(
    All, BadOptionTest,
    testing::Values(
        BadCase{"Unknown", {"--frobnicate", "3"}, {"--frobnicate"}},
        BadCase{"Positional", {"stray"}, {"stray"}},
        BadCase{"NoValue", {"--threads"}, {"--threads"}},
        BadCase{"NoNumber", {"--threads", "two"}, {"--threads", "'two'", "1 to 1024"}},
        BadCase{"Negative", {"--max-batch-size=-1"}, {"--max-batch-size", "'-1'"}},
        BadCase{"Zero", {"--max-batch-size", "0"}, {"--max-batch-size", "'0'", "1 to"}},
        BadCase{"TooLarge", {"--threads", "99999999999999999999"}, {"--threads"}},
        BadCase{"Fraction", {"--max-queue-requests", "1.5"}, {"--max-queue-requests", "'1.5'"}},
        BadCase{"Twice", {"--threads", "1", "--threads", "2"}, {"--threads", "2 times"}},
        BadCase{"NoSwitch", {"--warmup", "maybe"}, {"--warmup", "'maybe'", "on nor off"}},
        BadCase{"NoChoice", {"--compute", "f64"}, {"--compute", "'f64'", "auto, f32, bf16"}},
        BadCase{"NoLevel", {"--log-level", "loud"}, {"--log-level", "'loud'"}},
        BadCase{"NoSuffix", {"--kv-cache-bytes", "3MB"}, {"--kv-cache-bytes", "'3MB'", "MiB"}},
        BadCase{"BytesOverflow", {"--kv-cache-bytes", "99999999TiB"}, {"--kv-cache-bytes"}},
        BadCase{"BytesEmpty", {"--kv-cache-bytes", "GiB"}, {"--kv-cache-bytes"}},
        BadCase{"MessageTooLarge", {"--max-message-bytes", "4GiB"}, {"--max-message-bytes"}},
        BadCase{"NotFinite", {"--drain-seconds", "nan"}, {"--drain-seconds", "'nan'"}},
        BadCase{"NoBuckets", {"--latency-buckets", ","}, {"--latency-buckets", "','"}},
        BadCase{"FallingBuckets", {"--count-buckets", "1,3,3"}, {"--count-buckets", "rising"}},
        BadCase{"InfiniteBucket", {"--fraction-buckets", "0.5,inf"}, {"--fraction-buckets"}},
        BadCase{"NoNumberInBuckets", {"--latency-buckets", "0.1,nan"}, {"--latency-buckets"}},
        BadCase{"NegativeBucket", {"--latency-buckets", "-1,1"}, {"--latency-buckets"}},
        BadCase{"NoStall", {"--stall-seconds", "0"}, {"--stall-seconds", "'0'"}},
        BadCase{"NoAgeing", {"--ageing-seconds", "0"}, {"--ageing-seconds", "'0'", "0.001"}},
        BadCase{"NegativeWait", {"--max-queue-ms", "-1"}, {"--max-queue-ms", "'-1'"}},
        BadCase{"CacheIsNeither", {"--prefix-cache", "1"}, {"--prefix-cache", "'1'", "on nor off"}},
        BadCase{"NoPort", {"--address", "localhost"}, {"--address", "'localhost'", "HOST:PORT"}},
        BadCase{"PortTooLarge", {"--address", "a:65536"}, {"--address", "'a:65536'"}},
        BadCase{"NoHost", {"--address", ":80"}, {"--address", "':80'"}},
        BadCase{"TwoPorts", {"--metrics-address", "a:1,b:2"}, {"--metrics-address"}},
        BadCase{"TlsPort", {"--metrics-address", "a:1s"}, {"--metrics-address"}},
        BadCase{"UnixSocket", {"--address", "unix:/x"}, {"--address"}},
        BadCase{"ModelWithoutPath", {"--model", "x="}, {"--model", "'x='"}},
        BadCase{"ModelWithoutName", {"--model", "=/m"}, {"--model", "'=/m'"}},
        BadCase{"SameModelTwice", {"--model", "/n/a"}, {"--model", "'/n/a'", "a"}},
        BadCase{"BatchTokensBelowBatch",
                {"--max-batch-size", "64", "--max-batch-tokens", "8"},
                {"--max-batch-tokens", "'8'", "--max-batch-size", "64"}},
        BadCase{"CertWithoutKey", {"--tls-cert", "c.pem"}, {"--tls-key", "c.pem"}},
        BadCase{"KeyWithoutCert", {"--tls-key", "k.pem"}, {"--tls-cert", "k.pem"}},
        BadCase{"CaWithoutCert", {"--tls-client-ca", "a"}, {"--tls-cert", "--tls-client-ca 'a'"}},
        BadCase{"EmptyTokenFile", {"--auth-token-file", ""}, {"--auth-token-file", "no path"}},
        BadCase{"BadAdminAddress", {"--admin-address", "x"}, {"--admin-address", "HOST:PORT"}},
        BadCase{"HeadIsNeither", {"--sublinear-head", "auto"}, {"--sublinear-head", "'auto'"}},
        BadCase{"UnknownWeights",
                {"--weights", "q3"},
                {"--weights", "'q3'", "auto, f32, bf16, int8 or int4"}},
        BadCase{"NoConfigFile", {"--config", "/no/such.yaml"}, {"--config", "/no/such.yaml"}},
        BadCase{"ConfigIsFolder", {"--config", "/"}, {"--config /", "read"}}),
    [](const auto& row) { return row.param.name; });

TEST(OptionsTest, BadEnvironmentNamesTheVariable) {
  EXPECT_THAT(ParseError({"--model", "/m"}, {{"FIRESTEEL_LOG_FORMAT", "xml"}}),
              AllOf(HasSubstr("FIRESTEEL_LOG_FORMAT"), HasSubstr("'xml'"), HasSubstr("text")));
}

struct BadFile {
  const char* name;
  const char* text;
  std::vector<std::string> says;
};

void PrintTo(const BadFile& file, std::ostream* out) { *out << file.text; }

class BadFileTest : public testing::TestWithParam<BadFile> {};

TEST_P(BadFileTest, IsRefusedByKey) {
  const ConfigFile file(GetParam().text);
  const std::string message = ParseError({"--model", "/m", "--config", file.path()});
  EXPECT_THAT(message, HasSubstr(file.path()));
  for (const std::string& part : GetParam().says) EXPECT_THAT(message, HasSubstr(part));
}

INSTANTIATE_TEST_SUITE_P(
    All, BadFileTest,
    testing::Values(BadFile{"UnknownKey", "frobnicate: 3\n", {"frobnicate"}},
                    BadFile{"ActionKey", "check: on\n", {"check"}},
                    BadFile{"ConfigInConfig", "config: x.yaml\n", {"config"}},
                    BadFile{"BadValue", "threads: many\n", {"threads", "'many'"}},
                    BadFile{"NoValue", "threads:\n", {"threads"}},
                    BadFile{"List", "threads: [1, 2]\n", {"threads"}},
                    BadFile{"Twice", "max-batch-size: 1\nmax_batch_size: 2\n", {"max-batch-size"}},
                    BadFile{"NoMap", "- threads\n", {"key: value"}},
                    BadFile{"NoYaml", "a: [1, \n  {", {"YAML"}},
                    BadFile{"Nested", "model: [[a]]\n", {"model"}}),
    [](const auto& row) { return row.param.name; });

}  // namespace
}  // namespace firesteel::server
