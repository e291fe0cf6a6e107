#include "kernels/attention.h"

#include "kernels/amx.h"
#include "kernels/reference.h"
#include "kernels/statistical_topk.h"
#include "kernels/test_util.h"

namespace firesteel::kernels {
namespace {

// One KV head's positions [0, n) as plain rows, and the same in blocks from absolute position
// `begin` on, at `offset` elements. Slots that were never stored hold NaN.
class Cache {
 public:
  Cache(const AttentionShape& shape, Random& random, size_t n, size_t begin = 0, size_t offset = 0)
      : shape_(shape), begin_(begin), offset_(offset * BytesOf(shape.kv_dtype, 1)), n_(n) {
    keys = random.Floats(n * shape.head_dim);
    values = random.Floats(n * shape.head_dim);
    Store();
  }

  // Afterwards keys and values are what the cache holds: rounded, if it is of bf16.
  void Store() {
    const size_t blocks = (begin_ + n_ + kKvBlockTokens - 1) / kKvBlockTokens;
    const size_t bytes = offset_ + shape_.BlockBytes();
    memory_.clear();
    pointers_.clear();
    for (size_t b = 0; b < blocks; ++b) {
      memory_.push_back(std::make_unique<Guarded<std::byte>>(bytes));
      pointers_.push_back(memory_.back()->data());
    }
    for (size_t p = 0; p < n_; ++p) {
      const size_t at = begin_ + p;
      StoreKeyValue(shape_, &keys[p * shape_.head_dim], &values[p * shape_.head_dim],
                    at % kKvBlockTokens, memory_[at / kKvBlockTokens]->data() + offset_);
    }
    for (const auto& block : memory_) EXPECT_TRUE(block->GuardsIntact());
    if (shape_.kv_dtype == DType::kF32) return;
    for (auto* rows : {&keys, &values}) {
      for (float& v : *rows) v = ToF32(ToBF16(v));
    }
  }

  // Forgets the positions from `n` on: their slots hold NaN again.
  void Truncate(size_t n) {
    keys.resize(n * shape_.head_dim);
    values.resize(n * shape_.head_dim);
    n_ = n;
    Store();
  }

  struct Result {
    std::vector<float> out;
    std::vector<uint32_t> kept;
  };
  // Attends from each of the queries to the last `count` positions, all of them in one call.
  std::vector<Result> RunHeads(const std::vector<float>& queries, double quantile,
                               size_t count) const {
    const size_t dim = shape_.head_dim;
    const size_t heads = queries.size() / dim;
    const size_t stride = count + kCompactionSlack;
    Guarded<float> scratch(AttentionScratchFloats(heads, count)), out(heads * dim, 1);
    Guarded<uint32_t> kept(heads * stride, 1);
    Guarded<size_t> num_kept(heads);
    const size_t end = begin_ + n_;
    Attend(shape_, queries.data(), heads, pointers_.data(), offset_, end - count, end, quantile,
           scratch.data(), out.data(), num_kept.data(), kept.data(), stride);
    EXPECT_TRUE(scratch.GuardsIntact() && out.GuardsIntact() && kept.GuardsIntact() &&
                num_kept.GuardsIntact());

    Guarded<float> again(heads * dim);
    Guarded<size_t> num_again(heads);
    Attend(shape_, queries.data(), heads, pointers_.data(), offset_, end - count, end, quantile,
           scratch.data(), again.data(), num_again.data(), nullptr, 0);
    EXPECT_TRUE(SameBits(again.span(), out.span())) << "with and without `kept`";
    std::vector<Result> results;
    for (size_t h = 0; h < heads; ++h) {
      EXPECT_EQ(num_kept[h], num_again[h]);
      const uint32_t* const list = kept.data() + h * stride;
      results.push_back(
          {{out.data() + h * dim, out.data() + (h + 1) * dim}, {list, list + num_kept[h]}});
    }
    return results;
  }
  // The last `count` positions as rows of a prompt, with queries [count, heads, head_dim]: results
  // in their order. A row sees at most `window` positions (0: all).
  std::vector<Result> RunPrompt(const std::vector<float>& queries, size_t heads, size_t count,
                                size_t window) const {
    const size_t dim = shape_.head_dim, width = heads * dim, end = begin_ + n_;
    const size_t stride = end + kCompactionSlack, out_stride = width + 5;
    std::vector<double> quantiles(end + 1);
    for (size_t n = shape_.top_k + 1; shape_.top_k > 0 && n <= end; ++n) {
      quantiles[n] =
          NormalQuantile(1.0 - static_cast<double>(shape_.top_k) / static_cast<double>(n));
    }
    Guarded<std::byte> scratch(PromptScratchBytes(shape_, end));
    Guarded<float> out(count * out_stride);
    Guarded<uint32_t> kept(count * heads * stride);
    Guarded<size_t> num_kept(count * heads);
    const PromptRows rows{end - count, count,      window,     queries.data(),
                          width,       out.data(), out_stride, num_kept.data()};
    AttendPrompt(shape_, heads, rows, pointers_.data(), offset_, quantiles.data(), scratch.data(),
                 kept.data(), stride);
    EXPECT_TRUE(scratch.GuardsIntact() && out.GuardsIntact() && kept.GuardsIntact() &&
                num_kept.GuardsIntact());
    std::vector<Result> results;
    for (size_t i = 0; i < count * heads; ++i) {
      const float* const sums = out.data() + i / heads * out_stride + i % heads * dim;
      const uint32_t* const list = kept.data() + i * stride;
      results.push_back({{sums, sums + dim}, {list, list + num_kept[i]}});
    }
    return results;
  }

  Result Run(const std::vector<float>& query, double quantile, size_t count) const {
    return RunHeads(query, quantile, count).front();
  }
  Result Run(const std::vector<float>& query, double quantile) const {
    return Run(query, quantile, n_);
  }

  std::vector<float> keys, values;

 private:
  const AttentionShape shape_;
  const size_t begin_, offset_;
  size_t n_;
  std::vector<std::unique_ptr<Guarded<std::byte>>> memory_;
  std::vector<const std::byte*> pointers_;
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

// The same over a cache of either type.
std::vector<AttentionShape> InBothTypes(const std::vector<AttentionShape>& shapes) {
  std::vector<AttentionShape> both;
  for (AttentionShape shape : shapes) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      shape.kv_dtype = dtype;
      both.push_back(shape);
    }
  }
  return both;
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
  for (const AttentionShape& shape :
       InBothTypes({Spark(64, 32, 64), Spark(256, 128, 16), Spark(8, 4, 5), Spark(20, 14, 1),
                    Spark(6, 2, 1000), Spark(36, 8, 40)})) {
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
  for (const size_t dim : {2, 16, 64, 90, 256}) {
    for (const float softcap : {0.0f, 50.0f}) {
      for (AttentionShape shape : InBothTypes({Spark(dim, dim, 0)})) {
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
}

// Heads that share a KV head share its reading, not their arithmetic.
TEST_P(AttentionTest, HeadsTogetherGiveTheBitsOfEachAlone) {
  for (const AttentionShape& shape :
       InBothTypes({Spark(64, 32, 24), Spark(90, 18, 24), Spark(64, 64, 0), Spark(36, 36, 0)})) {
    const size_t dim = shape.head_dim;
    for (const size_t n : {1, 20, 33, 129, 300}) {
      Cache cache(shape, random_, n, 11, 32);
      const double quantile = shape.top_k ? Quantile(shape, n) : 0.0;
      for (const size_t heads : {1, 2, 3, 4, 5}) {
        const auto queries = random_.Floats(heads * dim, 2.0f);
        const auto together = cache.RunHeads(queries, quantile, n);
        ASSERT_EQ(together.size(), heads);
        for (size_t h = 0; h < heads; ++h) {
          const auto alone = cache.Run({queries.begin() + static_cast<ptrdiff_t>(h * dim),
                                        queries.begin() + static_cast<ptrdiff_t>((h + 1) * dim)},
                                       quantile);
          ASSERT_TRUE(SameBits(together[h].out, alone.out)) << n << ", head " << h;
          ASSERT_EQ(together[h].kept, alone.kept) << n << ", head " << h;
        }
      }
    }
  }
}

// Whatever is stored is read back as exactly that, rounded to nearest even in bf16: with one
// position visible the output of dense attention is its value.
TEST_P(AttentionTest, ValuesComeBackExactly) {
  for (const AttentionShape& shape : InBothTypes({Spark(90, 90, 0)})) {
    Cache cache(shape, random_, 1, 37);
    cache.values[0] = 1.0f + 0x1p-8f;             // a tie: to 1
    cache.values[1] = 1.0f + 0x3p-8f;             // a tie: to 1 + 2^-6
    cache.values[2] = 1.0f + 0x1p-8f + 0x1p-20f;  // above the tie: to 1 + 2^-7
    cache.values[3] = -3.0e38f;
    cache.values[4] = 0x1p-120f;
    const auto raw = cache.values;
    cache.Store();
    const auto actual = cache.Run(random_.Floats(90), 0.0);
    EXPECT_TRUE(SameBits(actual.out, cache.values));
    if (shape.kv_dtype == DType::kF32) {
      EXPECT_TRUE(SameBits(actual.out, raw));
    } else {
      EXPECT_EQ(actual.out[0], 1.0f);
      EXPECT_EQ(actual.out[1], 1.0f + 0x1p-6f);
      EXPECT_EQ(actual.out[2], 1.0f + 0x1p-7f);
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
  for (const AttentionShape& shape : InBothTypes({Spark(64, 32, 24), Spark(64, 64, 0)})) {
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
  for (const AttentionShape& shape : InBothTypes({Spark(64, 32, 24)})) {
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
  for (const AttentionShape& shape : InBothTypes({Spark(16, 8, 4)})) {
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
}

class PromptAttentionTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!AmxAvailable()) GTEST_SKIP() << "no AMX here";
  }
  static AttentionShape BF16Spark(size_t head_dim, size_t predictor_dim, size_t top_k) {
    AttentionShape shape = Spark(head_dim, predictor_dim, top_k);
    shape.kv_dtype = DType::kBF16;
    return shape;
  }
  Random random_{7};
};

// Factors are split into two bf16, which adds to the errors of f32 sums.
TEST_F(PromptAttentionTest, MatchesReference) {
  struct Case {
    AttentionShape shape;
    size_t heads, positions, rows, window;
  };
  size_t compared = 0, ties = 0;
  for (const Case& c :
       {Case{BF16Spark(64, 32, 24), 2, 130, 64, 0}, Case{BF16Spark(64, 32, 24), 1, 40, 40, 0},
        Case{BF16Spark(256, 128, 16), 2, 100, 33, 37}, Case{BF16Spark(96, 32, 1000), 4, 150, 19, 0},
        Case{BF16Spark(32, 32, 0), 2, 100, 50, 41}, Case{BF16Spark(64, 32, 100), 2, 2060, 20, 0},
        Case{BF16Spark(64, 32, 100), 2, 4500, 10, 2200},
        Case{BF16Spark(64, 64, 0), 2, 2060, 20, 0}}) {
    ASSERT_TRUE(AttendsPrompts(c.shape, c.heads));
    Cache cache(c.shape, random_, c.positions, 0, 32);
    const size_t dim = c.shape.head_dim;
    const auto queries = random_.Floats(c.rows * c.heads * dim, 2.0f);
    const auto results = cache.RunPrompt(queries, c.heads, c.rows, c.window);
    for (size_t i = 0; i < results.size(); ++i) {
      const size_t end = c.positions - c.rows + i / c.heads + 1;
      const size_t begin = c.window != 0 && end > c.window ? end - c.window : 0;
      const auto from = static_cast<std::ptrdiff_t>(begin * dim);
      const auto to = static_cast<std::ptrdiff_t>(end * dim);
      const std::vector<float> query(&queries[i * dim], &queries[i * dim] + dim);
      const auto expected = reference::Attend(
          c.shape, query, {cache.keys.begin() + from, cache.keys.begin() + to},
          {cache.values.begin() + from, cache.values.begin() + to}, Quantile(c.shape, end - begin));
      const double split = 2.0 * std::ldexp(1.0, -17) / kEps;
      const double error = ScoreTolerance(c.shape, query, cache) * split;
      if (c.shape.top_k > 0 && end - begin > c.shape.top_k && Margin(expected) <= error) {
        ++ties;
        continue;
      }
      ++compared;
      ASSERT_EQ(results[i].kept, Shifted(expected.kept, begin)) << "row " << i / c.heads;
      const double tolerance = OutTolerance(c.shape, query, cache, results[i].kept.size()) * split;
      ASSERT_LE(WorstError(results[i].out, expected.out, [&](size_t) { return tolerance; }), 1.0)
          << "row " << i / c.heads << " of " << c.positions;
    }
  }
  EXPECT_LT(ties, compared / 4);
}

TEST_F(PromptAttentionTest, RowsTogetherGiveTheBitsOfEachAlone) {
  struct Case {
    AttentionShape shape;
    size_t heads, positions, window;
  };
  for (const Case& c :
       {Case{BF16Spark(64, 32, 24), 2, 130, 0}, Case{BF16Spark(64, 32, 24), 4, 130, 50},
        Case{BF16Spark(64, 64, 0), 1, 70, 0}, Case{BF16Spark(64, 32, 100), 2, 2070, 0}}) {
    const size_t rows = 61, width = c.heads * c.shape.head_dim;
    const auto queries = random_.Floats(rows * width, 2.0f);
    Random whole_keys(3);
    // The same positions, fewer and fewer of them: those behind a row were not stored yet.
    const auto together =
        Cache(c.shape, whole_keys, c.positions).RunPrompt(queries, c.heads, rows, c.window);
    for (const size_t part : {1, 7}) {
      for (size_t first = 0; first < rows; first += part) {
        const size_t count = std::min(part, rows - first);
        Random keys(3);
        Cache cache(c.shape, keys, c.positions);
        const size_t end = c.positions - rows + first + count;
        cache.Truncate(end);
        const auto from = static_cast<std::ptrdiff_t>(first * width);
        const auto to = static_cast<std::ptrdiff_t>((first + count) * width);
        const auto alone = cache.RunPrompt({queries.begin() + from, queries.begin() + to}, c.heads,
                                           count, c.window);
        for (size_t i = 0; i < alone.size(); ++i) {
          const auto& expected = together[first * c.heads + i];
          ASSERT_EQ(alone[i].kept, expected.kept);
          ASSERT_TRUE(SameBits(alone[i].out, expected.out)) << first << " + " << i;
        }
      }
    }
    // The comparison can fail.
    auto other = queries;
    other[0] += 1.0f;
    Random keys(3);
    EXPECT_FALSE(
        SameBits(Cache(c.shape, keys, c.positions).RunPrompt(other, c.heads, rows, c.window)[0].out,
                 together[0].out));
  }
}

TEST_F(PromptAttentionTest, OtherCachesAreLeftToAttend) {
  EXPECT_FALSE(AttendsPrompts(Spark(64, 32, 24), 2));      // f32
  EXPECT_FALSE(AttendsPrompts(BF16Spark(72, 32, 24), 2));  // not whole tiles
  EXPECT_FALSE(AttendsPrompts(BF16Spark(64, 20, 24), 2));
  EXPECT_FALSE(AttendsPrompts(BF16Spark(64, 32, 24), 3));
}

// Every element of a block is a known one of the position that was stored, and no other is touched.
template <typename T>
void ExpectLayout(const AttentionShape& shape, size_t slot, size_t column,
                  float (*read)(const T&)) {
  const float key[] = {1, 2, 3, 4, 5, 6}, value[] = {11, 12, 13, 14, 15, 16};
  std::vector<T> block(2 * 6 * kKvBlockTokens);
  ASSERT_EQ(shape.BlockBytes(), block.size() * sizeof(T));
  StoreKeyValue(shape, key, value, slot, reinterpret_cast<std::byte*>(block.data()));
  for (size_t j = 0; j < 4; ++j) EXPECT_EQ(read(block[j * 32 + column]), key[j]);
  for (size_t j = 0; j < 2; ++j) EXPECT_EQ(read(block[4 * 32 + slot * 2 + j]), key[4 + j]);
  for (size_t j = 0; j < 6; ++j) EXPECT_EQ(read(block[6 * 32 + slot * 6 + j]), value[j]);
  EXPECT_EQ(std::count_if(block.begin(), block.end(), [&](const T& v) { return read(v) == 0; }),
            2 * 6 * 32 - 12);
}

TEST(StoreKeyValueTest, FollowsTheLayout) {
  AttentionShape shape = Spark(6, 4, 1);
  for (const size_t slot : {0, 5, 16, 31}) {
    ExpectLayout<float>(shape, slot, slot, [](const float& v) { return v; });
  }
  shape.kv_dtype = DType::kBF16;  // the slots s and s + 16 are neighbours
  for (const auto& [slot, column] : {std::pair{0, 0}, {5, 10}, {16, 1}, {31, 31}}) {
    ExpectLayout<BF16>(shape, static_cast<size_t>(slot), static_cast<size_t>(column),
                       [](const BF16& v) { return ToF32(v); });
  }
}

}  // namespace
}  // namespace firesteel::kernels
