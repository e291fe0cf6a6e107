#include "server/request_translation.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "runtime/tokenizer/utf8_repair.h"
#include "server/status.h"
#include "server/tokenization.h"

namespace firesteel::server {
namespace {

/// `value` must lie in [min, max]; NaN does not.
void CheckRange(const char* field, float value, float min, float max, FieldViolations* violations) {
  if (value >= min && value <= max) return;
  violations->Add(field, absl::StrCat("is ", value, "; must be from ", min, " to ", max));
}

void CheckAtMost(const std::string& field, uint64_t value, uint64_t max,
                 FieldViolations* violations) {
  if (value <= max) return;
  violations->Add(field, absl::StrCat("is ", value, "; must be at most ", max));
}

// --- The prompt ---

std::vector<int32_t> CheckPromptIds(const v1::TokenIds& tokens, const ServedModel& model,
                                    FieldViolations* violations) {
  if (tokens.ids().empty()) {
    violations->Add("token_ids.ids", "is empty; at least one token is needed");
    return {};
  }
  const size_t vocab_size = model.config().vocab_size;
  for (int i = 0; i < tokens.ids_size(); ++i) {
    if (tokens.ids(i) < vocab_size) continue;
    CheckTokenId(absl::StrCat("token_ids.ids[", i, "]"), tokens.ids(i), model, violations);
    return {};
  }
  return {tokens.ids().begin(), tokens.ids().end()};
}

// The text or the token ids of a request, checked but for their number.
template <typename Request>
std::vector<int32_t> TranslateInput(const Request& request, const ServedModel& model,
                                    FieldViolations* violations) {
  if (request.has_prompt()) {
    return TokenizeText("prompt", request.prompt(), model, violations);
  }
  if (request.has_token_ids()) return CheckPromptIds(request.token_ids(), model, violations);
  violations->Add("prompt", "is not set; either prompt or token_ids is needed");
  return {};
}

void CheckLength(const char* field, size_t tokens, size_t max_tokens, FieldViolations* violations) {
  if (tokens <= max_tokens) return;
  violations->Add(field,
                  absl::StrCat("has ", tokens, " tokens; at most ", max_tokens, " are allowed"));
}

template <typename Request>
const char* InputField(const Request& request) {
  return request.has_prompt() ? "prompt" : "token_ids.ids";
}

std::vector<int32_t> TranslatePrompt(const v1::GenerateRequest& request, const ServedModel& model,
                                     FieldViolations* violations) {
  std::vector<int32_t> prompt = TranslateInput(request, model, violations);
  const size_t context = model.config().max_position_embeddings;
  if (prompt.size() >= context) {
    violations->Add(
        InputField(request),
        absl::StrCat("has ", prompt.size(),
                     " tokens, which leave no room for one more in a context of ", context));
  } else {
    CheckLength(InputField(request), prompt.size(), model.max_prompt_tokens, violations);
  }
  return prompt;
}

std::string TextOf(const std::vector<int32_t>& tokens, const Tokenizer& tokenizer) {
  Utf8Repair repair;
  std::string text;
  for (const int32_t id : tokens) repair.Append(tokenizer.TokenBytes(id), &text);
  repair.Finish(&text);
  return text;
}

// --- How to draw and when to stop ---

void TranslatePenalties(const v1::SamplingParameters& in, SamplingParams* out,
                        FieldViolations* violations) {
  if (in.has_repetition_penalty()) out->repetition_penalty = in.repetition_penalty();
  out->presence_penalty = in.presence_penalty();
  out->frequency_penalty = in.frequency_penalty();
  if (!std::isfinite(out->repetition_penalty) || out->repetition_penalty <= 0) {
    violations->Add("sampling.repetition_penalty",
                    absl::StrCat("is ", out->repetition_penalty, "; must be above 0 and finite"));
  }
  CheckRange("sampling.presence_penalty", out->presence_penalty, -2, 2, violations);
  CheckRange("sampling.frequency_penalty", out->frequency_penalty, -2, 2, violations);
}

void TranslateBiases(const v1::SamplingParameters& in, const ServedModel& model,
                     SamplingParams* out, FieldViolations* violations) {
  if (in.logit_bias_size() > static_cast<int>(RequestLimits::kMaxLogitBiases)) {
    violations->Add("sampling.logit_bias",
                    absl::StrCat("has ", in.logit_bias_size(), " entries; at most ",
                                 RequestLimits::kMaxLogitBiases, " are allowed"));
    return;
  }
  for (const auto& [id, bias] : in.logit_bias()) {
    const std::string field = absl::StrCat("sampling.logit_bias[", id, "]");
    CheckTokenId(field, id, model, violations);
    CheckRange(field.c_str(), bias, -100, 100, violations);
    out->logit_bias.push_back({.token = static_cast<int32_t>(id), .bias = bias});
  }
}

SamplingParams TranslateSampling(const v1::SamplingParameters& in, const ServedModel& model,
                                 FieldViolations* violations) {
  const GenerationDefaults& defaults = model.defaults;
  SamplingParams out;
  out.temperature = in.has_temperature() ? in.temperature() : defaults.temperature;
  out.top_k = in.has_top_k() ? in.top_k() : defaults.top_k;
  out.top_p = in.has_top_p() ? in.top_p() : defaults.top_p;
  out.min_p = in.has_min_p() ? in.min_p() : defaults.min_p;
  out.seed = in.seed();
  CheckRange("sampling.temperature", out.temperature, 0, RequestLimits::kMaxTemperature,
             violations);
  if (!(out.top_p > 0 && out.top_p <= 1)) {
    violations->Add("sampling.top_p",
                    absl::StrCat("is ", out.top_p, "; must be above 0 and at most 1"));
  }
  CheckRange("sampling.min_p", out.min_p, 0, 1, violations);
  TranslatePenalties(in, &out, violations);
  TranslateBiases(in, model, &out, violations);
  return out;
}

StoppingParams TranslateStopping(const v1::StoppingCriteria& in, const ServedModel& model,
                                 uint32_t max_tokens, FieldViolations* violations) {
  using Limits = RequestLimits;
  if (in.stop_size() > static_cast<int>(Limits::kMaxStopStrings)) {
    violations->Add("stopping.stop", absl::StrCat("has ", in.stop_size(), " strings; at most ",
                                                  Limits::kMaxStopStrings, " are allowed"));
  }
  // What is beyond the limit is not looked at: there may be millions.
  for (int i = 0; i < std::min<int>(in.stop_size(), Limits::kMaxStopStrings); ++i) {
    const size_t bytes = in.stop(i).size();
    if (bytes >= 1 && bytes <= Limits::kMaxStopStringBytes) continue;
    violations->Add(
        absl::StrCat("stopping.stop[", i, "]"),
        absl::StrCat("has ", bytes, " bytes; must have 1 to ", Limits::kMaxStopStringBytes));
  }
  if (in.stop_token_ids_size() > static_cast<int>(Limits::kMaxStopTokenIds)) {
    violations->Add("stopping.stop_token_ids",
                    absl::StrCat("has ", in.stop_token_ids_size(), " tokens; at most ",
                                 Limits::kMaxStopTokenIds, " are allowed"));
  }
  for (int i = 0; i < std::min<int>(in.stop_token_ids_size(), Limits::kMaxStopTokenIds); ++i) {
    CheckTokenId(absl::StrCat("stopping.stop_token_ids[", i, "]"), in.stop_token_ids(i), model,
                 violations);
  }
  if (in.min_tokens() > max_tokens) {
    violations->Add(
        "stopping.min_tokens",
        absl::StrCat("is ", in.min_tokens(), "; must be at most max_tokens (", max_tokens, ")"));
  }
  StoppingParams out;
  out.stop.assign(in.stop().begin(), in.stop().end());
  out.stop_token_ids.assign(in.stop_token_ids().begin(), in.stop_token_ids().end());
  out.ignore_eos = in.ignore_eos();
  out.min_tokens = in.min_tokens();
  return out;
}

void TranslateTheRest(const v1::GenerateRequest& request, TranslatedRequest* out,
                      FieldViolations* violations) {
  if (request.has_n()) {
    out->request.n = request.n();
    if (request.n() == 0 || request.n() > kMaxSequences) {
      violations->Add("n", absl::StrCat("is ", request.n(), "; must be from 1 to ", kMaxSequences));
    }
  }
  const v1::OutputOptions& output = request.output();
  if (output.has_logprobs()) {
    out->request.logprobs = output.logprobs();
    out->request.prompt_logprobs = output.echo();
    CheckAtMost("output.logprobs", output.logprobs(), kMaxLogprobs, violations);
  }
  out->echo = output.echo();
  out->return_token_ids = output.return_token_ids();
  out->request.priority = request.priority();
  out->request.cache_salt = request.cache_salt();
  if (request.cache_salt().size() > RequestLimits::kMaxCacheSaltBytes) {
    violations->Add("cache_salt",
                    absl::StrCat("has ", request.cache_salt().size(), " bytes; at most ",
                                 RequestLimits::kMaxCacheSaltBytes, " are allowed"));
  }
}

google::protobuf::Duration ToProto(absl::Duration duration) {
  google::protobuf::Duration out;
  out.set_seconds(absl::IDivDuration(duration, absl::Seconds(1), &duration));
  out.set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(duration)));
  return out;
}

// --- The description of a model ---

v1::ModelShape DescribeShape(const ModelConfig& config) {
  v1::ModelShape shape;
  shape.set_vocab_size(config.vocab_size);
  shape.set_hidden_size(config.hidden_size);
  shape.set_intermediate_size(config.intermediate_size);
  shape.set_num_hidden_layers(config.num_layers);
  shape.set_num_attention_heads(config.num_heads);
  shape.set_num_key_value_heads(config.num_kv_heads);
  shape.set_head_dim(config.head_dim);
  shape.set_sliding_window(config.sliding_window);
  for (const AttentionKind kind : config.layer_types) {
    shape.add_layer_types(kind == AttentionKind::kSliding ? v1::ATTENTION_TYPE_SLIDING
                                                          : v1::ATTENTION_TYPE_FULL);
  }
  shape.set_ffn_predictor_dim(config.ffn_predictor_dim);
  shape.set_attention_predictor_dim(config.attention_predictor_dim);
  shape.set_bos_token_id(config.bos_token_id);
  for (const int32_t id : config.eos_token_ids) shape.add_eos_token_ids(id);
  return shape;
}

v1::ModelLimits DescribeLimits(const ServedModel& model) {
  const EngineOptions& options = model.engine->options();
  v1::ModelLimits limits;
  limits.set_max_context_tokens(model.config().max_position_embeddings);
  limits.set_max_prompt_tokens(model.max_prompt_tokens);
  limits.set_max_sequences(kMaxSequences);
  limits.set_max_stop_strings(RequestLimits::kMaxStopStrings);
  limits.set_max_stop_string_bytes(RequestLimits::kMaxStopStringBytes);
  limits.set_max_stop_token_ids(RequestLimits::kMaxStopTokenIds);
  limits.set_max_logprobs(kMaxLogprobs);
  limits.set_max_logit_biases(RequestLimits::kMaxLogitBiases);
  limits.set_max_cache_salt_bytes(RequestLimits::kMaxCacheSaltBytes);
  limits.set_max_message_bytes(model.max_message_bytes);
  limits.set_max_answer_bytes(model.max_answer_bytes);
  limits.set_max_batch_size(options.max_batch_size);
  limits.set_max_batch_tokens(options.max_batch_tokens);
  limits.set_max_queue_requests(options.max_queue_requests);
  limits.set_max_queue_tokens(options.max_queue_tokens);
  limits.set_kv_cache_capacity_tokens(model.engine->kv_capacity_tokens());
  return limits;
}

}  // namespace

absl::StatusOr<TranslatedRequest> TranslateRequest(const v1::GenerateRequest& request,
                                                   const ServedModel& model) {
  FieldViolations violations;
  TranslatedRequest out;
  GenerationRequest& to = out.request;
  to.max_tokens =
      request.has_max_tokens() ? request.max_tokens() : RequestLimits::kDefaultMaxTokens;
  if (to.max_tokens == 0) violations.Add("max_tokens", "is 0; must be at least 1");
  to.sampling = TranslateSampling(request.sampling(), model, &violations);
  to.stopping = TranslateStopping(request.stopping(), model, to.max_tokens, &violations);
  TranslateTheRest(request, &out, &violations);
  // Last, and text only if all else is well: tokenizing is the part that costs.
  if (violations.empty() || !request.has_prompt()) {
    to.prompt = TranslatePrompt(request, model, &violations);
  }
  if (!violations.empty()) return violations.ToStatus();

  out.input_field = InputField(request);
  const size_t room = model.config().max_position_embeddings - to.prompt.size();
  to.max_tokens = static_cast<uint32_t>(std::min<size_t>(to.max_tokens, room));
  out.needs_seed = !request.sampling().has_seed();
  if (out.echo) {
    out.prompt_text =
        request.has_prompt() ? request.prompt() : TextOf(to.prompt, model.engine->tokenizer());
  }
  return out;
}

absl::StatusOr<TranslatedRequest> TranslateScore(const v1::ScoreRequest& request,
                                                 const ServedModel& model) {
  FieldViolations violations;
  TranslatedRequest out;
  out.request.prompt = TranslateInput(request, model, &violations);
  // Nothing is generated: a text may fill the context, unless prompts are kept shorter than that.
  const size_t context = model.config().max_position_embeddings;
  const size_t limit = model.max_prompt_tokens == context - 1 ? context : model.max_prompt_tokens;
  CheckLength(InputField(request), out.request.prompt.size(), limit, &violations);
  if (!violations.empty()) return violations.ToStatus();
  out.input_field = InputField(request);
  out.request.max_tokens = 0;
  out.request.logprobs = 0;
  out.request.prompt_logprobs = true;
  return out;
}

void FillSequence(uint32_t index, SequenceOutput output, const Tokenizer& tokenizer,
                  v1::Sequence* sequence) {
  sequence->set_index(index);
  sequence->set_text(std::move(output.text));
  sequence->mutable_token_ids()->Add(output.token_ids.begin(), output.token_ids.end());
  bool nothing_before = output.starts_prompt;
  for (const TokenLogprob& from : output.logprobs) {
    v1::TokenLogprob* const to = sequence->add_logprobs();
    to->set_token_id(static_cast<uint32_t>(from.token_id));
    to->set_text(TokenText(tokenizer, from.token_id));
    if (!std::exchange(nothing_before, false)) to->set_logprob(from.logprob);
    for (const TokenAlternative& other : from.alternatives) {
      v1::TokenAlternative* const alternative = to->add_alternatives();
      alternative->set_token_id(static_cast<uint32_t>(other.token_id));
      alternative->set_text(TokenText(tokenizer, other.token_id));
      alternative->set_logprob(other.logprob);
    }
  }
  if (!output.end.has_value()) return;
  sequence->set_finish_reason(ToProto(output.end->reason));
  sequence->set_stop_match(std::move(output.end->stop_match));
}

void FillScore(int32_t first_token, const std::vector<TokenLogprob>& others,
               const Tokenizer& tokenizer, v1::ScoreResponse* response) {
  const auto add = [&](int32_t id) {
    v1::ScoredToken* const token = response->add_tokens();
    token->set_token_id(static_cast<uint32_t>(id));
    token->set_text(TokenText(tokenizer, id));
    return token;
  };
  add(first_token);
  for (const TokenLogprob& entry : others) add(entry.token_id)->set_logprob(entry.logprob);
}

v1::FinishReason ToProto(FinishReason reason) {
  switch (reason) {
    case FinishReason::kLength:
      return v1::FINISH_REASON_LENGTH;
    case FinishReason::kEos:
      return v1::FINISH_REASON_EOS;
    case FinishReason::kStop:
      return v1::FINISH_REASON_STOP;
    case FinishReason::kCancelled:
      return v1::FINISH_REASON_CANCELLED;
    case FinishReason::kDeadlineExceeded:
      return v1::FINISH_REASON_DEADLINE_EXCEEDED;
    case FinishReason::kError:
      break;
  }
  return v1::FINISH_REASON_ERROR;
}

v1::Usage ToProto(const Usage& usage) {
  v1::Usage out;
  out.set_prompt_tokens(usage.prompt_tokens);
  out.set_cached_tokens(usage.cached_tokens);
  out.set_generated_tokens(usage.generated_tokens);
  return out;
}

v1::Timings ToProto(const Timings& timings) {
  v1::Timings out;
  *out.mutable_queue() = ToProto(timings.queue);
  *out.mutable_prefill() = ToProto(timings.prefill);
  if (timings.first_token > absl::ZeroDuration()) {
    *out.mutable_first_token() = ToProto(timings.first_token);
  }
  *out.mutable_decode() = ToProto(timings.decode);
  *out.mutable_total() = ToProto(timings.total);
  return out;
}

v1::Sparsity ToProto(const Sparsity& sparsity) {
  v1::Sparsity out;
  out.set_ffn_active_fraction(sparsity.ffn_active_fraction);
  out.set_attention_attended_positions(sparsity.attention_attended_positions);
  out.set_attention_attended_fraction(sparsity.attention_attended_fraction);
  out.set_flops_skipped_fraction(sparsity.flops_skipped_fraction);
  return out;
}

v1::ModelInfo DescribeModel(const ServedModel& model, bool is_default) {
  const ModelWeights& weights = model.engine->weights();
  const ModelConfig& config = weights.config;
  v1::ModelInfo info;
  info.set_name(model.name);
  info.set_is_default(is_default);
  info.set_architecture(config.spark() ? v1::ARCHITECTURE_SPARK_GEMMA2 : v1::ARCHITECTURE_GEMMA2);
  *info.mutable_shape() = DescribeShape(config);
  *info.mutable_limits() = DescribeLimits(model);

  v1::ModelWeights* held = info.mutable_weights();
  held->set_format(weights.FormatName());
  held->set_compute(ComputeTypeName(model.engine->compute_type()));
  held->set_num_parameters(config.NumParameters());
  held->set_size_bytes(weights.bytes());

  if (config.spark()) {
    v1::SparsityTargets* targets = info.mutable_sparsity_targets();
    targets->set_ffn_top_k(config.ffn_top_k);
    targets->set_ffn_active_fraction(static_cast<double>(config.ffn_top_k) /
                                     static_cast<double>(config.intermediate_size));
    targets->set_attention_top_k(config.attention_top_k);
  }
  v1::GenerationDefaults* defaults = info.mutable_generation_defaults();
  defaults->set_temperature(model.defaults.temperature);
  defaults->set_top_k(model.defaults.top_k);
  defaults->set_top_p(model.defaults.top_p);
  defaults->set_min_p(model.defaults.min_p);
  defaults->set_max_tokens(RequestLimits::kDefaultMaxTokens);
  return info;
}

}  // namespace firesteel::server
