#include "runtime/scheduler/live_request.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>

#include "runtime/scheduler/testing.h"

namespace firesteel {
namespace {

using ::testing::ElementsAre;

// A request that loses its place behind its third token and gets it back: what it computes anew
// draws nothing, and what was told of it stays true.
TEST(LiveRequest, ResumesWhereItWasPreempted) {
  const ModelConfig config = SmallConfig();
  const NumberTokenizer tokenizer;
  auto pool =
      std::move(KvBlockPool::Create(config, kernels::DType::kBF16,
                                    8 * KvBlockPool::BytesPerBlock(config, kernels::DType::kBF16)))
          .value();
  const absl::Time start = absl::UnixEpoch();
  const auto at = [&](int seconds) { return start + absl::Seconds(seconds); };
  LiveRequest request(RandomRequest(1, 40, 20), std::make_shared<RecordingSink>(), config,
                      tokenizer, {.shares_prompts = true, .optimistic = true}, start);
  Sequence& sequence = request.sequences().front();
  const auto decode = [&](int32_t token, int seconds) {
    ASSERT_TRUE(request.PrepareSlice(0, 1));
    EXPECT_EQ(request.NextSlice(0, 1).logits, LogitRows::kLast);
    EXPECT_TRUE(request.Advance(0, 1, pool.get(), at(seconds)));
    request.TakeToken(sequence, token, std::nullopt, at(seconds));
  };
  ASSERT_TRUE(request.Admit(pool.get(), at(1)));
  EXPECT_EQ(request.NextSlice(0, 30).logits, LogitRows::kNone);
  EXPECT_EQ(request.NextSlice(0, 40).logits, LogitRows::kLast);
  EXPECT_TRUE(request.Advance(0, 40, pool.get(), at(2)));
  request.TakeToken(sequence, 7, std::nullopt, at(2));
  decode(8, 3);
  decode(9, 4);

  request.Preempt();
  EXPECT_EQ(pool->available_blocks(), 8u);
  EXPECT_EQ(request.prompt_left(), 40u);

  // The prompt's first block is in the cache.
  ASSERT_TRUE(request.Admit(pool.get(), at(10)));
  ASSERT_EQ(request.prompt_left(), 8u);
  EXPECT_TRUE(request.NextSlice(0, 8).prompt);
  EXPECT_EQ(request.NextSlice(0, 8).logits, LogitRows::kNone) << "its token was drawn before";
  EXPECT_FALSE(request.Advance(0, 8, pool.get(), at(11)));
  ASSERT_TRUE(request.PrepareSlice(0, 3));
  const SequenceSlice lost = request.NextSlice(0, 2);
  EXPECT_FALSE(lost.prompt) << "what was generated is computed the way of decoding";
  EXPECT_THAT(lost.tokens, ElementsAre(7, 8));
  EXPECT_EQ(lost.position, 40u);
  EXPECT_EQ(lost.logits, LogitRows::kNone);
  EXPECT_FALSE(request.Advance(0, 2, pool.get(), at(12)));
  decode(10, 13);

  const GenerationResult result = request.Finish(FinishReason::kCancelled, {}, at(20));
  EXPECT_EQ(pool->available_blocks(), 8u) << "before the sink is told";
  EXPECT_EQ(result.usage.generated_tokens, 4u);
  EXPECT_EQ(result.usage.cached_tokens, 0u) << "of when it first joined";
  EXPECT_EQ(result.timings.queue, absl::Seconds(1));
  EXPECT_EQ(result.timings.prefill, absl::Seconds(1));
  EXPECT_EQ(result.timings.first_token, absl::Seconds(2));
}

// The head is asked for as many of the largest logits as the draw looks at, and for those that it
// must pass over.
TEST(LiveRequest, NeedsTheLargestLogitsAndTheForbiddenOnes) {
  const ModelConfig config = SmallConfig();
  const NumberTokenizer tokenizer;
  const auto needed = [&](GenerationRequest request) {
    const LiveRequest live(std::move(request), std::make_shared<RecordingSink>(), config, tokenizer,
                           {}, absl::UnixEpoch());
    return live.NextSlice(0, 5).top_k;
  };
  GenerationRequest request = RandomRequest(1, 5, 20);
  EXPECT_EQ(needed(request), 0u) << "all: temperature 1";
  request.sampling.top_k = 10;
  EXPECT_EQ(needed(request), 10u);
  request.sampling.temperature = 0;
  EXPECT_EQ(needed(request), 1u);
  request.stopping.stop_token_ids = {7, 8, 9};
  EXPECT_EQ(needed(request), 1u);
  request.stopping.min_tokens = 1;
  EXPECT_EQ(needed(request), 4u);
  request.logprobs = 0;
  EXPECT_EQ(needed(request), 0u) << "all, for their sum";
}

}  // namespace
}  // namespace firesteel
