#include "tools/convert/report.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "nlohmann/json.hpp"

namespace firesteel::convert {
namespace {

/// `value` in the largest of the units that leaves at least 1.
std::string InUnits(uint64_t value, double step, std::initializer_list<const char*> units) {
  double scaled = static_cast<double>(value);
  const char* chosen = nullptr;
  for (const char* unit : units) {
    if (scaled < step) break;
    scaled /= step;
    chosen = unit;
  }
  return chosen == nullptr ? absl::StrCat(value) : absl::StrFormat("%.1f %s", scaled, chosen);
}

std::string Hex(uint64_t checksum) { return absl::StrFormat("%016x", checksum); }

nlohmann::json SpanJson(const PackedSpan& span) {
  return {{"offset", span.offset}, {"bytes", span.bytes}, {"checksum", Hex(span.checksum)}};
}

}  // namespace

std::string FormatBytes(uint64_t bytes) {
  const std::string text = InUnits(bytes, 1024, {"KiB", "MiB", "GiB", "TiB"});
  return bytes < 1024 ? absl::StrCat(text, " bytes") : text;
}

std::string FormatCount(uint64_t count) { return InUnits(count, 1000, {"K", "M", "G", "T"}); }

std::string ToTable(const PackedFile& file) {
  const ModelConfig& c = file.config();
  const GenerationDefaults& d = file.generation_defaults();
  std::string out = absl::StrFormat(
      "%s: format version %d, %s\n"
      "model     %s, %s parameters, %s weights\n"
      "shape     %d layers, hidden %d, intermediate %d, %d heads of %d, %d key/value heads, "
      "vocabulary %d, context %d\n",
      file.path(), kPackedVersion, FormatBytes(file.size()), c.spark() ? "spark_gemma2" : "gemma2",
      FormatCount(c.NumParameters()), file.FormatName(), c.num_layers, c.hidden_size,
      c.intermediate_size, c.num_heads, c.head_dim, c.num_kv_heads, c.vocab_size,
      c.max_position_embeddings);
  if (c.spark()) {
    absl::StrAppendFormat(&out, "sparsity  FFN top %d of %d, attention top %d\n", c.ffn_top_k,
                          c.intermediate_size, c.attention_top_k);
  }
  absl::StrAppendFormat(&out, "sampling  temperature %g, top_k %d, top_p %g, min_p %g\n\n",
                        d.temperature, d.top_k, d.top_p, d.min_p);
  absl::StrAppendFormat(&out, "%-32s %-5s %16s %7s %13s %12s %12s  %s\n", "part", "type", "shape",
                        "stride", "offset", "bytes", "scales", "XXH3-64");
  for (const PackedPart& part : file.parts()) {
    absl::StrAppendFormat(
        &out, "%-32s %-5s %16s %7d %13d %12d %12d  %s\n", part.name, PackedTypeName(part.type),
        part.rows == 1 ? absl::StrCat("[", part.cols, "]")
                       : absl::StrCat("[", part.rows, ", ", part.cols, "]"),
        part.stride, part.data.offset, part.data.bytes, part.scales.bytes, Hex(part.data.checksum));
  }
  return out;
}

std::string ToJson(const PackedFile& file) {
  const GenerationDefaults& d = file.generation_defaults();
  nlohmann::ordered_json parts = nlohmann::ordered_json::array();
  nlohmann::ordered_json tokenizer_bytes = nullptr;
  for (const PackedPart& part : file.parts()) {
    nlohmann::ordered_json row = {{"name", part.name},     {"type", PackedTypeName(part.type)},
                                  {"rows", part.rows},     {"cols", part.cols},
                                  {"stride", part.stride}, {"data", SpanJson(part.data)}};
    if (part.scales.bytes > 0) row["scales"] = SpanJson(part.scales);
    if (part.name == "tokenizer.model") tokenizer_bytes = part.data.bytes;
    parts.push_back(std::move(row));
  }
  const nlohmann::ordered_json json = {
      {"file", file.path()},
      {"format_version", kPackedVersion},
      {"bytes", file.size()},
      {"weights", file.FormatName()},
      {"parameters", file.config().NumParameters()},
      {"config", nlohmann::ordered_json::parse(ModelConfigToJson(file.config()))},
      {"generation_defaults",
       {{"temperature", d.temperature},
        {"top_k", d.top_k},
        {"top_p", d.top_p},
        {"min_p", d.min_p}}},
      {"tokenizer_bytes", tokenizer_bytes},
      {"parts", std::move(parts)},
  };
  return absl::StrCat(
      json.dump(2, ' ', /*ensure_ascii=*/false, nlohmann::json::error_handler_t::replace), "\n");
}

}  // namespace firesteel::convert
