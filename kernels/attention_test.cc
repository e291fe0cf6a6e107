#include "kernels/attention.h"

#include "kernels/reference.h"
#include "kernels/statistical_topk.h"
#include "kernels/test_util.h"

namespace firesteel::kernels {
namespace {

// One KV head's positions [0, n) as plain rows, and the same in blocks from absolute position
// `begin` on. Slots that were never stored hold NaN.
class Cache {
 public:
  Cache(const AttentionShape& shape, Random& random, size_t n, size_t begin = 0, size_t offset = 0)
      : shape_(shape), begin_(begin), offset_(offset), n_(n) {
    keys = random.Floats(n * shape.head_dim);
    values = random.Floats(n * shape.head_dim);
    Store();
  }

  void Store() {
    const size_t blocks = (begin_ + n_ + kKvBlockTokens - 1) / kKvBlockTokens;
    const size_t floats = offset_ + shape_.BlockFloats();
    memory_.clear();
    pointers_.clear();
    for (size_t b = 0; b < blocks; ++b) {
      memory_.push_back(std::make_unique<Guarded<float>>(floats));
      pointers_.push_back(memory_.back()->data());
    }
    for (size_t p = 0; p < n_; ++p) {
      const size_t at = begin_ + p;
      StoreKeyValue(shape_, &keys[p * shape_.head_dim], &values[p * shape_.head_dim],
                    at % kKvBlockTokens, memory_[at / kKvBlockTokens]->data() + offset_);
    }
  }

  struct Result {
    std::vector<float> out;
    std::vector<uint32_t> kept;
  };
  // Attends from `query` to the last `count` positions.
  Result Run(const std::vector<float>& query, double quantile, size_t count) const {
    Guarded<float> scratch(AttentionScratchFloats(count)), out(shape_.head_dim, 1);
    Guarded<uint32_t> kept(count + kCompactionSlack, 1);
    const size_t end = begin_ + n_;
    const size_t n = Attend(shape_, query.data(), pointers_.data(), offset_, end - count, end,
                            quantile, scratch.data(), out.data(), kept.data());
    EXPECT_TRUE(scratch.GuardsIntact() && out.GuardsIntact() && kept.GuardsIntact());

    Guarded<float> again(shape_.head_dim);
    EXPECT_EQ(n, Attend(shape_, query.data(), pointers_.data(), offset_, end - count, end, quantile,
                        scratch.data(), again.data(), nullptr));
    EXPECT_TRUE(SameBits(again.span(), out.span())) << "with and without `kept`";
    return {{out.data(), out.data() + out.size()}, {kept.data(), kept.data() + n}};
  }
  Result Run(const std::vector<float>& query, double quantile) const {
    return Run(query, quantile, n_);
  }

  std::vector<float> keys, values;

 private:
  const AttentionShape shape_;
  const size_t begin_, offset_, n_;
  std::vector<std::unique_ptr<Guarded<float>>> memory_;
  std::vector<const float*> pointers_;
};

class AttentionTest : public SimdTest {
 protected:
  Random random_{5};
};
FIRESTEEL_FOR_EACH_SIMD_TARGET(AttentionTest);

AttentionShape Spark(size_t head_dim, size_t predictor_dim, size_t top_k) {
  return {.head_dim = head_dim,
          .predictor_dim = predictor_dim,
          .top_k = top_k,
          .scale = 1.0f / std::sqrt(static_cast<float>(head_dim)),
          .softcap = 50.0f};
}

double Quantile(const AttentionShape& shape, size_t n) {
  return n > shape.top_k
             ? NormalQuantile(1.0 - static_cast<double>(shape.top_k) / static_cast<double>(n))
             : 0.0;
}

// Error of the predictor scores, in the scores' unit.
double ScoreTolerance(const AttentionShape& shape, const std::vector<float>& query,
                      const Cache& cache) {
  return static_cast<double>(shape.scale) *
             SumTolerance(MaxAbs(query), MaxAbs(cache.keys), shape.head_dim) +
         8 * kEps * 10.0;
}

// An error of e in a score is a relative error of e in its weight (twice in the normalised one),
// one in the gate at most as much again; the sum adds its own roundings. Weights add up to at most
// max softplus.
double OutTolerance(const AttentionShape& shape, const std::vector<float>& query,
                    const Cache& cache, size_t kept) {
  double gate = 1.0;
  if (shape.spark())
    gate += static_cast<double>(shape.scale) * MaxAbs(query) * MaxAbs(cache.keys) * 8.0;
  return gate * MaxAbs(cache.values) *
         (3 * ScoreTolerance(shape, query, cache) +
          8 * kEps * std::sqrt(static_cast<double>(kept)));
}

// Smallest distance of a score from the threshold: if it is within the error, sets may differ.
double Margin(const reference::Attention& expected) {
  double margin = kInf;
  for (const double s : expected.scores) margin = std::min(margin, std::abs(s - expected.theta));
  return margin;
}

std::vector<uint32_t> Shifted(std::vector<uint32_t> positions, size_t by) {
  for (uint32_t& p : positions) p += static_cast<uint32_t>(by);
  return positions;
}

TEST_P(AttentionTest, MatchesReference) {
  const AttentionShape shapes[] = {Spark(64, 32, 64), Spark(256, 128, 16), Spark(8, 4, 5),
                                   Spark(20, 14, 1), Spark(6, 2, 1000)};
  for (const AttentionShape& shape : shapes) {
    size_t compared = 0, ties = 0;
    for (const size_t n : {1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 66, 130, 300, 1000}) {
      for (const size_t begin : {0, 13, 31, 64}) {
        Cache cache(shape, random_, n, begin, begin % 3 * 16);
        const auto query = random_.Floats(shape.head_dim, 2.0f);
        const double quantile = Quantile(shape, n);
        const auto expected = reference::Attend(shape, query, cache.keys, cache.values, quantile);
        const auto actual = cache.Run(query, quantile);
        if (n > shape.top_k && Margin(expected) <= ScoreTolerance(shape, query, cache)) {
          ++ties;
          continue;
        }
        ++compared;
        ASSERT_EQ(actual.kept, Shifted(expected.kept, begin)) << n << " from " << begin;
        const double tolerance = OutTolerance(shape, query, cache, actual.kept.size());
        ASSERT_LE(WorstError(actual.out, expected.out, [&](size_t) { return tolerance; }), 1.0)
            << n << " from " << begin;
      }
    }
    EXPECT_LT(ties, compared / 4);
  }
}

TEST_P(AttentionTest, DenseMatchesReference) {
  for (const size_t dim : {2, 16, 64, 256}) {
    for (const float softcap : {0.0f, 50.0f}) {
      AttentionShape shape = Spark(dim, dim, 0);
      shape.softcap = softcap;
      for (const size_t n : {1, 31, 33, 64, 257}) {
        Cache cache(shape, random_, n, 7);
        const auto query = random_.Floats(dim, 2.0f);
        const auto expected = reference::Attend(shape, query, cache.keys, cache.values, 0.0);
        const auto actual = cache.Run(query, 0.0);
        EXPECT_EQ(actual.kept.size(), n);
        const double tolerance = OutTolerance(shape, query, cache, n);
        EXPECT_LE(WorstError(actual.out, expected.out, [&](size_t) { return tolerance; }), 1.0)
            << n;
      }
    }
  }
}

TEST_P(AttentionTest, ToleranceSeesWrongTwins) {
  const AttentionShape shape = Spark(64, 32, 16);
  const size_t n = 40;
  Cache cache(shape, random_, n);
  const auto query = random_.Floats(64, 2.0f);
  const double quantile = Quantile(shape, n);
  const auto actual = cache.Run(query, quantile);
  const double tolerance = OutTolerance(shape, query, cache, actual.kept.size());
  const auto error = [&](const std::vector<double>& twin) {
    return WorstError(actual.out, twin, [&](size_t) { return tolerance; });
  };
  const auto right = reference::Attend(shape, query, cache.keys, cache.values, quantile);
  EXPECT_LE(error(right.out), 1.0);

  AttentionShape uncapped = shape;
  uncapped.softcap = 0.0f;
  EXPECT_GT(error(reference::Attend(uncapped, query, cache.keys, cache.values, quantile).out), 1.0);
  AttentionShape everything = shape;
  everything.top_k = 0;
  EXPECT_GT(error(reference::Attend(everything, query, cache.keys, cache.values, quantile).out),
            1.0);
  // Without the last value, and with weights that are normalised again after the softplus.
  auto shorter = cache.values;
  const size_t last = actual.kept.back();
  for (size_t i = 0; i < 64; ++i) shorter[last * 64 + i] = 0.0f;
  EXPECT_GT(error(reference::Attend(shape, query, cache.keys, shorter, quantile).out), 1.0);
  const std::vector<float> ones(n * 64, 1.0f);
  const double total = reference::Attend(shape, query, cache.keys, ones, quantile).out[0];
  auto renormalised = right.out;
  for (double& v : renormalised) v /= total;
  EXPECT_GT(error(renormalised), 1.0);
}

// n > top_k keeps what exceeds θ with the divisor n − 1: a score between the two candidates for θ
// tells.
TEST_P(AttentionTest, ThresholdHasTheDivisorNMinusOne) {
  AttentionShape shape = Spark(4, 2, 1);
  shape.scale = 1.0f;
  shape.softcap = 0.0f;
  const std::vector<float> query = {1.0f, 0.0f, 0.0f, 0.0f};
  // Scores 0, 0, 0, 1: mean 0.25, std 0.5 (n − 1) or 0.433 (n); the last one is 1.5 stds or 1.73
  // above.
  Cache cache(shape, random_, 4);
  for (size_t p = 0; p < 4; ++p) cache.keys[p * 4] = p == 3 ? 1.0f : 0.0f;
  cache.Store();
  EXPECT_EQ(cache.Run(query, 1.45).kept, std::vector<uint32_t>({3}));
  // Above both: no survivor, so the first largest, which is the same position …
  EXPECT_EQ(cache.Run(query, 1.6).kept, std::vector<uint32_t>({3}));
  // … unlike with scores 1, 1, 0, 0 (mean 0.5, std 0.577 or 0.5), where a quantile of 0.93 parts
  // them.
  for (size_t p = 0; p < 4; ++p) cache.keys[p * 4] = p < 2 ? 1.0f : 0.0f;
  cache.Store();
  EXPECT_EQ(cache.Run(query, 0.85).kept, std::vector<uint32_t>({0, 1}));
  EXPECT_EQ(cache.Run(query, 0.93).kept, std::vector<uint32_t>({0}));
}

TEST_P(AttentionTest, TopKAboveNIsDenseSoftmaxTimesSoftplus) {
  const AttentionShape all = Spark(64, 32, 200);
  const size_t n = 200;
  Cache cache(all, random_, n, 5);
  const auto query = random_.Floats(64, 2.0f);
  const auto actual = cache.Run(query, static_cast<double>(kNaN));  // the quantile is ignored
  EXPECT_EQ(actual.kept.size(), n);
  AttentionShape none = all;
  none.top_k = 0;
  const auto expected = reference::Attend(none, query, cache.keys, cache.values, 0.0);
  const double tolerance = OutTolerance(all, query, cache, n);
  EXPECT_LE(WorstError(actual.out, expected.out, [&](size_t) { return tolerance; }), 1.0);
}

// A window of positions gives the same bits wherever it lies in the blocks, whatever lies around
// it.
TEST_P(AttentionTest, PlaceInBlocksDoesNotChangeBits) {
  for (const AttentionShape& shape : {Spark(64, 32, 24), Spark(64, 64, 0)}) {
    for (const size_t n : {1, 20, 64, 150}) {
      Random keys(9);
      Cache first(shape, keys, n, 0);
      const auto query = random_.Floats(64, 2.0f);
      const double quantile = shape.top_k ? Quantile(shape, n) : 0.0;
      const auto expected = first.Run(query, quantile);
      for (size_t begin = 1; begin <= 40; begin += 3) {
        Random same(9);
        Cache moved(shape, same, n, begin, 64);
        const auto actual = moved.Run(query, quantile);
        ASSERT_TRUE(SameBits(actual.out, expected.out)) << n << " from " << begin;
        ASSERT_EQ(actual.kept, Shifted(expected.kept, begin));
      }
    }
  }
}

TEST_P(AttentionTest, AWindowSeesOnlyItsPositions) {
  const AttentionShape shape = Spark(64, 32, 24);
  Cache cache(shape, random_, 150);
  const auto query = random_.Floats(64, 2.0f);
  const double quantile = Quantile(shape, 70);
  const auto window = cache.Run(query, quantile, 70);
  for (size_t i = 0; i < 80 * 64; ++i) cache.keys[i] = cache.values[i] = kNaN;
  cache.Store();
  const auto without = cache.Run(query, quantile, 70);
  EXPECT_TRUE(SameBits(window.out, without.out));
  EXPECT_EQ(window.kept, without.kept);
  EXPECT_GE(window.kept.front(), 80u);
}

TEST_P(AttentionTest, TiesKeepTheFirst) {
  const AttentionShape shape = Spark(16, 8, 4);
  Cache cache(shape, random_, 50, 40);
  std::vector<float> query(16, 0.0f);  // all scores 0: θ = 0, nothing above it
  const auto tied = cache.Run(query, Quantile(shape, 50));
  EXPECT_EQ(tied.kept, std::vector<uint32_t>({40}));
  for (size_t i = 0; i < 16; ++i) {
    EXPECT_NEAR(tied.out[i], std::log(2.0) * static_cast<double>(cache.values[i]), 4e-6);
  }
  // A quantile above every score keeps the largest.
  query = random_.Floats(16);
  const auto expected = reference::Attend(shape, query, cache.keys, cache.values, 100.0);
  EXPECT_EQ(cache.Run(query, 100.0).kept, Shifted(expected.kept, 40));
}

TEST_P(AttentionTest, ValuesThatAreNotFiniteKeepOnePosition) {
  const AttentionShape shape = Spark(16, 8, 4);
  for (const float bad : {kNaN, kInf, -kInf}) {
    Cache cache(shape, random_, 50, 3);
    auto query = random_.Floats(16);
    const auto clean = reference::Attend(shape, query, cache.keys, cache.values, 100.0);
    cache.keys[0] = kNaN;  // the score of position 0 alone
    cache.Store();
    const auto one = cache.Run(query, Quantile(shape, 50));
    EXPECT_EQ(one.kept.size(), 1u);
    if (clean.kept[0] != 0) {
      EXPECT_EQ(one.kept, Shifted(clean.kept, 3));
    }
    EXPECT_TRUE(std::isfinite(one.out[0]));

    query[0] = bad;
    EXPECT_EQ(cache.Run(query, Quantile(shape, 50)).kept.size(), 1u);
    EXPECT_EQ(cache.Run(query, 0.0, 4).kept.size(), 4u);  // n ≤ top_k keeps all
  }
  Cache cache(shape, random_, 50);
  const auto query = random_.Floats(16);
  EXPECT_EQ(cache.Run(query, static_cast<double>(kNaN)).kept.size(), 1u);
  EXPECT_EQ(cache.Run(query, static_cast<double>(kInf)).kept.size(), 1u);
  EXPECT_EQ(cache.Run(query, -static_cast<double>(kInf)).kept.size(), 50u);
}

TEST(StoreKeyValueTest, FollowsTheLayout) {
  const AttentionShape shape = Spark(6, 4, 1);
  std::vector<float> block(shape.BlockFloats(), -1.0f);
  const float key[] = {1, 2, 3, 4, 5, 6}, value[] = {11, 12, 13, 14, 15, 16};
  StoreKeyValue(shape, key, value, 31, block.data());
  for (size_t j = 0; j < 4; ++j) EXPECT_EQ(block[j * 32 + 31], key[j]);
  for (size_t j = 0; j < 2; ++j) EXPECT_EQ(block[4 * 32 + 31 * 2 + j], key[4 + j]);
  for (size_t j = 0; j < 6; ++j) EXPECT_EQ(block[6 * 32 + 31 * 6 + j], value[j]);
  EXPECT_EQ(std::count(block.begin(), block.end(), -1.0f), 2 * 6 * 32 - 12);
}

}  // namespace
}  // namespace firesteel::kernels
