// JSON of untrusted files: parsed without exceptions, nesting bounded, duplicate keys refused; and
// typed access to an object's keys whose errors name the key, the value and the limit.

#ifndef FIRESTEEL_RUNTIME_CHECKPOINT_JSON_TEXT_H_
#define FIRESTEEL_RUNTIME_CHECKPOINT_JSON_TEXT_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "nlohmann/json.hpp"

namespace firesteel {

/// A number in [min, max], both included.
template <typename T>
struct Bounds {
  T min;
  T max;
};

/// Deepest nesting of arrays and objects that ParseJsonObject accepts.
inline constexpr size_t kMaxJsonDepth = 16;

/// Parses a JSON object. InvalidArgument with the byte at fault for a syntax error, a duplicate
/// key, nesting deeper than kMaxJsonDepth, a number out of double's range or anything that is not
/// one object.
absl::StatusOr<nlohmann::json> ParseJsonObject(absl::string_view text);

/// A value as it stands in the file, cut to a length fit for a message.
std::string JsonForMessage(const nlohmann::json& value);

/// Reads keys of one JSON object. The first error sticks and later reads do nothing, so that a
/// caller reads all keys in a row and looks at status() once. Not thread-safe; `object` outlives
/// it.
class JsonFields {
 public:
  explicit JsonFields(const nlohmann::json& object) : object_(object) {}

  /// True if the key is there and not null.
  bool Has(const char* key) const;
  /// The value of a key that is there and not null, else null.
  const nlohmann::json* Find(const char* key) const;

  /// A required integer: neither negative nor fractional, no number with a point or an exponent.
  void Integer(const char* key, Bounds<size_t> bounds, size_t* out);
  /// The same; an absent or null key leaves *out as it is.
  void OptionalInteger(const char* key, Bounds<size_t> bounds, size_t* out);
  /// A required finite number.
  void Real(const char* key, Bounds<double> bounds, double* out);
  /// The same; an absent or null key leaves *out as it is.
  void OptionalReal(const char* key, Bounds<double> bounds, double* out);
  /// Like Real, but null is 0, and 0 is in bounds. The key must be there.
  void RealOrNull(const char* key, Bounds<double> bounds, double* out);
  /// A required string.
  void String(const char* key, std::string* out);
  /// An absent or null key leaves *out as it is.
  void OptionalBool(const char* key, bool* out);

  /// Records an error unless there is one already: `key`, its value, and what was wanted.
  void Fail(const char* key, absl::string_view wanted);
  /// Checks one integer wherever it stands (an element of a list, say); `key` is for the message.
  bool CheckInteger(const char* key, const nlohmann::json& value, Bounds<size_t> bounds,
                    size_t* out);

  bool ok() const { return status_.ok(); }
  const absl::Status& status() const { return status_; }

 private:
  /// The value of a required key; records an error where it is absent or null.
  const nlohmann::json* Require(const char* key);
  void CheckReal(const char* key, const nlohmann::json& value, Bounds<double> bounds, double* out);
  void FailValue(const char* key, const nlohmann::json& value, absl::string_view wanted);

  const nlohmann::json& object_;
  absl::Status status_;
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_CHECKPOINT_JSON_TEXT_H_
