#include "testdata/goldens.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <string>
#include <vector>

namespace firesteel {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string TestData(const std::string& name) {
  return std::string(FIRESTEEL_SOURCE_DIR) + "/testdata/" + name;
}

std::string ReadAll(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

const GoldenPrompt* FindPrompt(const Goldens& goldens, const std::string& name) {
  for (const GoldenPrompt& prompt : goldens.prompts) {
    if (prompt.name == name) return &prompt;
  }
  return nullptr;
}

uint32_t Sum(const std::vector<uint32_t>& set) {
  return std::accumulate(set.begin(), set.end(), 0u);
}

class GoldensTest : public ::testing::TestWithParam<const char*> {};

TEST_P(GoldensTest, HasWholeAndConsistentPrompts) {
  const auto goldens = LoadGoldens(TestData(std::string(GetParam()) + ".golden"));
  ASSERT_TRUE(goldens.ok()) << goldens.status();
  EXPECT_GE(goldens->prompts.size(), 10u);
  for (const GoldenPrompt& prompt : goldens->prompts) {
    SCOPED_TRACE(prompt.name);
    ASSERT_FALSE(prompt.ids.empty());
    EXPECT_EQ(prompt.ids[0], 2);
    for (const int32_t id : prompt.ids) EXPECT_LT(static_cast<size_t>(id), goldens->vocab_size);
    ASSERT_EQ(prompt.logits.size(), prompt.logit_positions.size());
    EXPECT_EQ(prompt.logit_positions.front(), 0u);
    EXPECT_EQ(prompt.logit_positions.back(), prompt.ids.size() - 1);

    // The last logits choose the first continued token, whose value is stored twice.
    const std::vector<float>& last = prompt.logits.back();
    const auto best = std::max_element(last.begin(), last.end());
    ASSERT_FALSE(prompt.continuation.empty());
    EXPECT_EQ(best - last.begin(), prompt.continuation[0]);
    EXPECT_NEAR(*best, prompt.top_two[0].logits[0], 1e-4);
    EXPECT_NEAR(last[static_cast<size_t>(prompt.top_two[0].ids[1])], prompt.top_two[0].logits[1],
                1e-4);
    for (size_t i = 0; i < prompt.continuation.size(); ++i) {
      EXPECT_EQ(prompt.top_two[i].ids[0], prompt.continuation[i]);
      EXPECT_GE(prompt.top_two[i].logits[0], prompt.top_two[i].logits[1]);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, GoldensTest,
                         ::testing::Values("random-spark", "random-gemma2", "spark-stories",
                                           "dense-stories"),
                         [](const auto& test) {
                           std::string name = test.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

// Expected numbers are what spark_reference.py --dump says of these ids.
TEST(GoldensFactsTest, SetsAndLogitsAreTheReferences) {
  const auto goldens = LoadGoldens(TestData("spark-stories.golden"));
  ASSERT_TRUE(goldens.ok()) << goldens.status();
  ASSERT_TRUE(goldens->spark);
  EXPECT_EQ(goldens->layers, 7u);
  EXPECT_EQ(goldens->heads, 8u);
  EXPECT_EQ(goldens->intermediate_size, 3072u);
  const GoldenPrompt* const prompt = FindPrompt(*goldens, "valid 13, 257 ids");
  ASSERT_NE(prompt, nullptr);

  const std::vector<uint32_t> ffn = prompt->ffn_active(6, 256);
  ASSERT_EQ(ffn.size(), 257u);
  EXPECT_EQ(ffn[0], 22u);
  EXPECT_EQ(ffn.back(), 3040u);
  EXPECT_EQ(Sum(ffn), 404213u);
  EXPECT_EQ(Sum(prompt->ffn_active(0, 0)), 481163u);
  EXPECT_EQ(Sum(prompt->ffn_active(3, 100)), 350147u);

  // A full layer; a sliding one past its window of 256; one with a few positions missing; one with
  // all.
  EXPECT_EQ(Sum(prompt->attention_kept(1, 256, 3)), 10260u);
  const std::vector<uint32_t> sliding = prompt->attention_kept(2, 256, 7);
  EXPECT_EQ(sliding.size(), 50u);
  EXPECT_EQ(sliding[0], 110u);
  EXPECT_EQ(Sum(sliding), 10517u);
  EXPECT_EQ(prompt->attention_kept(5, 70, 1).size(), 65u);
  EXPECT_EQ(Sum(prompt->attention_kept(5, 70, 1)), 2207u);
  EXPECT_THAT(prompt->attention_kept(0, 4, 0), ElementsAre(0, 1, 2, 3, 4));

  EXPECT_NEAR(prompt->logits.back()[0], -13.02801995, 6.2e-5);
  EXPECT_NEAR(prompt->logits.back()[3], -13.08838963, 6.2e-5);
  EXPECT_NEAR(prompt->logits[0][8191], 10.74665735, 6.2e-5);
  EXPECT_EQ(prompt->top_two[0].ids[1], 8160);
}

TEST(GoldensFactsTest, DenseModelsHaveNoSets) {
  const auto goldens = LoadGoldens(TestData("random-gemma2.golden"));
  ASSERT_TRUE(goldens.ok()) << goldens.status();
  EXPECT_FALSE(goldens->spark);
}

TEST(GoldensFactsTest, DamagedFilesAreErrors) {
  const std::string path = (std::filesystem::temp_directory_path() /
                            ("firesteel-damaged-" + std::to_string(getpid()) + ".golden"))
                               .string();
  const std::string good = ReadAll(TestData("random-spark.golden"));
  const std::string cut = good.substr(0, good.size() - 1);
  std::string flipped = good;
  flipped[good.size() / 2] = static_cast<char>(flipped[good.size() / 2] ^ 0x10);
  for (const std::string& bad :
       {std::string("x"), good.substr(0, 10), good.substr(0, 500), cut, flipped}) {
    std::ofstream(path, std::ios::binary) << bad;
    EXPECT_THAT(std::string(LoadGoldens(path).status().message()), HasSubstr(path));
  }
  std::filesystem::remove(path);
}

TEST(ValidStatsTest, HasTheReferencesLoss) {
  const auto spark = LoadValidStats(TestData("valid_stats.json"), "spark-stories");
  ASSERT_TRUE(spark.ok()) << spark.status();
  EXPECT_NEAR(spark->nll, 2.471569, 5e-7);
  EXPECT_EQ(spark->predicted_tokens, 5655u);
  EXPECT_EQ(spark->positions, 5670u);
  ASSERT_EQ(spark->ffn_active_fraction.size(), 7u);
  for (const double fraction : spark->ffn_active_fraction) {
    EXPECT_GT(fraction, 0.045);
    EXPECT_LT(fraction, 0.085);
  }
  const auto dense = LoadValidStats(TestData("valid_stats.json"), "dense-stories");
  ASSERT_TRUE(dense.ok()) << dense.status();
  EXPECT_NEAR(dense->nll, 2.504144, 5e-7);
  EXPECT_EQ(LoadValidStats(TestData("valid_stats.json"), "none").status().code(),
            absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace firesteel
