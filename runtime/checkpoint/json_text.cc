#include "runtime/checkpoint/json_text.h"

#include <cmath>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "runtime/checkpoint/files.h"

namespace firesteel {
namespace {

/// A first pass over the text that builds nothing: syntax, depth and duplicate keys. It goes before
/// the pass that builds the document, so that a hostile text costs no more memory than its distinct
/// keys.
class Checker : public nlohmann::json_sax<nlohmann::json> {
 public:
  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }

  bool start_object(size_t) override { return Open(); }
  bool start_array(size_t) override { return Open(); }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }

  bool key(string_t& name) override {
    if (keys_.back().insert(name).second) return true;
    error_ = absl::StrCat("key \"", Printable(name), "\" stands there twice");
    return false;
  }

  bool parse_error(size_t position, const std::string&, const nlohmann::json::exception&) override {
    error_ = absl::StrCat("not valid JSON at byte ", position);
    return false;
  }

  const std::string& error() const { return error_; }

 private:
  bool Open() {
    keys_.emplace_back();
    if (keys_.size() <= kMaxJsonDepth) return true;
    error_ = absl::StrCat("nested deeper than ", kMaxJsonDepth);
    return false;
  }
  bool Close() {
    keys_.pop_back();
    return true;
  }

  std::vector<std::set<std::string>> keys_;  // of every open object (empty for an array)
  std::string error_;
};

}  // namespace

absl::StatusOr<nlohmann::json> ParseJsonObject(absl::string_view text) {
  Checker checker;
  const char* const begin = text.data();
  if (text.empty() || !nlohmann::json::sax_parse(begin, begin + text.size(), &checker)) {
    return absl::InvalidArgumentError(text.empty() ? "empty, not a JSON object" : checker.error());
  }
  nlohmann::json document =
      nlohmann::json::parse(begin, begin + text.size(), nullptr, /*allow_exceptions=*/false);
  if (!document.is_object()) return absl::InvalidArgumentError("not a JSON object");
  return document;
}

std::string JsonForMessage(const nlohmann::json& value) {
  if (value.is_structured()) return value.is_array() ? "a list" : "an object";
  return Printable(
      value.dump(-1, ' ', /*ensure_ascii=*/true, nlohmann::json::error_handler_t::replace));
}

bool JsonFields::Has(const char* key) const { return Find(key) != nullptr; }

const nlohmann::json* JsonFields::Find(const char* key) const {
  const auto it = object_.find(key);
  return it == object_.end() || it->is_null() ? nullptr : &*it;
}

const nlohmann::json* JsonFields::Require(const char* key) {
  const nlohmann::json* const value = Find(key);
  if (value == nullptr) Fail(key, "it is required");
  return value;
}

void JsonFields::Fail(const char* key, absl::string_view wanted) {
  if (!status_.ok()) return;
  const auto it = object_.find(key);
  if (it == object_.end()) {
    status_ = absl::InvalidArgumentError(absl::StrCat("key \"", key, "\" is missing: ", wanted));
  } else {
    FailValue(key, *it, wanted);
  }
}

void JsonFields::FailValue(const char* key, const nlohmann::json& value, absl::string_view wanted) {
  if (!status_.ok()) return;
  status_ = absl::InvalidArgumentError(
      absl::StrCat("key \"", key, "\" is ", JsonForMessage(value), ": ", wanted));
}

bool JsonFields::CheckInteger(const char* key, const nlohmann::json& value, Bounds<size_t> bounds,
                              size_t* out) {
  if (!status_.ok()) return false;
  if (value.is_number_unsigned()) {
    const uint64_t number = value.get<uint64_t>();
    if (number >= bounds.min && number <= bounds.max) {
      *out = static_cast<size_t>(number);
      return true;
    }
  }
  FailValue(key, value,
            absl::StrCat("it must be an integer from ", bounds.min, " to ", bounds.max));
  return false;
}

void JsonFields::Integer(const char* key, Bounds<size_t> bounds, size_t* out) {
  if (const nlohmann::json* value = Require(key)) CheckInteger(key, *value, bounds, out);
}

void JsonFields::OptionalInteger(const char* key, Bounds<size_t> bounds, size_t* out) {
  if (const nlohmann::json* value = Find(key)) CheckInteger(key, *value, bounds, out);
}

void JsonFields::CheckReal(const char* key, const nlohmann::json& value, Bounds<double> bounds,
                           double* out) {
  if (!status_.ok()) return;
  if (value.is_number()) {
    const double number = value.get<double>();
    if (std::isfinite(number) && number >= bounds.min && number <= bounds.max) {
      *out = number;
      return;
    }
  }
  FailValue(key, value, absl::StrCat("it must be a number from ", bounds.min, " to ", bounds.max));
}

void JsonFields::Real(const char* key, Bounds<double> bounds, double* out) {
  if (const nlohmann::json* value = Require(key)) CheckReal(key, *value, bounds, out);
}

void JsonFields::OptionalReal(const char* key, Bounds<double> bounds, double* out) {
  if (const nlohmann::json* value = Find(key)) CheckReal(key, *value, bounds, out);
}

void JsonFields::RealOrNull(const char* key, Bounds<double> bounds, double* out) {
  const auto it = object_.find(key);
  if (it == object_.end()) {
    Fail(key, "it is required (null for none)");
  } else if (it->is_null() || (it->is_number() && it->get<double>() == 0.0)) {
    *out = 0.0;
  } else {
    CheckReal(key, *it, bounds, out);
  }
}

void JsonFields::String(const char* key, std::string* out) {
  const nlohmann::json* const value = Require(key);
  if (value == nullptr) return;
  if (value->is_string()) {
    *out = value->get_ref<const std::string&>();
  } else {
    FailValue(key, *value, "it must be a string");
  }
}

void JsonFields::OptionalBool(const char* key, bool* out) {
  const nlohmann::json* const value = Find(key);
  if (value == nullptr) return;
  if (value->is_boolean()) {
    *out = value->get<bool>();
  } else {
    FailValue(key, *value, "it must be true or false");
  }
}

}  // namespace firesteel
