// firesteel-simulate: a day of load in seconds. The engine's own scheduler on a virtual clock.

#include <CLI/CLI.hpp>
#include <cstdint>
#include <exception>
#include <fstream>
#include <iostream>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "runtime/checkpoint/weights.h"
#include "runtime/model/kv_cache.h"
#include "runtime/model/synthetic.h"
#include "runtime/threading/cpu_topology.h"
#include "tools/simulate/outcome.h"
#include "tools/simulate/recording.h"
#include "tools/simulate/simulator.h"
#include "tools/simulate/trace.h"

namespace firesteel::simulate {
namespace {

constexpr int kExitUsage = 2;

struct Options {
  std::string trace;
  std::string replay;
  std::optional<Recording> recording;  // what --replay names
  PoissonTrace poisson;
  std::string model;
  std::string shape;
  std::vector<double> cost;
  size_t threads = DefaultThreadCount();
  EngineOptions engine;
  size_t kv_cache_tokens = 0;
  size_t context_tokens = 1024;
  double max_queue_ms = 0;
  double ageing_seconds = 10;
  double target_itl_ms = 0;
  bool static_batches = false;
  bool real = false;
  std::string record;
  Objectives objectives;
  double ttft_ms = 1000;
  double itl_ms = 100;
  bool json = false;
  std::string steps;
};

int Fail(const absl::Status& status) {
  std::cerr << "firesteel-simulate: " << std::string(status.message()) << std::endl;
  return kExitUsage;
}

void Declare(CLI::App& app, Options& o) {
  app.set_help_flag("-h,--help", "Shows this and exits");
  const char* const load = "Load";
  app.add_option("--trace", o.trace, "CSV file of requests (docs/scheduling.md); else Poisson")
      ->group(load);
  auto* const replay =
      app.add_option("--replay", o.replay,
                     "Plays what --record wrote, on the machine as fast as it was then, and "
                     "prints what was measured; options of the engine given beside it win")
          ->group(load);
  app.add_option("--requests", o.poisson.requests, "Requests of the Poisson trace")
      ->check(CLI::Range(1, 10'000'000))
      ->capture_default_str()
      ->group(load);
  app.add_option("--rate", o.poisson.rate, "Requests a second")
      ->check(CLI::Range(1e-6, 1e6))
      ->capture_default_str()
      ->group(load);
  app.add_option("--prompt-tokens", o.poisson.mean_prompt_tokens, "Their mean")
      ->check(CLI::Range(1.0, 1e6))
      ->capture_default_str()
      ->group(load);
  app.add_option("--answer-tokens", o.poisson.mean_answer_tokens, "Their mean")
      ->check(CLI::Range(1.0, 1e6))
      ->capture_default_str()
      ->group(load);
  app.add_option("--spread", o.poisson.spread, "Of lengths: standard deviation of their logarithm")
      ->check(CLI::Range(0.0, 3.0))
      ->capture_default_str()
      ->group(load);
  app.add_option("--clients", o.poisson.clients, "Clients that take turns")
      ->check(CLI::Range(1, 1'000'000))
      ->capture_default_str()
      ->group(load);
  app.add_option("--prefix-groups", o.poisson.prefix_groups,
                 "Groups of prompts that begin alike; 0: none")
      ->check(CLI::Range(0, 1'000'000))
      ->group(load);
  app.add_option("--prefix-tokens", o.poisson.prefix_tokens, "For so many tokens, added to each")
      ->check(CLI::Range(0, 1'000'000))
      ->group(load);
  app.add_option("--timeout", o.poisson.timeout_seconds, "Deadline of each request in seconds")
      ->check(CLI::Range(0.0, 1e6))
      ->group(load);
  app.add_option("--seed", o.poisson.seed, "Of the trace")->capture_default_str()->group(load);

  const char* const cost = "Cost of a step";
  app.add_option("--cost", o.cost,
                 "Seconds of a step, of each prefill token, decode row and position of context in "
                 "it, and (or 0) of any prompt; measured where not given")
      ->expected(4, 5)
      ->delimiter(',')
      ->check(CLI::Range(0.0, 1e3))
      ->group(cost);
  auto* const model =
      app.add_option("--model", o.model, "Of this folder or packed file")->group(cost);
  app.add_option("--shape", o.shape, "Of synthetic weights of this shape")
      ->excludes(model)
      ->group(cost);
  app.add_option("--threads", o.threads, "For measuring")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str()
      ->group(cost);
  auto* const real =
      app.add_flag("--real", o.real,
                   "Also runs the trace through the engine and the model, in real time")
          ->group(cost);
  auto* const record =
      app.add_option("--record", o.record, "Writes the run with --real to this file, for --replay")
          ->needs(real)
          ->group(cost);
  for (CLI::Option* option : app.get_options()) {
    const bool said_by_recording = option->get_group() == load || option->get_group() == cost;
    if (said_by_recording && option != replay) option->excludes(replay);
  }

  const char* const engine = "Engine";
  app.add_option("--max-batch-size", o.engine.max_batch_size, "As the server's")
      ->check(CLI::Range(1, 65536))
      ->capture_default_str()
      ->group(engine);
  app.add_option("--max-batch-tokens", o.engine.max_batch_tokens, "As the server's")
      ->check(CLI::Range(1, 65536))
      ->capture_default_str()
      ->group(engine);
  app.add_option("--max-queue-requests", o.engine.max_queue_requests, "As the server's")
      ->check(CLI::Range(1, 1 << 30))
      ->capture_default_str()
      ->group(engine);
  app.add_option("--max-queue-tokens", o.engine.max_queue_tokens, "As the server's")
      ->check(CLI::Range(1, 1 << 30))
      ->capture_default_str()
      ->group(engine);
  app.add_option("--max-queue-ms", o.max_queue_ms, "As the server's")
      ->check(CLI::Range(0.0, 8.64e7))
      ->group(engine);
  app.add_option("--ageing-seconds", o.ageing_seconds, "As the server's")
      ->check(CLI::Range(1e-3, 86400.0))
      ->capture_default_str()
      ->group(engine);
  app.add_option("--kv-cache-tokens", o.kv_cache_tokens,
                 "Positions that are cached; 0: a context for each sequence of the batch")
      ->check(CLI::Range(0, 1 << 26))
      ->group(engine);
  app.add_option("--context", o.context_tokens, "Of the model; --model and --shape know it")
      ->check(CLI::Range(2, 1 << 20))
      ->capture_default_str()
      ->group(engine);
  app.add_option("--target-itl-ms", o.target_itl_ms, "As the server's")
      ->check(CLI::Range(0.0, 6e4))
      ->group(engine);
  app.add_option("--prefix-cache", o.engine.prefix_cache, "As the server's: on or off")
      ->default_str("on")
      ->group(engine);
  app.add_option("--optimistic-admission", o.engine.optimistic_admission,
                 "As the server's: on or off")
      ->default_str("off")
      ->group(engine);
  app.add_flag("--static-batches", o.static_batches,
               "Takes max-batch-size requests at a time and waits for all, for comparison")
      ->excludes(record)
      ->excludes(replay)
      ->group(engine);

  const char* const output = "Output";
  app.add_option("--ttft-ms", o.ttft_ms, "Served well: first token within")
      ->check(CLI::Range(0.0, 1e9))
      ->capture_default_str()
      ->group(output);
  app.add_option("--itl-ms", o.itl_ms, "Served well: mean time between tokens at most")
      ->check(CLI::Range(0.0, 1e9))
      ->capture_default_str()
      ->group(output);
  app.add_flag("--json", o.json, "Prints JSON")->group(output);
  app.add_option(
         "--steps", o.steps,
         "Writes a CSV line for each step to this file: of the run with --real, else of the "
         "simulated one")
      ->group(output);
}

absl::StatusOr<std::shared_ptr<const ModelWeights>> LoadModel(const Options& o) {
  if (!o.model.empty()) return LoadWeights(o.model, WeightFormat::kAuto);
  const auto config = NamedShape(o.shape);
  if (!config.ok()) return config.status();
  return MakeSyntheticWeights(*config, kernels::DType::kBF16, 1);
}

void Print(const char* title, const Outcome& outcome, const Options& o) {
  if (o.json) {
    std::cout << ToJson(outcome);
  } else {
    std::cout << title << "\n" << ToTable(outcome) << std::flush;
  }
}

int WriteSteps(const std::string& path, const std::vector<StepRecord>& steps) {
  if (path.empty()) return 0;
  std::ofstream file(path);
  file << ToCsv(steps) << std::flush;
  return file ? 0 : Fail(absl::UnknownError(absl::StrCat("--steps ", path, ": cannot be written")));
}

int WriteRecording(const std::string& path, const Recording& recording) {
  if (path.empty()) return 0;
  std::ofstream file(path);
  file << ToJson(recording) << std::flush;
  return file ? 0
              : Fail(absl::UnknownError(absl::StrCat("--record ", path, ": cannot be written")));
}

absl::Status CheckOptions(const Options& o) {
  const bool has_model = !o.model.empty() || !o.shape.empty();
  if (!has_model && o.cost.empty() && o.replay.empty()) {
    return absl::InvalidArgumentError("one of --cost, --model, --shape and --replay is needed");
  }
  if (!has_model && o.real) return absl::InvalidArgumentError("--real needs --model or --shape");
  if (o.engine.max_batch_tokens < o.engine.max_batch_size) {
    return absl::InvalidArgumentError(
        absl::StrCat("--max-batch-tokens: ", o.engine.max_batch_tokens,
                     " is below --max-batch-size ", o.engine.max_batch_size));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<Arrival>> TraceOf(const Options& o) {
  if (o.recording.has_value()) return o.recording->trace;
  if (!o.trace.empty()) return ReadTrace(o.trace);
  PoissonTrace poisson = o.poisson;
  poisson.max_answer_tokens = static_cast<uint32_t>(o.context_tokens / 2);
  poisson.max_prompt_tokens = static_cast<uint32_t>(o.context_tokens - poisson.max_answer_tokens);
  return MakeTrace(poisson);
}

absl::StatusOr<Machine> MachineFor(const Options& o,
                                   const std::shared_ptr<const ModelWeights>& weights) {
  if (o.recording.has_value()) return o.recording->machine;
  if (o.cost.empty()) {
    const auto measured = MeasureCost(weights, o.engine, o.threads);
    if (!measured.ok()) return measured.status();
    return Machine{.cost = *measured, .pace = {}};
  }
  return Machine{.cost = {.step = o.cost[0],
                          .prefill_token = o.cost[1],
                          .decode_row = o.cost[2],
                          .context = o.cost[3],
                          .prefill = o.cost.size() > 4 ? o.cost[4] : 0},
                 .pace = {}};
}

int Run(Options o) {
  o.engine.target_itl = absl::Milliseconds(o.target_itl_ms);
  o.engine.max_queue_wait = absl::Milliseconds(o.max_queue_ms);
  o.engine.ageing = absl::Seconds(o.ageing_seconds);
  o.objectives = {.ttft_seconds = o.ttft_ms / 1e3, .itl_seconds = o.itl_ms / 1e3};
  if (const absl::Status status = CheckOptions(o); !status.ok()) return Fail(status);
  std::shared_ptr<const ModelWeights> weights;
  if (!o.model.empty() || !o.shape.empty()) {
    auto loaded = LoadModel(o);
    if (!loaded.ok()) return Fail(loaded.status());
    weights = *std::move(loaded);
    o.context_tokens = weights->config.max_position_embeddings;
  }
  if (o.kv_cache_tokens == 0) o.kv_cache_tokens = o.context_tokens * o.engine.max_batch_size;
  const auto machine = MachineFor(o, weights);
  if (!machine.ok()) return Fail(machine.status());
  const auto trace = TraceOf(o);
  if (!trace.ok()) return Fail(trace.status());

  const StepCost& cost = machine->cost;
  if (!o.json) {
    std::cout << absl::StreamFormat(
        "a step takes %.4g s, + %.4g s a prefill token, + %.4g s a decode row, + %.4g s a position "
        "of context, + %.4g s for any prompt (--cost %s)\n\n",
        cost.step, cost.prefill_token, cost.decode_row, cost.context, cost.prefill, ToOption(cost));
  }
  const Intake intake = o.static_batches ? Intake::kStatic : Intake::kOpen;
  std::vector<StepRecord> steps;
  std::vector<StepRecord>* const wanted = o.steps.empty() ? nullptr : &steps;
  const auto simulated = Simulate(*trace, *machine, o.engine, o.kv_cache_tokens, o.context_tokens,
                                  intake, o.objectives, o.real ? nullptr : wanted);
  if (!simulated.ok()) return Fail(simulated.status());
  Print("simulated", *simulated, o);
  std::optional<Recording> recording = o.recording;
  if (o.real) {
    EngineOptions real = o.engine;
    real.kv_cache_bytes = KvBlockPool::BlocksFor(o.kv_cache_tokens) *
                          KvBlockPool::BytesPerBlock(weights->config, real.kv_dtype);
    auto run = RunForReal(*trace, weights, real, o.threads, intake, o.objectives, wanted);
    if (!run.ok()) return Fail(run.status());
    recording = *std::move(run);
  }
  if (recording.has_value()) {
    Print("\nmeasured", recording->measured, o);
    if (!o.json) std::cout << "\n" << ToComparison(*simulated, recording->measured) << std::flush;
  }
  if (o.real && WriteRecording(o.record, *recording) != 0) return kExitUsage;
  return WriteSteps(o.steps, steps);
}

// What the recording says is what options say unless they are given: it has to be read first.
absl::Status TakeRecording(int argc, char** argv, Options* o) {
  CLI::App first;
  first.set_help_flag();
  first.allow_extras();
  first.add_option("--replay", o->replay);
  first.parse(argc, argv);
  if (o->replay.empty()) return absl::OkStatus();
  auto recording = ReadRecording(o->replay);
  if (!recording.ok()) return recording.status();
  o->recording = *std::move(recording);
  o->engine = o->recording->options;
  o->max_queue_ms = absl::ToDoubleMilliseconds(o->engine.max_queue_wait);
  o->target_itl_ms = absl::ToDoubleMilliseconds(o->engine.target_itl);
  o->ageing_seconds = absl::ToDoubleSeconds(o->engine.ageing);
  o->kv_cache_tokens = o->recording->kv_cache_tokens;
  o->context_tokens = o->recording->context_tokens;
  return absl::OkStatus();
}

}  // namespace
}  // namespace firesteel::simulate

int main(int argc, char** argv) {
  CLI::App app("Plays a load against Firesteel's scheduler on a virtual clock",
               "firesteel-simulate");
  firesteel::simulate::Options options;
  try {
    if (const absl::Status status = firesteel::simulate::TakeRecording(argc, argv, &options);
        !status.ok()) {
      return firesteel::simulate::Fail(status);
    }
    firesteel::simulate::Declare(app, options);
    app.parse(argc, argv);
    return firesteel::simulate::Run(std::move(options));
  } catch (const CLI::Success& success) {
    return app.exit(success);
  } catch (const CLI::ParseError& error) {
    app.exit(error);
    return firesteel::simulate::kExitUsage;
  } catch (const std::exception& error) {
    std::cerr << "firesteel-simulate: " << error.what() << std::endl;
    return firesteel::simulate::kExitUsage;
  }
}
