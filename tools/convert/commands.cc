#include "tools/convert/commands.h"

#include <CLI/CLI.hpp>
#include <memory>
#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "runtime/checkpoint/files.h"
#include "runtime/checkpoint/packed_file.h"
#include "runtime/model/synthetic.h"
#include "runtime/threading/cpu_topology.h"
#include "runtime/tokenizer/tokenizer.h"
#include "tools/convert/report.h"

namespace firesteel::convert {
namespace {

constexpr size_t kMaxTokenizerBytes = size_t{256} << 20;

struct Options {
  std::string model;
  std::string synthetic;
  uint64_t seed = 1;
  std::string tokenizer;
  WeightFormat weights;
  std::string output;
  size_t threads = 1;
  std::string inspect;
  std::string verify;
  bool json = false;
};

absl::Status Bad(absl::string_view what) { return absl::InvalidArgumentError(what); }

/// What goes into the file, ready to be read.
struct Input {
  std::unique_ptr<WeightSource> weights;
  PackedExtras extras;
};

absl::StatusOr<Input> OpenSynthetic(const Options& options) {
  absl::StatusOr<ModelConfig> config = NamedShape(options.synthetic);
  if (!config.ok()) return Bad(absl::StrCat("--synthetic: ", config.status().message()));
  Input input;
  input.weights =
      MakeSyntheticSource(*config, options.weights.TypesOf(config->spark(), kernels::DType::kBF16),
                          options.seed, options.threads);
  if (!options.tokenizer.empty()) {
    absl::StatusOr<std::string> tokenizer =
        firesteel::ReadFile(options.tokenizer, kMaxTokenizerBytes);
    if (!tokenizer.ok()) return tokenizer.status();
    input.extras.tokenizer = *std::move(tokenizer);
  }
  return input;
}

absl::StatusOr<Input> OpenFolder(const Options& options) {
  if (IsPackedFile(options.model)) {
    return Bad(absl::StrCat("--model: ", options.model,
                            " is no folder: a packed file is made from a checkpoint folder"));
  }
  Input input;
  auto weights = OpenFolderSource(options.model, options.weights, options.threads);
  if (!weights.ok()) return weights.status();
  input.weights = *std::move(weights);
  absl::StatusOr<GenerationDefaults> defaults = LoadGenerationDefaults(options.model);
  if (!defaults.ok()) return defaults.status();
  input.extras.defaults = *defaults;
  // A folder without a tokenizer can't be served, but measured.
  absl::StatusOr<std::string> tokenizer = Tokenizer::ReadModel(options.model);
  if (absl::IsNotFound(tokenizer.status())) return input;
  if (!tokenizer.ok()) return tokenizer.status();
  input.extras.tokenizer = *std::move(tokenizer);
  return input;
}

absl::Status Convert(const Options& options, std::ostream& out,
                     const std::function<void(const std::string&)>& on_temporary) {
  const absl::Time start = absl::Now();
  absl::StatusOr<Input> input =
      options.model.empty() ? OpenSynthetic(options) : OpenFolder(options);
  if (!input.ok()) return input.status();
  const ModelConfig& config = input->weights->config();
  if (!input->extras.tokenizer.empty()) {
    // What a server would refuse is not written.
    auto tokenizer = Tokenizer::Parse(input->extras.tokenizer, "tokenizer.model", config.vocab_size,
                                      config.bos_token_id);
    if (!tokenizer.ok()) return tokenizer.status();
  }
  absl::Status status =
      WritePackedFile(input->weights.get(), input->extras, options.output, on_temporary);
  if (on_temporary) on_temporary("");
  if (!status.ok()) return status;
  absl::StatusOr<std::unique_ptr<PackedFile>> file = PackedFile::Open(options.output);
  if (!file.ok()) return file.status();
  out << absl::StrFormat("wrote %s: %s, %s parameters, %s weights, %.1f s\n", options.output,
                         FormatBytes((*file)->size()), FormatCount(config.NumParameters()),
                         (*file)->FormatName(), absl::ToDoubleSeconds(absl::Now() - start));
  return absl::OkStatus();
}

absl::Status Inspect(const Options& options, std::ostream& out) {
  absl::StatusOr<std::unique_ptr<PackedFile>> file = PackedFile::Open(options.inspect);
  if (!file.ok()) return file.status();
  out << (options.json ? ToJson(**file) : ToTable(**file));
  return absl::OkStatus();
}

absl::Status Verify(const Options& options, std::ostream& out) {
  const absl::Time start = absl::Now();
  absl::StatusOr<std::unique_ptr<PackedFile>> file = PackedFile::Open(options.verify);
  if (!file.ok()) return file.status();
  if (absl::Status status = (*file)->Verify(options.threads); !status.ok()) return status;
  const ModelConfig& config = (*file)->config();
  const absl::StatusOr<std::string> tokenizer = (*file)->ReadTokenizer();
  if (tokenizer.ok()) {
    auto parsed = Tokenizer::Parse(*tokenizer, absl::StrCat(options.verify, ": tokenizer.model"),
                                   config.vocab_size, config.bos_token_id);
    if (!parsed.ok()) return parsed.status();
  } else if (!absl::IsNotFound(tokenizer.status())) {
    return tokenizer.status();
  }
  out << absl::StrFormat("ok: %s: %s in %d parts, %.1f s\n", options.verify,
                         FormatBytes((*file)->size()), (*file)->parts().size(),
                         absl::ToDoubleSeconds(absl::Now() - start));
  return absl::OkStatus();
}

/// What the options ask for goes together.
absl::Status Check(const Options& options) {
  int tasks = 0;
  for (const std::string* task :
       {&options.model, &options.synthetic, &options.inspect, &options.verify}) {
    tasks += !task->empty();
  }
  if (tasks != 1)
    return Bad("give one of --model, --synthetic, --inspect and --verify (see --help)");
  const bool writes = !options.model.empty() || !options.synthetic.empty();
  if (writes && options.output.empty()) return Bad("--output: the file to write is needed");
  if (!writes && !options.output.empty()) return Bad("--output goes with --model or --synthetic");
  if (options.json && options.inspect.empty()) return Bad("--json goes with --inspect");
  if (!options.tokenizer.empty() && options.synthetic.empty()) {
    return Bad("--tokenizer goes with --synthetic; a folder's own is taken");
  }
  return absl::OkStatus();
}

void Declare(CLI::App* app, Options* options) {
  app->set_version_flag("--version", absl::StrCat("firesteel-convert ", FIRESTEEL_VERSION));
  app->add_option("--model", options->model, "Checkpoint folder to convert")->type_name("DIR");
  app->add_option("--synthetic", options->synthetic,
                  "Instead: a named shape with random weights (spark-gemma2-2b, gemma2-2b, …)")
      ->type_name("SHAPE");
  app->add_option("--seed", options->seed, "Of random weights")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app->add_option("--tokenizer", options->tokenizer,
                  "With --synthetic: a tokenizer.model to put in, so that a server can serve it")
      ->type_name("FILE");
  app->add_option_function<std::string>(
         "--weights",
         [options](const std::string& text) {
           const absl::StatusOr<WeightFormat> format = WeightFormat::Parse(text);
           if (!format.ok()) {
             throw CLI::ValidationError(
                 absl::StrCat("--weights: '", text, "' ", format.status().message()));
           }
           options->weights = *format;
         },
         "Type of the matrices: auto (the checkpoint's), f32, bf16, int8 or int4, the last two "
         "with exceptions such as int4,head=int8 (attention, predictor, ffn, head)")
      ->type_name("FORMAT")
      ->default_str("auto");
  app->add_option("--output", options->output, "File to write; it is replaced whole or not at all")
      ->type_name("FILE");
  app->add_option("--threads", options->threads, "Threads (default: as the server)")
      ->check(CLI::Range(1, 1024));
  app->add_option("--inspect", options->inspect, "Show what a packed file holds")
      ->type_name("FILE");
  app->add_option("--verify", options->verify, "Check every byte of a packed file")
      ->type_name("FILE");
  app->add_flag("--json", options->json, "With --inspect: print JSON");
}

}  // namespace

int Run(const std::vector<std::string>& arguments, std::ostream& out, std::ostream& err,
        const std::function<void(const std::string&)>& on_temporary) {
  Options options;
  options.threads = DefaultThreadCount();
  CLI::App app("Makes packed serving files from checkpoint folders, shows and checks them.",
               "firesteel-convert");
  Declare(&app, &options);
  absl::Status status;
  try {
    app.parse(std::vector<std::string>(arguments.rbegin(), arguments.rend()));
    status = Check(options);
  } catch (const CLI::Success& asked) {  // --help, --version
    return app.exit(asked, out, err);
  } catch (const CLI::ParseError& error) {
    status = Bad(error.what());
  }
  if (status.ok()) {
    if (!options.inspect.empty()) {
      status = Inspect(options, out);
    } else if (!options.verify.empty()) {
      status = Verify(options, out);
    } else {
      status = Convert(options, out, on_temporary);
    }
  }
  if (status.ok()) return 0;
  err << "firesteel-convert: " << absl::StrReplaceAll(std::string(status.message()), {{"\n", " "}})
      << std::endl;
  return 2;
}

}  // namespace firesteel::convert
