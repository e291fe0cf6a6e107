// firesteel-bench: prefill and decode speed of a model, without a server, beside its dense twin in
// one alternating run.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "kernels/simd_target.h"
#include "runtime/model/synthetic.h"
#include "runtime/threading/cpu_topology.h"
#include "tools/bench/machine.h"
#include "tools/bench/report.h"
#include "tools/bench/roofline.h"
#include "tools/bench/subject.h"

namespace firesteel::bench {
namespace {

struct Options {
  std::vector<std::string> models;
  std::string shape;
  bool twin = false;
  WeightFormat weights;
  std::vector<std::string> weights_memory = {"copy"};
  std::string compute = "auto";
  std::string kv = "auto";
  std::vector<size_t> threads;
  std::vector<size_t> batch = {1, 8};
  std::vector<size_t> context = {32};
  std::vector<size_t> prompt = {64, 512};
  std::string head = "off";
  FfnWay prompt_ffn = FfnWay::kMeasured;
  size_t decode = 64;
  size_t chunk = 256;
  size_t repeat = 5;
  std::string before_each;
  bool json = false;
  std::string roofline;
};

struct Model {
  std::shared_ptr<const ModelWeights> weights;
  bool trained = false;
};

absl::StatusOr<std::vector<Model>> LoadModels(const Options& options) {
  std::vector<Model> models;
  for (size_t i = 0; i < options.models.size(); ++i) {
    const std::string& memory =
        options.weights_memory[std::min(i, options.weights_memory.size() - 1)];
    auto weights = LoadWeights(options.models[i], options.weights,
                               memory == "shared" ? WeightMemory::kShared : WeightMemory::kCopy,
                               DefaultThreadCount());
    if (!weights.ok()) return weights.status();
    models.push_back({*std::move(weights), true});
  }
  if (!options.shape.empty()) {
    auto config = NamedShape(options.shape);
    if (!config.ok()) return config.status();
    const WeightTypes types = options.weights.TypesOf(config->spark(), kernels::DType::kBF16);
    models.push_back({MakeSyntheticWeights(*config, types, 1), false});
  }
  if (options.twin && models.size() == 1) {
    const ModelConfig& config = models[0].weights->config;
    if (!config.spark()) {
      return absl::InvalidArgumentError("--twin: the model is dense itself; give a Spark model");
    }
    // Of a model that is loaded as it is, the twin has the attention's type everywhere.
    const WeightTypes stored = models[0].weights->types[WeightRole::kAttention];
    models.push_back(
        {MakeSyntheticWeights(DenseTwin(config), options.weights.TypesOf(false, stored), 2),
         false});
  }
  return models;
}

// Prompts and contexts have to leave room in every model.
absl::Status CheckLengths(const Options& options, const std::vector<Model>& models) {
  for (const Model& model : models) {
    const size_t limit = model.weights->config.max_position_embeddings;
    for (size_t prompt : options.prompt) {
      if (prompt <= limit) continue;
      return absl::InvalidArgumentError(
          absl::StrCat("--prompt ", prompt, " exceeds the context of ", limit));
    }
    for (size_t context : options.context) {
      if (context + options.decode <= limit) continue;
      return absl::InvalidArgumentError(absl::StrCat("--context ", context, " and --decode ",
                                                     options.decode, " exceed the context of ",
                                                     limit));
    }
  }
  return absl::OkStatus();
}

size_t Largest(const std::vector<size_t>& values) {
  return values.empty() ? 0 : *std::max_element(values.begin(), values.end());
}

std::vector<Setting> ListSettings(const Options& options) {
  std::vector<Setting> settings;
  for (size_t threads : options.threads) {
    for (size_t prompt : options.prompt) settings.push_back({.threads = threads, .prompt = prompt});
    for (size_t context : options.context) {
      for (size_t batch : options.batch) {
        settings.push_back({.threads = threads, .batch = batch, .context = context});
      }
    }
  }
  return settings;
}

absl::StatusOr<Report> Run(const Options& options) {
  auto models = LoadModels(options);
  if (!models.ok()) return models.status();
  if (absl::Status status = CheckLengths(options, *models); !status.ok()) return status;
  std::optional<ComputeType> wanted;
  if (options.compute == "f32") wanted = ComputeType::kF32;
  if (options.compute == "bf16") wanted = ComputeType::kBF16;
  ComputeType compute = ComputeType::kF32;
  for (const Model& model : *models) {
    const auto resolved = ResolveComputeType(wanted, model.weights->types);
    if (!resolved.ok()) return resolved.status();
    compute = *resolved;
  }

  // As the server resolves its --kv-cache-type.
  const bool kv_f32 = options.kv == "auto" ? options.compute == "f32" : options.kv == "f32";
  const kernels::DType kv_dtype = kv_f32 ? kernels::DType::kF32 : kernels::DType::kBF16;

  Report report;
  report.cpu = CpuName();
  report.simd_target = kernels::SimdTargetName();
  report.compute = ComputeTypeName(compute);
  report.kv = kv_f32 ? "f32" : "bf16";
  report.threads = Largest(options.threads);
  {
    WorkerPool pool(report.threads);
    report.compute_speed = MeasureCompute(pool);
  }
  const size_t max_tokens =
      std::max(Largest(options.prompt), Largest(options.context) + options.decode);
  std::vector<std::unique_ptr<Subject>> subjects;  // [threads][model]
  for (size_t threads : options.threads) {
    for (const Model& model : *models) {
      const bool sublinear =
          options.head == "on" || (options.head == "spark" && model.weights->config.spark());
      subjects.push_back(std::make_unique<Subject>(
          model.weights, compute, kv_dtype, threads, options.chunk,
          std::max<size_t>(1, Largest(options.batch)), max_tokens, model.trained, sublinear));
      subjects.back()->SetFfnWay(options.prompt_ffn);
    }
  }
  const std::vector<Setting> settings = ListSettings(options);
  for (const Setting& setting : settings) {
    for (const Model& model : *models) {
      report.series.push_back(
          {setting, model.weights->config.spark(), model.weights->FormatName(), {}});
    }
  }
  // Models alternate inside, repetitions are the outer loop: a slow minute hits all of them.
  for (size_t repeat = 0; repeat <= options.repeat; ++repeat) {
    if (repeat > 0) {
      if (!options.before_each.empty() && std::system(options.before_each.c_str()) != 0) {
        return absl::AbortedError(
            absl::StrCat("--before-each: '", options.before_each, "' failed"));
      }
      WorkerPool pool(report.threads);
      report.memory.push_back(MeasureMemory(pool));
    }
    auto series = report.series.begin();
    for (const Setting& setting : settings) {
      const size_t row = static_cast<size_t>(
          std::find(options.threads.begin(), options.threads.end(), setting.threads) -
          options.threads.begin());
      for (size_t m = 0; m < models->size(); ++m, ++series) {
        Subject& subject = *subjects[row * models->size() + m];
        const Sample sample = setting.prefill()
                                  ? subject.Prefill(setting.prompt)
                                  : subject.Decode(setting.batch, setting.context, options.decode);
        if (repeat > 0) series->runs.push_back(sample);  // the first round warms up
      }
    }
  }
  return report;
}

int Main(int argc, char** argv) {
  Options options;
  CLI::App app("Prefill and decode speed of a model, without a server.", "firesteel-bench");
  app.add_option("--model", options.models,
                 "Checkpoint folder or packed file; a second one is measured beside it")
      ->expected(1, 2);
  app.add_option("--shape", options.shape, "Instead: a named shape with synthetic weights");
  app.add_flag("--twin", options.twin,
               "Measure a dense model of equal parameter count beside it (synthetic weights)");
  app.add_option_function<std::string>(
         "--weights",
         [&options](const std::string& text) {
           const absl::StatusOr<WeightFormat> format = WeightFormat::Parse(text);
           if (!format.ok()) {
             throw CLI::ValidationError(
                 absl::StrCat("--weights: '", text, "' ", format.status().message()));
           }
           options.weights = *format;
         },
         "auto, f32, bf16, int8 or int4, the last two with exceptions such as int4,head=int8")
      ->type_name("FORMAT")
      ->default_str("auto");
  app.add_option("--weights-memory", options.weights_memory,
                 "Where weights of packed files are: copy or shared (mapped); one for each --model")
      ->delimiter(',')
      ->check(CLI::IsMember({"copy", "shared"}));
  app.add_option("--compute", options.compute, "Precision of activations and products")
      ->check(CLI::IsMember({"auto", "f32", "bf16"}))
      ->capture_default_str();
  app.add_option("--kv", options.kv, "KV cache; auto: f32 with --compute f32, bf16 otherwise")
      ->check(CLI::IsMember({"auto", "f32", "bf16"}))
      ->capture_default_str();
  app.add_option("--sublinear-head", options.head,
                 "on: decode greedily with the head that reads a 2-bit copy of the embedding; "
                 "spark: the Spark models only")
      ->check(CLI::IsMember({"on", "off", "spark"}))
      ->capture_default_str();
  const auto counts = [&](const char* flag, std::vector<size_t>& value, const char* help) {
    app.add_option(flag, value, help)->delimiter(',')->check(CLI::Range(1, 1 << 20));
  };
  counts("--threads", options.threads, "Threads, e.g. 1,2 (default: as the server)");
  counts("--batch", options.batch, "Sequences that decode together (default 1,8)");
  counts("--context", options.context, "Positions in the cache when decoding starts (default 32)");
  counts("--prompt", options.prompt, "Prompt lengths of prefill (default 64,512)");
  app.add_option("--decode", options.decode, "Tokens to decode")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--chunk", options.chunk, "Prompt tokens of one step")
      ->check(CLI::Range(1, 1 << 14))
      ->capture_default_str();
  const std::map<std::string, FfnWay> ways = {
      {"measured", FfnWay::kMeasured}, {"sparse", FfnWay::kSparse}, {"dense", FfnWay::kDense}};
  app.add_option("--prompt-ffn", options.prompt_ffn,
                 "How a Spark model with 8-bit weights computes the FFN of prompts on a matrix "
                 "unit: its active neurons, all, or what was faster of late (the default)")
      ->transform(CLI::CheckedTransformer(ways));
  app.add_option("--repeat", options.repeat, "Measured runs of each setting")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  app.add_option("--before-each", options.before_each,
                 "Shell command to run before each measured run of all settings, so that another "
                 "program can be measured in turns with this one");
  app.add_flag("--json", options.json, "Print JSON");
  app.add_option("--roofline", options.roofline, "Also write a roofline picture to this SVG file");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  if (options.models.empty() == options.shape.empty()) {
    std::fprintf(stderr, "firesteel-bench: give either --model or --shape\n");
    return 2;
  }
  if (options.threads.empty()) options.threads = {DefaultThreadCount()};
  if (const char* target = std::getenv("FIRESTEEL_SIMD_TARGET");
      target != nullptr && !kernels::ForceSimdTarget(target)) {
    std::fprintf(stderr, "firesteel-bench: FIRESTEEL_SIMD_TARGET=%s is not available here\n",
                 target);
    return 2;
  }
  const absl::StatusOr<Report> report = Run(options);
  if (!report.ok()) {
    std::fprintf(stderr, "firesteel-bench: %s\n", std::string(report.status().message()).c_str());
    return 2;
  }
  if (!options.roofline.empty()) {
    std::ofstream file(options.roofline);
    file << ToRoofline(*report);
    if (!file.flush()) {
      std::fprintf(stderr, "firesteel-bench: --roofline %s: cannot be written\n",
                   options.roofline.c_str());
      return 2;
    }
  }
  std::fputs((options.json ? ToJson(*report) : ToTable(*report)).c_str(), stdout);
  return 0;
}

}  // namespace
}  // namespace firesteel::bench

int main(int argc, char** argv) { return firesteel::bench::Main(argc, argv); }
