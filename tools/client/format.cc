#include "tools/client/format.h"

#include <algorithm>
#include <iterator>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "google/protobuf/util/json_util.h"

namespace firesteel::client {
namespace {

// `value` with three significant digits; all digits before the point are kept.
std::string ThreeDigits(double value) {
  const int decimals = value < 10 ? 2 : value < 100 ? 1 : 0;
  return absl::StrFormat("%.*f", decimals, value);
}

std::string Percent(double fraction) { return absl::StrFormat("%.1f%%", 100 * fraction); }

// 64 of 1000 → "64 (6.4%)"; nothing to divide by → "64".
std::string WithShare(uint64_t part, double fraction) {
  return fraction > 0 ? absl::StrCat(part, " (", Percent(fraction), ")") : absl::StrCat(part);
}

std::string LayerSummary(const v1::ModelShape& shape) {
  const auto sliding = std::count(shape.layer_types().begin(), shape.layer_types().end(),
                                  v1::ATTENTION_TYPE_SLIDING);
  const auto full =
      std::count(shape.layer_types().begin(), shape.layer_types().end(), v1::ATTENTION_TYPE_FULL);
  return absl::StrCat(shape.num_hidden_layers(), ": ", full, " full, ", sliding,
                      " with a window of ", shape.sliding_window());
}

std::string ArchitectureName(v1::Architecture architecture) {
  absl::string_view name = v1::Architecture_Name(architecture);
  absl::ConsumePrefix(&name, "ARCHITECTURE_");
  return name.empty() ? "unknown" : absl::AsciiStrToLower(name);
}

}  // namespace

absl::Duration ToDuration(const google::protobuf::Duration& duration) {
  return absl::Seconds(duration.seconds()) + absl::Nanoseconds(duration.nanos());
}

std::string ShortDuration(absl::Duration duration) {
  const double seconds = absl::ToDoubleSeconds(duration);
  if (seconds < 1e-3) return absl::StrCat(ThreeDigits(seconds * 1e6), " us");
  if (seconds < 1) return absl::StrCat(ThreeDigits(seconds * 1e3), " ms");
  return absl::StrCat(ThreeDigits(seconds), " s");
}

std::string FormatBytes(uint64_t bytes) {
  static constexpr const char* kUnits[] = {" KiB", " MiB", " GiB", " TiB"};
  if (bytes < 1024) return absl::StrCat(bytes, " B");
  double value = static_cast<double>(bytes) / 1024;
  size_t unit = 0;
  for (; value >= 1024 && unit + 1 < std::size(kUnits); ++unit) value /= 1024;
  return absl::StrCat(ThreeDigits(value), kUnits[unit]);
}

std::string FormatCount(uint64_t count) {
  const double value = static_cast<double>(count);
  if (count < 100'000) return absl::StrCat(count);
  if (count < 1'000'000'000) return absl::StrCat(ThreeDigits(value * 1e-6), " M");
  return absl::StrCat(ThreeDigits(value * 1e-9), " G");
}

std::string FinishReasonName(v1::FinishReason reason) {
  if (reason == v1::FINISH_REASON_UNSPECIFIED) return "none";
  absl::string_view name = v1::FinishReason_Name(reason);
  absl::ConsumePrefix(&name, "FINISH_REASON_");
  return name.empty() ? absl::StrCat("reason ", static_cast<int>(reason))
                      : absl::AsciiStrToLower(name);
}

std::string FormatSummary(const v1::Usage& usage, const v1::Timings& timings,
                          const v1::Sparsity& sparsity, const v1::Sequence& last,
                          absl::Duration first_text) {
  const absl::Duration first =
      timings.has_first_token() ? ToDuration(timings.first_token()) : first_text;
  const double decode_seconds = absl::ToDoubleSeconds(ToDuration(timings.decode()));
  std::vector<std::string> parts = {
      absl::StrCat(usage.prompt_tokens(), " prompt + ", usage.generated_tokens(),
                   " generated tokens in ", ShortDuration(ToDuration(timings.total()))),
      absl::StrCat("ttft ", ShortDuration(first))};
  if (usage.generated_tokens() > 1 && decode_seconds > 0) {
    parts.push_back(
        absl::StrCat(ThreeDigits((usage.generated_tokens() - 1) / decode_seconds), " tokens/s"));
  }
  parts.push_back(absl::StrCat("FFN ", Percent(sparsity.ffn_active_fraction()), " active"));
  parts.push_back(absl::StrFormat("attended %.1f positions (%s)",
                                  sparsity.attention_attended_positions(),
                                  Percent(sparsity.attention_attended_fraction())));
  parts.push_back(absl::StrCat("FLOPs skipped ", Percent(sparsity.flops_skipped_fraction())));
  std::string finish = absl::StrCat("finish ", FinishReasonName(last.finish_reason()));
  if (!last.stop_match().empty()) {
    absl::StrAppend(&finish, " '", absl::CEscape(last.stop_match()), "'");
  }
  parts.push_back(std::move(finish));
  return absl::StrCat("[", absl::StrJoin(parts, " | "), "]");
}

std::string FormatLogprob(const v1::TokenLogprob& token) {
  const auto quoted = [](const std::string& text) {
    return absl::StrCat("\"", absl::Utf8SafeCEscape(text), "\"");
  };
  std::string line = absl::StrFormat(
      "%10s  %s", token.has_logprob() ? absl::StrFormat("%.4f", token.logprob()) : "-",
      quoted(token.text()));
  for (const v1::TokenAlternative& other : token.alternatives()) {
    absl::StrAppendFormat(&line, "  |  %.4f %s", other.logprob(), quoted(other.text()));
  }
  return line;
}

std::string FormatServerInfo(const v1::GetServerInfoResponse& info) {
  std::string text = absl::StrCat("firesteel-server ", info.version(), ", ", info.threads(),
                                  info.threads() == 1 ? " thread" : " threads", ", SIMD target ",
                                  info.simd_target());
  if (info.available_simd_targets_size() > 0) {
    absl::StrAppend(&text, " of ", absl::StrJoin(info.available_simd_targets(), ", "));
  }
  text += "\n";
  if (info.has_start_time()) {
    absl::StrAppend(
        &text, "serving since ",
        absl::FormatTime("%Y-%m-%d %H:%M:%S UTC",
                         absl::FromUnixSeconds(info.start_time().seconds()), absl::UTCTimeZone()),
        "\n");
  }
  return text;
}

std::string FormatModel(const v1::ModelInfo& model) {
  const v1::ModelShape& shape = model.shape();
  const v1::ModelLimits& limits = model.limits();
  const v1::SparsityTargets& targets = model.sparsity_targets();
  const v1::GenerationDefaults& defaults = model.generation_defaults();

  std::vector<std::pair<std::string, std::string>> rows = {
      {"architecture", ArchitectureName(model.architecture())},
      {"parameters", FormatCount(model.weights().num_parameters())},
      {"weights",
       absl::StrCat(model.weights().format(), ", ", FormatBytes(model.weights().size_bytes()),
                    ", computed in ", model.weights().compute())},
      {"layers", LayerSummary(shape)},
      {"hidden size", absl::StrCat(shape.hidden_size())},
      {"heads", absl::StrCat(shape.num_attention_heads(), " query, ", shape.num_key_value_heads(),
                             " key/value, of ", shape.head_dim(), " dimensions")},
      {"FFN neurons", absl::StrCat(shape.intermediate_size())},
      {"vocabulary", absl::StrCat(shape.vocab_size())}};
  if (model.architecture() == v1::ARCHITECTURE_SPARK_GEMMA2) {
    rows.emplace_back("FFN top-k",
                      absl::StrCat(WithShare(targets.ffn_top_k(), targets.ffn_active_fraction()),
                                   ", predicted from ", shape.ffn_predictor_dim(), " dimensions"));
    rows.emplace_back("attention top-k",
                      absl::StrCat(targets.attention_top_k(), " positions, predicted from ",
                                   shape.attention_predictor_dim(), " dimensions"));
  }
  rows.emplace_back("context", absl::StrCat(limits.max_context_tokens(), " tokens, prompts up to ",
                                            limits.max_prompt_tokens()));
  rows.emplace_back("batch", absl::StrCat(limits.max_batch_size(), " sequences, ",
                                          limits.max_batch_tokens(), " tokens a step"));
  rows.emplace_back("queue", absl::StrCat(limits.max_queue_requests(), " requests, ",
                                          limits.max_queue_tokens(), " prompt tokens"));
  rows.emplace_back("KV cache", absl::StrCat(limits.kv_cache_capacity_tokens(), " positions"));
  rows.emplace_back("defaults",
                    absl::StrFormat("temperature %g, top-k %d, top-p %g, min-p %g, max tokens %d",
                                    defaults.temperature(), defaults.top_k(), defaults.top_p(),
                                    defaults.min_p(), defaults.max_tokens()));

  std::string text =
      absl::StrCat("model ", model.name(), model.is_default() ? " (default)" : "", "\n");
  for (const auto& [name, value] : rows) absl::StrAppendFormat(&text, "  %-16s %s\n", name, value);
  return text;
}

std::string VisibleText(absl::string_view text) {
  static constexpr absl::string_view kReplacement = "\xEF\xBF\xBD";
  std::string visible;
  visible.reserve(text.size());
  for (size_t i = 0; i < text.size(); ++i) {
    const unsigned char c = text[i];
    const unsigned char next = i + 1 < text.size() ? text[i + 1] : 0;
    if ((c < 0x20 && c != '\n' && c != '\t') || c == 0x7F) {
      absl::StrAppend(&visible, kReplacement);
    } else if (c == 0xC2 && next >= 0x80 && next <= 0x9F) {  // U+0080 to U+009F
      absl::StrAppend(&visible, kReplacement);
      ++i;
    } else {
      visible.push_back(text[i]);
    }
  }
  return visible;
}

absl::StatusOr<std::string> ToJson(const google::protobuf::Message& message) {
  google::protobuf::util::JsonPrintOptions options;
  options.always_print_primitive_fields = true;
  options.preserve_proto_field_names = true;
  std::string json;
  const auto status = google::protobuf::util::MessageToJsonString(message, &json, options);
  if (!status.ok()) {
    return absl::InternalError(
        absl::StrCat("the answer can't be written as JSON: ",
                     absl::string_view(status.message().data(), status.message().size())));
  }
  return json;
}

}  // namespace firesteel::client
