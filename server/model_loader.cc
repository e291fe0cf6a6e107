#include "server/model_loader.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "kernels/amx.h"
#include "kernels/simd_target.h"
#include "runtime/checkpoint/model_config.h"
#include "runtime/checkpoint/packed_file.h"
#include "runtime/checkpoint/weights.h"
#include "runtime/tokenizer/tokenizer.h"
#include "server/answer_size.h"
#include "server/logging.h"

namespace firesteel::server {
namespace {

// A single short generation that takes longer than this will not get better.
constexpr absl::Duration kGenerateOnceLimit = absl::Minutes(10);

absl::Status AtModel(const ModelSpec& spec, const absl::Status& status) {
  return absl::Status(status.code(),
                      absl::StrCat("--model ", spec.name, "=", spec.path, ": ", status.message()));
}

class WaitingSink final : public GenerationSink {
 public:
  void OnDelta(TokenDelta) override {}
  void OnFinish(GenerationResult result) override {
    result_ = std::move(result);
    done_.Notify();
  }

  /// False where nothing came in time.
  bool Wait() { return done_.WaitForNotificationWithTimeout(kGenerateOnceLimit); }
  const GenerationResult& result() const { return result_; }

 private:
  absl::Notification done_;
  GenerationResult result_;
};

// What multiplies prompts and batches, for the log.
std::string MatrixUnits(const ModelWeights& weights, ComputeType compute) {
  if (compute != ComputeType::kBF16 && !weights.types.Has(kernels::DType::kI8)) return "not used";
  return kernels::AmxAvailable() ? "AMX" : "none";
}

}  // namespace

absl::StatusOr<ServedModel> LoadModel(const ModelSpec& spec, const ServerOptions& all_options,
                                      WorkerPool* pool, ServerMetrics* all_metrics) {
  const ServerOptions options = OptionsOf(spec.name, all_options);
  const absl::Time start = absl::Now();
  auto weights = LoadWeights(spec.path, options.weights, options.weights_memory, options.threads);
  if (!weights.ok()) return AtModel(spec, weights.status());
  const ModelConfig& config = (*weights)->config;
  auto tokenizer = Tokenizer::Load(spec.path, config.vocab_size, config.bos_token_id);
  if (!tokenizer.ok()) return AtModel(spec, tokenizer.status());
  const auto defaults = LoadGenerationDefaults(spec.path);
  if (!defaults.ok()) return AtModel(spec, defaults.status());
  const auto compute = ResolveComputeType(options.compute, (*weights)->types);
  if (!compute.ok()) return AtModel(spec, compute.status());

  auto metrics = all_metrics->AddModel(spec.name, config);
  EngineOptions engine_options = options.engine;
  engine_options.kv_dtype = KvCacheType(options);
  auto engine = Engine::Create(*weights, *std::move(tokenizer), *compute, engine_options, pool,
                               metrics.get());
  if (!engine.ok()) return AtModel(spec, engine.status());

  ServedModel model;
  model.name = spec.name;
  model.path = spec.path;
  model.engine = *std::move(engine);
  model.defaults = *defaults;
  model.max_prompt_tokens = static_cast<uint32_t>(config.max_position_embeddings - 1);
  if (options.max_prompt_tokens > 0) {
    model.max_prompt_tokens = std::min(model.max_prompt_tokens, options.max_prompt_tokens);
  }
  model.max_message_bytes = options.max_message_bytes;
  model.max_answer_bytes = options.max_answer_bytes;
  model.longest_token_text = LongestTokenText(model.engine->tokenizer(), config.vocab_size);
  metrics->SetBuildInfo(Version(), kernels::SimdTargetName(), (*weights)->FormatName());
  metrics->SetKvCapacity(model.engine->kv_capacity_tokens());
  Log(LogLevel::kInfo, "model loaded",
      {{"model", spec.name},
       {"path", spec.path},
       {"parameters", config.NumParameters()},
       {"weights", (*weights)->FormatName()},
       {"weight_bytes", (*weights)->bytes()},
       {"weights_memory", IsPackedFile(spec.path) && options.weights_memory == WeightMemory::kShared
                              ? "shared"
                              : "copy"},
       {"compute", ComputeTypeName(*compute)},
       {"matrix_units", MatrixUnits(**weights, *compute)},
       {"sublinear_head", *model.engine->options().sublinear_head ? "on" : "off"},
       {"kv_cache_type", DTypeName(model.engine->options().kv_dtype)},
       {"kv_cache_bytes", model.engine->options().kv_cache_bytes},
       {"kv_cache_tokens", model.engine->kv_capacity_tokens()},
       {"seconds", absl::ToDoubleSeconds(absl::Now() - start)}});

  if (options.warmup && !options.check) {
    const auto took = GenerateOnce(model, 4);
    if (!took.ok()) return AtModel(spec, took.status());
    Log(LogLevel::kInfo, "warmed up",
        {{"model", spec.name}, {"seconds", absl::ToDoubleSeconds(*took)}});
  }
  metrics->StartCounting();
  model.observer = std::move(metrics);
  return model;
}

absl::StatusOr<LoadedModels> LoadModels(const ServerOptions& options) {
  LoadedModels out;
  out.pool = std::make_unique<WorkerPool>(options.threads);
  out.metrics = std::make_unique<ServerMetrics>(options.metric_buckets);
  out.registry = std::make_unique<ModelRegistry>();
  for (const ModelSpec& spec : options.models) {
    auto model = LoadModel(spec, options, out.pool.get(), out.metrics.get());
    if (!model.ok()) return model.status();
    out.registry->Put(*std::move(model));
  }
  return out;
}

absl::StatusOr<absl::Duration> GenerateOnce(const ServedModel& model, uint32_t max_tokens) {
  const absl::Time start = absl::Now();
  GenerationRequest request;
  request.request_id = "warmup";
  request.prompt = {model.engine->weights().config.bos_token_id};
  request.max_tokens = max_tokens;
  request.sampling.temperature = 0;
  request.stopping.ignore_eos = true;
  const auto sink = std::make_shared<WaitingSink>();
  const auto handle = model.engine->Submit(std::move(request), sink);
  if (!handle.ok()) return handle.status();
  if (!sink->Wait()) {
    model.engine->Cancel(*handle);
    return absl::DeadlineExceededError("a first short generation did not end in time");
  }
  if (sink->result().reason == FinishReason::kError) return sink->result().status;
  return absl::Now() - start;
}

}  // namespace firesteel::server
