// Which element types a model's matrices have. Matrices of different use have different needs: rows
// that are read here and there are cheap at any width but must be added quickly, the predictor
// decides which neurons live, the output head is a quarter of all bytes.

#ifndef FIRESTEEL_RUNTIME_CHECKPOINT_WEIGHT_FORMAT_H_
#define FIRESTEEL_RUNTIME_CHECKPOINT_WEIGHT_FORMAT_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/tensor.h"

namespace firesteel {

/// "f32", "bf16", "int8" or "int4".
const char* DTypeName(kernels::DType dtype);

/// What a matrix is for. kAttention: q, k, v and o projections. kPredictor: gate_proj of a Spark
/// model. kFfn: up_proj and down_proj, and gate_proj of a dense model. kHead: the tied embedding.
enum class WeightRole : uint8_t { kAttention, kPredictor, kFfn, kHead };
inline constexpr size_t kNumWeightRoles = 4;

/// "attention", "predictor", "ffn" or "head".
const char* WeightRoleName(WeightRole role);

/// The element type of each role's matrices. A dense model has no matrix of kPredictor.
struct WeightTypes {
  /// The same for all.
  constexpr WeightTypes(kernels::DType all)  // NOLINT(google-explicit-constructor): a DType is one
      : types{all, all, all, all} {}

  kernels::DType operator[](WeightRole role) const { return types[static_cast<size_t>(role)]; }
  kernels::DType& operator[](WeightRole role) { return types[static_cast<size_t>(role)]; }
  /// Whether some role has this type.
  bool Has(kernels::DType dtype) const;
  /// Whether matrices are integers: all or none are.
  bool quantized() const { return kernels::IsQuantized(types[0]); }
  /// InvalidArgument unless all are quantized, or all are the same: products of integers and of
  /// floats take different inputs.
  absl::Status Check() const;
  friend bool operator==(const WeightTypes& a, const WeightTypes& b) { return a.types == b.types; }

  std::array<kernels::DType, kNumWeightRoles> types;
};

/// How weights are to be held: what --weights says. A base, and for quantized bases other types of
/// some roles. kAuto keeps bf16 as bf16 and everything else as f32. kI4 leaves the FFN of a Spark
/// model at 8 bits: few of its rows are read, and 8-bit rows are added as integers
/// (kernels/integer_rows.h), twice as fast as 4-bit ones.
class WeightFormat {
 public:
  enum Base : uint8_t { kAuto, kBF16, kF32, kI8, kI4 };

  constexpr WeightFormat(Base base = kAuto)  // NOLINT(google-explicit-constructor): a Base is one
      : base_(base) {}

  /// "auto", "f32", "bf16", "int8" or "int4", the last two with exceptions: "int4,head=int8".
  /// InvalidArgument says what is wrong, without the value itself.
  static absl::StatusOr<WeightFormat> Parse(absl::string_view text);
  /// What Parse takes.
  std::string Name() const;
  /// The name of what gives `types` to a Spark or a dense model.
  static std::string NameOf(const WeightTypes& types, bool spark);

  /// The types of a Spark or a dense model; kAuto gives `stored`.
  WeightTypes TypesOf(bool spark, const WeightTypes& stored) const;
  friend bool operator==(const WeightFormat& a, const WeightFormat& b) {
    return a.base_ == b.base_ && a.exceptions_ == b.exceptions_;
  }

 private:
  Base base_;
  std::array<std::optional<kernels::DType>, kNumWeightRoles> exceptions_;
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_CHECKPOINT_WEIGHT_FORMAT_H_
