#include "server/kserve_translation.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "runtime/tokenizer/utf8_repair.h"
#include "server/status.h"

namespace firesteel::server {
namespace {

constexpr char kTextInput[] = "text_input";
constexpr char kTextOutput[] = "text_output";

// --- Parameters ---

using Parameter = inference::InferParameter;
/// Sets a field of the request from a parameter; returns what is wrong with the value, if anything.
using Setter = std::string (*)(const Parameter&, v1::GenerateRequest*);

std::string Shown(const Parameter& value) {
  switch (value.parameter_choice_case()) {
    case Parameter::kBoolParam:
      return value.bool_param() ? "true" : "false";
    case Parameter::kInt64Param:
      return absl::StrCat(value.int64_param());
    case Parameter::kUint64Param:
      return absl::StrCat(value.uint64_param());
    case Parameter::kDoubleParam:
      return absl::StrCat(value.double_param());
    case Parameter::kStringParam:
      return Quoted(value.string_param());
    case Parameter::PARAMETER_CHOICE_NOT_SET:
      break;
  }
  return "not set";
}

// Clients whose library has no numbers of the right type send text.
std::optional<double> Number(const Parameter& value) {
  double number = 0;
  switch (value.parameter_choice_case()) {
    case Parameter::kInt64Param:
      return static_cast<double>(value.int64_param());
    case Parameter::kUint64Param:
      return static_cast<double>(value.uint64_param());
    case Parameter::kDoubleParam:
      return value.double_param();
    case Parameter::kStringParam:
      if (absl::SimpleAtod(value.string_param(), &number)) return number;
      return std::nullopt;
    default:
      return std::nullopt;
  }
}

template <typename Int>
std::optional<Int> Whole(const Parameter& value) {
  using Limits = std::numeric_limits<Int>;
  switch (value.parameter_choice_case()) {
    case Parameter::kInt64Param:
      if (std::in_range<Int>(value.int64_param())) return static_cast<Int>(value.int64_param());
      return std::nullopt;
    case Parameter::kUint64Param:
      if (std::in_range<Int>(value.uint64_param())) return static_cast<Int>(value.uint64_param());
      return std::nullopt;
    case Parameter::kDoubleParam: {
      const double number = value.double_param();
      const bool fits = number == std::floor(number) &&
                        number >= static_cast<double>(Limits::min()) &&
                        number < std::ldexp(1.0, Limits::digits);
      if (fits) return static_cast<Int>(number);
      return std::nullopt;
    }
    case Parameter::kStringParam: {
      Int number = 0;
      if (absl::SimpleAtoi(value.string_param(), &number)) return number;
      return std::nullopt;
    }
    default:
      return std::nullopt;
  }
}

std::optional<bool> Truth(const Parameter& value) {
  bool truth = false;
  if (value.has_bool_param()) return value.bool_param();
  if (value.has_string_param() && absl::SimpleAtob(value.string_param(), &truth)) return truth;
  return std::nullopt;
}

constexpr char kNoNumber[] = "must be a number";
constexpr char kNoTruth[] = "must be true or false";

template <typename Int>
std::string NoWhole() {
  using Limits = std::numeric_limits<Int>;
  return absl::StrCat("must be a whole number from ", Limits::min(), " to ", Limits::max());
}

// The setters of one kind: VALUE turns the parameter into an optional, FIELD is an expression that
// takes it.
#define FIRESTEEL_PARAMETER(VALUE, ERROR, STATEMENT)                            \
  [](const Parameter& parameter, v1::GenerateRequest* request) -> std::string { \
    const auto value = VALUE(parameter);                                        \
    if (!value.has_value()) return ERROR;                                       \
    STATEMENT;                                                                  \
    return "";                                                                  \
  }
#define FIRESTEEL_FLOAT(FIELD)           \
  FIRESTEEL_PARAMETER(Number, kNoNumber, \
                      request->mutable_sampling()->set_##FIELD(static_cast<float>(*value)))

// One string, or a JSON list of strings: parameters have no lists.
std::string SetStop(const Parameter& parameter, v1::GenerateRequest* request) {
  constexpr char kWrong[] = "must be a string, or a JSON list of strings";
  if (!parameter.has_string_param()) return kWrong;
  const std::string& text = parameter.string_param();
  if (text.empty() || text.front() != '[') {
    request->mutable_stopping()->add_stop(text);
    return "";
  }
  const auto list = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!list.is_array()) return kWrong;
  for (const auto& entry : list) {
    if (!entry.is_string()) return kWrong;
    request->mutable_stopping()->add_stop(entry.get<std::string>());
  }
  return "";
}

std::string SetCacheSalt(const Parameter& parameter, v1::GenerateRequest* request) {
  if (!parameter.has_string_param()) return "must be a string";
  request->set_cache_salt(parameter.string_param());
  return "";
}

const std::map<std::string, Setter>& Setters() {
  static const auto* const setters = new std::map<std::string, Setter>{
      {"cache_salt", SetCacheSalt},
      {"echo", FIRESTEEL_PARAMETER(Truth, kNoTruth, request->mutable_output()->set_echo(*value))},
      {"frequency_penalty", FIRESTEEL_FLOAT(frequency_penalty)},
      {"ignore_eos",
       FIRESTEEL_PARAMETER(Truth, kNoTruth, request->mutable_stopping()->set_ignore_eos(*value))},
      {"logprobs", FIRESTEEL_PARAMETER(Whole<uint32_t>, NoWhole<uint32_t>(),
                                       request->mutable_output()->set_logprobs(*value))},
      {"max_tokens",
       FIRESTEEL_PARAMETER(Whole<uint32_t>, NoWhole<uint32_t>(), request->set_max_tokens(*value))},
      {"min_p", FIRESTEEL_FLOAT(min_p)},
      {"min_tokens", FIRESTEEL_PARAMETER(Whole<uint32_t>, NoWhole<uint32_t>(),
                                         request->mutable_stopping()->set_min_tokens(*value))},
      {"presence_penalty", FIRESTEEL_FLOAT(presence_penalty)},
      {"priority",
       FIRESTEEL_PARAMETER(Whole<int32_t>, NoWhole<int32_t>(), request->set_priority(*value))},
      {"repetition_penalty", FIRESTEEL_FLOAT(repetition_penalty)},
      {"seed", FIRESTEEL_PARAMETER(Whole<uint64_t>, NoWhole<uint64_t>(),
                                   request->mutable_sampling()->set_seed(*value))},
      {"stop", SetStop},
      {"temperature", FIRESTEEL_FLOAT(temperature)},
      {"top_k", FIRESTEEL_PARAMETER(Whole<uint32_t>, NoWhole<uint32_t>(),
                                    request->mutable_sampling()->set_top_k(*value))},
      {"top_p", FIRESTEEL_FLOAT(top_p)},
  };
  return *setters;
}

#undef FIRESTEEL_FLOAT
#undef FIRESTEEL_PARAMETER

// Parameters that shape the answer and not the generation.
constexpr char kDetails[] = "details";
// Asked for by Triton's clients. The last message of a stream says that it is the last in any case.
constexpr char kEmptyFinal[] = "triton_enable_empty_final_response";

// As Triton's clients send it, in microseconds; 0: no limit.
constexpr char kTimeout[] = "timeout";

const std::string& KnownParameters() {
  static const auto* const known = [] {
    std::vector<std::string> names = {kDetails, kTimeout};
    for (const auto& [name, setter] : Setters()) names.push_back(name);
    return new std::string(absl::StrJoin(names, ", "));
  }();
  return *known;
}

void ReadParameters(const inference::ModelInferRequest& request, v1::GenerateRequest* common,
                    absl::Duration* timeout, bool* details, FieldViolations* violations) {
  for (const auto& [name, value] : request.parameters()) {
    const std::string field = absl::StrCat("parameters[", Quoted(name), "]");
    std::string wrong;
    if (const auto setter = Setters().find(name); setter != Setters().end()) {
      wrong = setter->second(value, common);
    } else if (name == kDetails || name == kEmptyFinal) {
      const auto truth = Truth(value);
      if (!truth.has_value()) wrong = kNoTruth;
      if (name == kDetails) *details = truth.value_or(false);
    } else if (name == kTimeout) {
      const auto microseconds = Whole<int64_t>(value);
      if (microseconds.value_or(-1) < 0) {
        wrong = "must be a whole number of microseconds, from 0 on";
      } else if (*microseconds > 0) {
        *timeout = absl::Microseconds(*microseconds);
      }
    } else {
      violations->Add(field,
                      absl::StrCat("is no parameter of this model; known are ", KnownParameters()));
      continue;
    }
    if (!wrong.empty()) violations->Add(field, absl::StrCat("is ", Shown(value), "; ", wrong));
  }
}

// --- Input tensors ---

// Elements of a BYTES tensor, each behind its length as a little-endian 32-bit number. Nothing
// where the bytes are cut short.
std::optional<std::vector<std::string>> ReadRaw(const std::string& raw) {
  std::vector<std::string> elements;
  size_t at = 0;
  while (at < raw.size()) {
    if (raw.size() - at < 4) return std::nullopt;
    uint32_t length = 0;
    for (int i = 3; i >= 0; --i) {
      length = length << 8 | static_cast<uint8_t>(raw[at + static_cast<size_t>(i)]);
    }
    at += 4;
    if (raw.size() - at < length) return std::nullopt;
    elements.push_back(raw.substr(at, length));
    at += length;
    if (elements.size() > kMaxInferBatch) return std::nullopt;
  }
  return elements;
}

bool IsUtf8(const std::string& text) {
  Utf8Repair repair;
  std::string repaired;
  repair.Append(text, &repaired);
  repair.Finish(&repaired);
  return repaired == text;
}

// As many dimensions as a message should show.
std::string ShownShape(const inference::ModelInferRequest::InferInputTensor& tensor) {
  constexpr int kShown = 4;
  const auto& shape = tensor.shape();
  const auto end = shape.begin() + std::min(shape.size(), kShown);
  return absl::StrCat("[", absl::StrJoin(shape.begin(), end, ", "),
                      end == shape.end() ? "]" : absl::StrCat(", ...] of ", shape.size()));
}

// Whether there are elements of other types than the tensor's.
bool HoldsOthers(const inference::InferTensorContents& contents) {
  return contents.bool_contents_size() + contents.int_contents_size() +
             contents.int64_contents_size() + contents.uint_contents_size() +
             contents.uint64_contents_size() + contents.fp32_contents_size() +
             contents.fp64_contents_size() >
         0;
}

// [N], or [N, 1] as clients send that count a batch apart.
std::optional<size_t> BatchOf(const inference::ModelInferRequest::InferInputTensor& tensor) {
  const int rank = tensor.shape_size();
  if (rank < 1 || rank > 2 || (rank == 2 && tensor.shape(1) != 1)) return std::nullopt;
  if (tensor.shape(0) < 1 || tensor.shape(0) > static_cast<int64_t>(kMaxInferBatch)) {
    return std::nullopt;
  }
  return static_cast<size_t>(tensor.shape(0));
}

std::vector<std::string> ReadTexts(const inference::ModelInferRequest& request,
                                   FieldViolations* violations) {
  const auto refuse = [violations](const char* field, const std::string& why) {
    violations->Add(field, why);
    return std::vector<std::string>();
  };
  if (request.inputs_size() != 1 || request.inputs(0).name() != kTextInput) {
    return refuse("inputs", absl::StrCat("has ", request.inputs_size(),
                                         " tensors; exactly one is needed, named ", kTextInput));
  }
  const auto& tensor = request.inputs(0);
  if (tensor.datatype() != "BYTES") {
    return refuse("inputs[0].datatype",
                  absl::StrCat("is ", Quoted(tensor.datatype()), "; must be \"BYTES\""));
  }
  if (!tensor.parameters().empty()) {
    return refuse("inputs[0].parameters",
                  absl::StrCat("has ", tensor.parameters().size(), " entries; none is known"));
  }
  const auto batch = BatchOf(tensor);
  if (!batch.has_value()) {
    return refuse("inputs[0].shape",
                  absl::StrCat("is ", ShownShape(tensor), "; must be [N] or [N, 1], N from 1 to ",
                               kMaxInferBatch));
  }
  std::optional<std::vector<std::string>> texts;
  if (request.raw_input_contents_size() > 0) {
    if (request.raw_input_contents_size() != 1 || tensor.has_contents()) {
      return refuse("raw_input_contents", "goes with one entry an input, and no contents beside");
    }
    texts = ReadRaw(request.raw_input_contents(0));
  } else {
    if (HoldsOthers(tensor.contents())) {
      return refuse("inputs[0].contents",
                    "has elements of another type; those of BYTES are bytes_contents");
    }
    const auto& contents = tensor.contents().bytes_contents();
    texts.emplace(contents.begin(), contents.end());
  }
  if (!texts.has_value() || texts->size() != *batch) {
    return refuse("inputs[0]", absl::StrCat("does not hold the ", *batch,
                                            " BYTES elements that its shape asks for"));
  }
  for (size_t i = 0; i < texts->size(); ++i) {
    if (IsUtf8((*texts)[i])) continue;
    const bool raw = request.raw_input_contents_size() > 0;
    violations->Add(raw ? absl::StrCat("raw_input_contents[0], element ", i)
                        : absl::StrCat("inputs[0].contents.bytes_contents[", i, "]"),
                    "is not UTF-8");
  }
  return *std::move(texts);
}

// --- Output tensors ---

/// A tensor that can be asked for: what it holds for each text.
struct OutputTensor {
  const char* name;
  const char* datatype;
  bool by_default;
  std::string (*bytes)(const InferOutput&);  // null: a number
  uint32_t (*number)(const InferOutput&);
};

std::string FinishReasonLabel(const InferOutput& output) {
  if (output.sequence.finish_reason() == v1::FINISH_REASON_UNSPECIFIED) return "";
  // As the label values of the metrics: "length".
  const std::string name = v1::FinishReason_Name(output.sequence.finish_reason());
  return absl::AsciiStrToLower(absl::StripPrefix(name, "FINISH_REASON_"));
}

std::string DetailsJson(const InferOutput& output) {
  nlohmann::ordered_json details = {{"finish_reason", FinishReasonLabel(output)},
                                    {"stop_match", output.sequence.stop_match()},
                                    {"prompt_tokens", output.usage.prompt_tokens},
                                    {"generated_tokens", output.usage.generated_tokens}};
  auto& logprobs = details["logprobs"] = nlohmann::ordered_json::array();
  for (const v1::TokenLogprob& token : output.sequence.logprobs()) {
    nlohmann::ordered_json entry = {{"id", token.token_id()}, {"text", token.text()}};
    entry["logprob"] = token.has_logprob() ? nlohmann::ordered_json(token.logprob())
                                           : nlohmann::ordered_json(nullptr);
    for (const v1::TokenAlternative& other : token.alternatives()) {
      entry["alternatives"].push_back(
          {{"id", other.token_id()}, {"text", other.text()}, {"logprob", other.logprob()}});
    }
    logprobs.push_back(std::move(entry));
  }
  return details.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

constexpr OutputTensor kOutputs[] = {
    {kTextOutput, "BYTES", true, [](const InferOutput& o) { return o.sequence.text(); }, nullptr},
    {"finish_reason", "BYTES", false, FinishReasonLabel, nullptr},
    {"prompt_tokens", "UINT32", false, nullptr,
     [](const InferOutput& o) { return o.usage.prompt_tokens; }},
    {"generated_tokens", "UINT32", false, nullptr,
     [](const InferOutput& o) { return o.usage.generated_tokens; }},
    {"details", "BYTES", false, DetailsJson, nullptr},
};

std::vector<std::string> ReadOutputs(const inference::ModelInferRequest& request, bool details,
                                     FieldViolations* violations) {
  std::vector<std::string> wanted;
  if (request.outputs_size() > static_cast<int>(std::size(kOutputs))) {
    violations->Add("outputs", absl::StrCat("has ", request.outputs_size(),
                                            " entries; this model has ", std::size(kOutputs)));
    return wanted;
  }
  for (int i = 0; i < request.outputs_size(); ++i) {
    const auto& output = request.outputs(i);
    const bool known =
        std::any_of(std::begin(kOutputs), std::end(kOutputs),
                    [&](const auto& tensor) { return output.name() == tensor.name; });
    const bool repeated = std::find(wanted.begin(), wanted.end(), output.name()) != wanted.end();
    if (!known || repeated) {
      violations->Add(absl::StrCat("outputs[", i, "].name"),
                      absl::StrCat("is ", Quoted(output.name()),
                                   known ? "; it is there already" : "; no output of this model"));
    }
    if (!output.parameters().empty()) {
      violations->Add(absl::StrCat("outputs[", i, "].parameters"),
                      absl::StrCat("has ", output.parameters().size(), " entries; none is known"));
    }
    wanted.push_back(output.name());
  }
  if (!wanted.empty()) return wanted;
  for (const OutputTensor& tensor : kOutputs) {
    if (tensor.by_default || details) wanted.emplace_back(tensor.name);
  }
  return wanted;
}

void AppendLittleEndian(uint32_t value, std::string* to) {
  for (int shift = 0; shift < 32; shift += 8) {
    to->push_back(static_cast<char>(value >> shift & 0xFF));
  }
}

}  // namespace

absl::StatusOr<InferRequest> TranslateInfer(const inference::ModelInferRequest& request) {
  if (!request.model_version().empty() && request.model_version() != kModelVersion) {
    return Refusal(kModelNotFound,
                   absl::StrCat("model_version: is ", Quoted(request.model_version()),
                                "; every model has the one version ", kModelVersion));
  }
  FieldViolations violations;
  v1::GenerateRequest common;
  common.set_model(request.model_name());
  bool details = false;
  InferRequest out;
  ReadParameters(request, &common, &out.timeout, &details, &violations);
  out.id = request.id();
  if (out.id.size() > kMaxInferIdBytes) {
    violations.Add("id", absl::StrCat("has ", out.id.size(), " bytes; at most ", kMaxInferIdBytes,
                                      " are allowed"));
  }
  out.raw = request.raw_input_contents_size() > 0;
  out.outputs = ReadOutputs(request, details, &violations);
  std::vector<std::string> texts = ReadTexts(request, &violations);
  if (!violations.empty()) return violations.ToStatus();
  out.shape.assign(request.inputs(0).shape().begin(), request.inputs(0).shape().end());
  for (std::string& text : texts) {
    out.requests.push_back(common);
    out.requests.back().set_prompt(std::move(text));
  }
  return out;
}

void FillInfer(const InferRequest& request, const std::string& model,
               const std::vector<InferOutput>& outputs, inference::ModelInferResponse* response) {
  response->set_model_name(model);
  response->set_model_version(kModelVersion);
  response->set_id(request.id);
  for (const std::string& name : request.outputs) {
    const auto* const tensor = std::find_if(std::begin(kOutputs), std::end(kOutputs),
                                            [&](const auto& t) { return name == t.name; });
    auto* const to = response->add_outputs();
    to->set_name(name);
    to->set_datatype(tensor->datatype);
    to->mutable_shape()->Add(request.shape.begin(), request.shape.end());
    std::string raw;
    for (const InferOutput& output : outputs) {
      if (tensor->bytes == nullptr) {
        if (request.raw) {
          AppendLittleEndian(tensor->number(output), &raw);
        } else {
          to->mutable_contents()->add_uint_contents(tensor->number(output));
        }
        continue;
      }
      std::string bytes = tensor->bytes(output);
      if (request.raw) {
        AppendLittleEndian(static_cast<uint32_t>(bytes.size()), &raw);
        raw += bytes;
      } else {
        to->mutable_contents()->add_bytes_contents(std::move(bytes));
      }
    }
    if (request.raw) response->add_raw_output_contents(std::move(raw));
  }
}

void DescribeTensors(const ServedModel& model, inference::ModelMetadataResponse* response) {
  response->set_name(model.name);
  response->add_versions(kModelVersion);
  response->set_platform(model.config().spark() ? "firesteel_spark_gemma2" : "firesteel_gemma2");
  auto* const input = response->add_inputs();
  input->set_name(kTextInput);
  input->set_datatype("BYTES");
  input->add_shape(-1);
  for (const OutputTensor& tensor : kOutputs) {
    auto* const output = response->add_outputs();
    output->set_name(tensor.name);
    output->set_datatype(tensor.datatype);
    output->add_shape(-1);
  }
}

}  // namespace firesteel::server
