#include "tools/client/load.h"

#include <fstream>
#include <memory>
#include <random>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/time/time.h"
#include "firesteel/v1/model_service.grpc.pb.h"
#include "tools/client/duration_option.h"
#include "tools/client/rpc_error.h"

namespace firesteel::client {
namespace {

constexpr uint32_t kMaxConcurrency = 100'000;
constexpr double kMinRate = 1e-3;
constexpr double kMaxRate = 100'000;
constexpr uint32_t kMaxLength = 1'000'000;
constexpr double kMaxSeconds = 86'400;

const std::vector<std::string>& StoryOpenings() {
  static const auto* const openings =
      new std::vector<std::string>{"Once upon a time, there was a little robot",
                                   "The dragon and the mouse",
                                   "Lily found a shiny stone under the old tree. She",
                                   "One day, Tom and his dog went to the park. They saw a big",
                                   "There was a cat who wanted to fly. Every morning it",
                                   "Mom said it was time for bed, but Max"};
  return *openings;
}

absl::StatusOr<std::vector<std::string>> ReadPrompts(const LoadOptions& options) {
  if (options.prompts_file.empty()) {
    return options.prompts.empty() ? StoryOpenings() : options.prompts;
  }
  std::vector<std::string> prompts;
  std::ifstream file(options.prompts_file);
  for (std::string line; std::getline(file, line);) {
    if (!line.empty()) prompts.push_back(line);
  }
  if (!file.eof() || prompts.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--prompts-file: '", options.prompts_file, "' has no line to read"));
  }
  return prompts;
}

/// The model's name and vocabulary, asked of the server: also a first sign that it is there.
struct Target {
  std::string model;
  uint32_t vocabulary = 0;
};

grpc::Status AskForModel(const LoadOptions& options, const std::shared_ptr<grpc::Channel>& channel,
                         grpc::ClientContext* context, Target* target) {
  PrepareCall(options.connection, *context);
  const auto stub = v1::ModelService::NewStub(channel);
  v1::GetModelRequest request;
  request.set_model(options.model);
  v1::GetModelResponse response;
  grpc::Status status = stub->GetModel(context, request, &response);
  target->model = response.model().name();
  target->vocabulary = static_cast<uint32_t>(response.model().shape().vocab_size());
  return status;
}

v1::GenerateRequest MakeRequest(const LoadOptions& options, const Target& target,
                                const std::vector<std::string>& prompts, uint64_t number) {
  v1::GenerateRequest request;
  request.set_model(options.model);
  const uint64_t seed = options.seed + number;
  std::mt19937_64 random(seed);
  const auto pick = [&random](const LengthRange& range) {
    return std::uniform_int_distribution<uint32_t>(range.min, range.max)(random);
  };
  request.set_max_tokens(pick(options.max_tokens));
  if (options.prompt_tokens.max > 0) {
    const uint32_t length = pick(options.prompt_tokens);
    for (uint32_t i = 0; i < length; ++i) {
      request.mutable_token_ids()->add_ids(pick({0, std::max(1u, target.vocabulary) - 1}));
    }
  } else {
    request.set_prompt(prompts[number % prompts.size()]);
  }
  request.mutable_sampling()->set_seed(seed);
  if (options.temperature) request.mutable_sampling()->set_temperature(*options.temperature);
  request.mutable_stopping()->set_ignore_eos(options.ignore_eos);
  if (options.logprobs) request.mutable_output()->set_logprobs(*options.logprobs);
  request.mutable_output()->set_return_token_ids(true);  // a message then says how many it brings
  return request;
}

std::string Arrivals(const LoadPlan& plan) {
  return plan.concurrency > 0 ? absl::StrCat("closed loop, ", plan.concurrency, " at once")
                              : absl::StrFormat("open loop, %g/s, %s gaps", plan.rate,
                                                plan.poisson ? "Poisson" : "equal");
}

/// One line that is written over and over.
class ProgressLine {
 public:
  ProgressLine(const LoadPlan& plan, std::ostream* out) : plan_(plan), out_(out) {}

  void Show(const LoadProgress& progress) {
    if (out_ == nullptr || progress.seconds < next_) return;
    next_ = progress.seconds + 0.5;
    const double whole = absl::ToDoubleSeconds(plan_.warm_up + plan_.duration);
    const double part = plan_.max_requests > 0
                            ? static_cast<double>(progress.succeeded + progress.failed) /
                                  static_cast<double>(plan_.max_requests)
                            : progress.seconds / whole;
    constexpr int kWidth = 30;
    const int filled = static_cast<int>(kWidth * std::min(1.0, part));
    *out_ << absl::StrFormat("\r[%s%s] %4.0f s  %d open  %d done  %d failed ",
                             std::string(static_cast<size_t>(filled), '#'),
                             std::string(static_cast<size_t>(kWidth - filled), '.'),
                             progress.seconds, progress.open, progress.succeeded, progress.failed)
          << std::flush;
    shown_ = true;
  }

  void End() {
    if (shown_) *out_ << "\r\033[K" << std::flush;
  }

 private:
  const LoadPlan& plan_;
  std::ostream* const out_;  // null: none
  double next_ = 0;
  bool shown_ = false;
};

bool WriteFile(const std::string& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << text;
  file.close();
  return file.good();
}

// What the options' own checks can't see.
absl::Status CheckTogether(const CLI::App& command, const LoadOptions& options) {
  if (command.count("--prompt-tokens") > 0 &&
      command.count("--prompt") + command.count("--prompts-file") > 0) {
    return absl::InvalidArgumentError(
        "--prompt-tokens leaves no room for --prompt, --prompts-file");
  }
  if (!options.html.empty() && !std::ofstream(options.html, std::ios::app).good()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--html: '", options.html, "' cannot be written"));
  }
  return absl::OkStatus();
}

void AddLengths(CLI::App& command, const char* name, LengthRange& field, const char* help) {
  command
      .add_option_function<std::string>(
          name,
          [name, &field](const std::string& text) {
            const absl::StatusOr<LengthRange> range = ParseLengths(text);
            if (!range.ok()) {
              throw CLI::ValidationError(name, std::string(range.status().message()));
            }
            field = *range;
          },
          help)
      ->type_name("N|MIN-MAX");
}

void AddPlanOptions(CLI::App& command, LoadOptions& options) {
  auto* const concurrency =
      command
          .add_option("--concurrency", options.plan.concurrency,
                      "Closed loop: requests that are open at any time (default: 1)")
          ->check(CLI::Range(1u, kMaxConcurrency));
  command
      .add_option_function<double>(
          "--rate",
          [&options](double rate) {
            if (!(rate >= kMinRate && rate <= kMaxRate)) {  // nor NaN
              throw CLI::ValidationError(
                  "--rate", absl::StrCat(rate, " is not from ", kMinRate, " to ", kMaxRate));
            }
            options.plan.rate = rate;
            options.plan.concurrency = 0;
          },
          "Open loop: requests a second, however many are open; latencies count from when a "
          "request was due")
      ->excludes(concurrency);
  command
      .add_option_function<std::string>(
          "--arrivals",
          [&options](const std::string& arrivals) { options.plan.poisson = arrivals == "poisson"; },
          "Open loop: 'poisson' (default) or 'equal' gaps")
      ->check(CLI::IsMember({"poisson", "equal"}));
  AddDurationOption(command, "--duration", options.plan.duration, absl::Milliseconds(1),
                    "How long requests are sent and measured (default: 10s)");
  AddDurationOption(command, "--warm-up", options.plan.warm_up, absl::ZeroDuration(),
                    "Requests due in this time before are sent, but not measured (default: 0)");
  command.add_option("--requests", options.plan.max_requests,
                     "At most this many measured requests, within --duration");
  command
      .add_option_function<std::string>(
          "--slo",
          [&options](const std::string& text) {
            const absl::StatusOr<LoadObjectives> objectives = ParseObjectives(text);
            if (!objectives.ok()) {
              throw CLI::ValidationError("--slo", std::string(objectives.status().message()));
            }
            options.objectives = *objectives;
          },
          "Objectives that goodput counts by: ttft=500ms,itl=50ms,e2e=10s, any of them; itl is a "
          "request's mean")
      ->type_name("LIST");
}

void AddRequestOptions(CLI::App& command, LoadOptions& options) {
  command.add_option("--model", options.model, "Name of the model (default: the server's first)");
  auto* const prompt = command.add_option("--prompt", options.prompts,
                                          "Text to continue (repeatable, taken in turn)");
  prompt->allow_extra_args(false);
  command
      .add_option("--prompts-file", options.prompts_file,
                  "A file of prompts, one a line, taken in turn")
      ->excludes(prompt);
  AddLengths(command, "--prompt-tokens", options.prompt_tokens,
             "Prompts of exactly this many random tokens; a range: evenly drawn from it");
  AddLengths(command, "--max-tokens", options.max_tokens,
             "Most tokens to generate (default: 64); a range: evenly drawn from it");
  command.add_flag("--ignore-eos", options.ignore_eos, "Always generate --max-tokens");
  command.add_option("--temperature", options.temperature, "0: always the most probable token");
  command.add_option("--logprobs", options.logprobs,
                     "Ask for log-probabilities, with so many alternatives for each token");
  command.add_option("--seed", options.seed, "Makes prompts, draws and gaps repeatable")
      ->capture_default_str();
}

}  // namespace

absl::StatusOr<LengthRange> ParseLengths(const std::string& text) {
  const std::vector<std::string> ends = absl::StrSplit(text, '-');
  LengthRange range;
  if (ends.size() > 2 || !absl::SimpleAtoi(ends.front(), &range.min) ||
      !absl::SimpleAtoi(ends.back(), &range.max) || range.min < 1 || range.max < range.min ||
      range.max > kMaxLength) {
    return absl::InvalidArgumentError(absl::StrCat("'", text, "' is neither a number from 1 to ",
                                                   kMaxLength, " nor a range such as 16-256"));
  }
  return range;
}

absl::StatusOr<LoadObjectives> ParseObjectives(const std::string& text) {
  LoadObjectives objectives;
  for (absl::string_view part : absl::StrSplit(text, ',')) {
    const std::pair<std::string, std::string> pair = absl::StrSplit(part, absl::MaxSplits('=', 1));
    std::optional<double>* const field = pair.first == "ttft"  ? &objectives.ttft
                                         : pair.first == "itl" ? &objectives.itl
                                         : pair.first == "e2e" ? &objectives.e2e
                                                               : nullptr;
    absl::Duration limit;
    if (field == nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat("'", part, "' is none of ttft=, itl=, e2e= with a duration"));
    }
    if (!absl::ParseDuration(pair.second, &limit) || limit <= absl::ZeroDuration() ||
        limit > absl::Seconds(kMaxSeconds)) {
      return absl::InvalidArgumentError(
          absl::StrCat("'", part, "' has no duration above 0 and up to 24h; e.g. ttft=500ms"));
    }
    *field = absl::ToDoubleSeconds(limit);
  }
  return objectives;
}

int RunLoad(const LoadOptions& options, Console& console, Interrupt* interrupt) {
  const absl::StatusOr<std::vector<std::string>> prompts = ReadPrompts(options);
  if (!prompts.ok()) {
    console.err << "error: " << prompts.status().message() << "\n";
    return kUsage;
  }
  const std::shared_ptr<grpc::Channel> channel = Connect(options.connection);
  Target target;
  grpc::ClientContext context;
  {
    const Interrupt::Scope scope(interrupt, &context);
    const grpc::Status status = AskForModel(options, channel, &context, &target);
    if (!status.ok()) {
      console.err << FormatError(status, context) << std::flush;
      return kFailed;
    }
  }

  // A context without a call stands for all of them: the first signal is then noticed, not deadly.
  grpc::ClientContext all;
  const Interrupt::Scope scope(interrupt, &all);
  ProgressLine line(options.plan, console.out_is_terminal ? &console.err : nullptr);
  const std::vector<LoadRecord> records = GenerateLoad(
      channel, options.plan,
      {.request = [&](uint64_t number) { return MakeRequest(options, target, *prompts, number); },
       .prepare = [&](grpc::ClientContext& call) { PrepareCall(options.connection, call); }},
      [interrupt] { return interrupt != nullptr && interrupt->raised(); },
      [&line](const LoadProgress& progress) { line.Show(progress); });
  line.End();

  const LoadSetup setup = {.target = options.connection.address,
                           .model = target.model,
                           .arrivals = Arrivals(options.plan),
                           .warm_up_seconds = absl::ToDoubleSeconds(options.plan.warm_up),
                           .max_tokens = options.max_tokens.max,
                           .objectives = options.objectives};
  const LoadSummary summary = Summarize(records, options.objectives);
  console.out << (options.json ? LoadJson(setup, summary) + "\n" : LoadTable(setup, summary))
              << std::flush;
  if (!options.html.empty() && !WriteFile(options.html, LoadHtml(setup, summary))) {
    console.err << "error: --html: '" << options.html << "' was not written\n";
    return kFailed;
  }
  if (interrupt != nullptr && interrupt->raised()) return kInterrupted;
  return summary.succeeded > 0 ? kSucceeded : kFailed;
}

void AddLoadCommand(CLI::App& app, Console& console, Interrupt* interrupt, int& exit_status) {
  auto options = std::make_shared<LoadOptions>();  // lives in the callback
  CLI::App& command = *app.add_subcommand(
      "load", "Put the server under load; report latency, throughput, goodput, errors, sparsity");
  AddConnectionOptions(command, options->connection);
  AddPlanOptions(command, *options);
  AddRequestOptions(command, *options);
  command.add_flag("--json", options->json, "The report as one JSON object");
  command.add_option("--html", options->html, "Also write the report as a page with charts")
      ->type_name("FILE");
  command.callback([options, &command, &console, interrupt, &exit_status] {
    const absl::Status status = CheckTogether(command, *options);
    if (!status.ok()) throw CLI::ValidationError(std::string(status.message()));
    options->plan.seed = options->seed;
    exit_status = RunLoad(*options, console, interrupt);
  });
}

}  // namespace firesteel::client
