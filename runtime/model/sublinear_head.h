// An output head that reads a 2-bit copy of the embedding, and of the embedding itself only the few
// rows that may be among the largest logits (docs/sublinear-head.md).
//
// For an input h and row n, with both rotated at random, z̃_n = s_n · (q_n · ĥ) estimates the logit
// z_n = w_n · h; ĥ is h at 8 bits. Its error has two parts, e_n · h and s_n · q_n · (h − ĥ), whose
// directions are as if random against h and against the rounding of h. So it is no wider than a
// Gaussian of standard deviation
//
//     σ_n = sqrt(‖e_n‖² · ‖h‖² + ‖s_n q_n‖² · ‖h − ĥ‖²) / sqrt(d − 1).
//
// T is the k-th largest of the exact logits of some rows (those of the largest estimates), hence
// never above the k-th largest of all. A row of the true top k can only be lost if
// z̃_n + c · σ_n < T ≤ z_n, that is if its own error exceeds c · σ_n: with probability at most
// Q(c) = P(N(0, 1) > c), and at most k · Q(c) that any of them is lost. The size of the vocabulary
// does not enter. The default c = 6 has Q = 9.9e-10: greedy, one token in 10⁹; top-k of 64, one in
// 1.6 · 10⁷. The probability is over the rotation, which is the same for all tokens: it says how
// many errors to expect, not that they are independent.

#ifndef FIRESTEEL_RUNTIME_MODEL_SUBLINEAR_HEAD_H_
#define FIRESTEEL_RUNTIME_MODEL_SUBLINEAR_HEAD_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "kernels/screen.h"
#include "runtime/checkpoint/weights.h"
#include "runtime/model/quantized_input.h"
#include "runtime/threading/worker_pool.h"

namespace firesteel {

/// The defaults are what is served; tests ask for less.
struct SublinearHeadOptions {
  float confidence = 6.0f;    // c
  uint32_t extra_seeds = 16;  // rows computed first, beyond k: they raise T
};

/// Owns the 2-bit copy and the buffers. One Run at a time, by all members of a team.
class SublinearHead {
 public:
  /// More than so many largest logits are not worth a screening.
  static constexpr uint32_t kMaxTopK = 256;

  /// out[j] = the logit of ids[j] (soft cap included) for the input `row`, j in [begin, end), with
  /// the bits of the full head. ids rise. Thread-safe.
  using ExactLogits =
      std::function<void(size_t row, const uint32_t* ids, size_t begin, size_t end, float* out)>;

  /// Makes the copy of `embedding` [vocab, d] on `pool`: about d / 4 bytes a row. `soft_cap` is the
  /// final one, 0 for none. Steps have at most `max_rows` inputs.
  SublinearHead(const Matrix& embedding, double soft_cap, WorkerPool* pool, size_t max_rows,
                const SublinearHeadOptions& options = {});

  /// Whether a row that wants the `top_k` largest logits is for this head.
  bool Takes(uint32_t top_k) const {
    return top_k >= 1 && top_k <= kMaxTopK && top_k + options_.extra_seeds < vocab_;
  }

  /// The input [d] of a row, as the full head would take it (rounded). Thread-safe for distinct
  /// rows.
  void SetInput(size_t row, const float* h);

  /// By every member of the team, inputs set before and a barrier behind them: finds the candidates
  /// of the rows 0, 1, … top_k.size() − 1, each at least its top_k[row] largest logits and all that
  /// equal the last of them. logits [rows, vocab] is scratch; row `row` starts with the logits of
  /// ids(row) when all are done, which takes one more barrier. The candidates depend on the row's
  /// input and top_k only, not on the other rows or the team.
  void Run(Worker& worker, std::span<const uint32_t> top_k, const kernels::MatView& logits,
           const ExactLogits& exact);

  /// Of the last Run: rising.
  std::span<const uint32_t> ids(size_t row) const {
    return {&ids_[row * vocab_], states_[row].num_candidates};
  }
  /// Rows of the embedding that were read for the input.
  size_t num_exact(size_t row) const {
    return states_[row].seeds.size() + states_[row].num_candidates;
  }

  /// Of the 2-bit copy, which a Run reads once.
  size_t bytes() const;

 private:
  struct Seed {
    float estimate;
    uint32_t id;
  };
  // One input.
  struct State {
    double norm = 0;              // ‖h‖
    float width = 0;              // c · σ_n = width · radii_[n]
    float threshold = 0;          // T, before the soft cap
    bool all = false;             // nothing can be left out
    std::vector<uint32_t> seeds;  // rising
    size_t num_candidates = 0;
  };

  void AddRow(const Matrix& embedding, size_t row, float* scratch);
  void FindSeeds(Worker& worker, size_t row, uint32_t top_k, IndexRange share,
                 const float* estimates);
  void SetThreshold(size_t row, uint32_t top_k, size_t team, const ExactLogits& exact);
  float BeforeSoftCap(float logit) const;
  void ListCandidates(Worker& worker, size_t row, IndexRange share, const float* estimates);
  std::vector<Seed>& SeedsOf(size_t row, size_t worker) { return seeds_[row * team_ + worker]; }
  uint32_t* SegmentOf(size_t row, size_t worker, size_t begin);

  const SublinearHeadOptions options_;
  const size_t vocab_;
  const size_t cols_;
  const double soft_cap_;
  const size_t team_;
  const std::vector<float> signs_;  // [3 · d], of the rotation

  std::vector<float> scales_;  // [vocab]
  // [vocab]: sqrt(‖e‖² + kRounding² · ‖s · q‖²). With width ≥ c · ‖h‖ · max(1, ‖h − ĥ‖ / (kRounding
  // · ‖h‖)) / sqrt(d − 1), one number a row bounds both parts of the error.
  std::vector<float> radii_;
  Matrix codes_;  // [vocab, bytes of a 2-bit row]

  QuantizedInput input_;  // [max_rows, padded d]
  Matrix rotated_;        // [max_rows, padded d]
  std::vector<State> states_;
  std::vector<std::vector<Seed>> seeds_;  // [max_rows, team]
  std::vector<size_t> counts_;            // [max_rows, team]
  std::vector<size_t> share_begins_;      // [team]
  // [max_rows, vocab + team · slack], [max_rows, vocab]: touched only as far as there are
  // candidates.
  std::unique_ptr<uint32_t[]> segments_;
  std::unique_ptr<uint32_t[]> ids_;
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_MODEL_SUBLINEAR_HEAD_H_
