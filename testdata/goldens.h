// Reads what the reference program says about a model: the .golden files that
// tools/reference/make_goldens.py makes (the format is described there). For tests only.

#ifndef FIRESTEEL_TESTDATA_GOLDENS_H_
#define FIRESTEEL_TESTDATA_GOLDENS_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace firesteel {

/// The two largest logits where a continued token was chosen, the larger (the chosen token's)
/// first.
struct GoldenTopTwo {
  int32_t ids[2] = {0, 0};
  float logits[2] = {0, 0};
};

/// One prompt. Active sets are of the prompt's positions; they are kept packed and unpacked when
/// asked for.
class GoldenPrompt {
 public:
  std::string name;
  std::vector<int32_t> ids;
  std::vector<size_t> logit_positions;  // rising; the first and the last position are among them
  std::vector<std::vector<float>>
      logits;                         // [logit_positions, vocab], rounded to multiples of 2^-13
  std::vector<int32_t> continuation;  // greedy; ends early only with eos or with the context
  std::vector<GoldenTopTwo> top_two;  // of each continued token

  /// Neurons with a > 0, rising. Spark only; layer and position in range.
  std::vector<uint32_t> ffn_active(size_t layer, size_t position) const;
  /// Positions (absolute, rising) that a query head keeps. Spark only; all arguments in range.
  std::vector<uint32_t> attention_kept(size_t layer, size_t position, size_t head) const;

 private:
  friend class GoldenReader;

  size_t heads_ = 0;
  size_t features_ = 0;
  std::vector<size_t> windows_;  // [layers]; 0: none
  std::shared_ptr<const std::string> ffn_;
  std::shared_ptr<const std::string> attention_;
  std::vector<size_t> ffn_offsets_;        // [layers, positions]
  std::vector<size_t> attention_offsets_;  // [layers, positions, heads]
};

struct Goldens {
  bool spark = false;
  size_t layers = 0;
  size_t heads = 0;
  size_t vocab_size = 0;
  size_t intermediate_size = 0;
  std::vector<GoldenPrompt> prompts;
};

/// Reads a .golden file. InvalidArgument for a file that is not what make_goldens.py wrote.
absl::StatusOr<Goldens> LoadGoldens(const std::string& path);

/// The reference over tools/reference/valid_ids.txt: each sequence on its own, every position.
struct ValidStats {
  double nll = 0;               // nats a predicted token
  size_t predicted_tokens = 0;  // all but the first of each sequence
  size_t positions = 0;
  std::vector<double> ffn_active_fraction;  // [layers], of F
  std::vector<double> attended_positions;   // [layers], mean of a head and position
  std::vector<double> attended_fraction;    // [layers], of the visible positions: sum / sum
};

/// Reads one model's entry ("spark-stories") of valid_stats.json. NotFound where it has none.
absl::StatusOr<ValidStats> LoadValidStats(const std::string& path, const std::string& model);

}  // namespace firesteel

#endif  // FIRESTEEL_TESTDATA_GOLDENS_H_
