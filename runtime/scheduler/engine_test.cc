#include "runtime/scheduler/engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <latch>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/time/clock.h"
#include "runtime/model/transformer.h"
#include "runtime/scheduler/testing.h"

namespace firesteel {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class EngineTest : public ::testing::Test {
 protected:
  std::unique_ptr<Engine> Make(EngineOptions options = {}, size_t threads = 2) {
    pools_.push_back(std::make_unique<WorkerPool>(threads));
    auto engine = Engine::Create(weights_, tokenizer_, ComputeType::kF32, options,
                                 pools_.back().get(), &observer_);
    EXPECT_TRUE(engine.ok()) << engine.status();
    return *std::move(engine);
  }
  static GenerationRequest Request(uint32_t seed, size_t prompt, uint32_t max_tokens) {
    return RandomRequest(seed, prompt, max_tokens);
  }
  static GenerationRequest Greedy(uint32_t seed, size_t prompt, uint32_t max_tokens) {
    GenerationRequest request = Request(seed, prompt, max_tokens);
    request.sampling.temperature = 0;
    return request;
  }
  std::shared_ptr<RecordingSink> Submit(Engine& engine, GenerationRequest request,
                                        Engine::RequestHandle* handle = nullptr) {
    auto sink = std::make_shared<RecordingSink>();
    auto submitted = engine.Submit(std::move(request), sink);
    EXPECT_TRUE(submitted.ok()) << submitted.status();
    if (submitted.ok() && handle != nullptr) *handle = *submitted;
    return sink;
  }

  std::shared_ptr<const ModelWeights> weights_ =
      MakeSyntheticWeights(SmallConfig(), kernels::DType::kBF16, 3);
  std::shared_ptr<const Tokenizer> tokenizer_ = std::make_shared<NumberTokenizer>();
  CountingObserver observer_;
  std::vector<std::unique_ptr<WorkerPool>> pools_;
};

// Which head gives the logits changes no token, whatever stands in the batch.
TEST_F(EngineTest, SublinearHeadDrawsTheSameTokens) {
  ModelConfig config = SmallConfig();
  config.vocab_size = 600;
  config.eos_token_ids = {5};
  weights_ = MakeSyntheticWeights(config, kernels::DType::kBF16, 8);
  tokenizer_ = std::make_shared<NumberTokenizer>(600);
  std::vector<std::vector<int32_t>> tokens[2];
  for (const bool on : {false, true}) {
    auto engine = Make({.max_batch_tokens = 32, .sublinear_head = on});
    EXPECT_EQ(engine->options().sublinear_head, on);
    std::vector<std::shared_ptr<RecordingSink>> sinks;
    for (uint32_t i = 0; i < 12; ++i) {
      GenerationRequest request = Request(i, 10 + i, 30);
      request.sampling.temperature = i % 3 == 0 ? 0.0f : 1.5f;
      request.sampling.top_k = std::vector<uint32_t>{0, 1, 40, 300}[i % 4];
      request.sampling.top_p = i % 5 == 0 ? 0.7f : 1.0f;
      request.stopping.ignore_eos = i % 2 == 0;
      request.stopping.min_tokens = i;
      sinks.push_back(Submit(*engine, request));
    }
    for (auto& sink : sinks) {
      const GenerationResult result = sink->Wait();
      EXPECT_NE(result.reason, FinishReason::kError) << result.status;
      tokens[on ? 1 : 0].push_back(sink->tokens());
    }
  }
  EXPECT_EQ(tokens[0], tokens[1]);
}

TEST_F(EngineTest, SublinearHeadIsForLargeEmbeddings) {
  EXPECT_EQ(Make()->options().sublinear_head, false);
  ModelConfig config = SmallConfig();
  config.vocab_size = kSublinearHeadBytes / (2 * config.hidden_size) + 64;
  weights_ = MakeSyntheticWeights(config, kernels::DType::kBF16, 8);
  EXPECT_EQ(Make({.max_batch_size = 1, .max_batch_tokens = 1})->options().sublinear_head, true);
}

TEST_F(EngineTest, GreedyIsWhatTheModelSays) {
  auto engine = Make({.max_batch_tokens = 32});
  const GenerationRequest request = Greedy(1, 50, 20);
  auto sink = Submit(*engine, request);
  const GenerationResult result = sink->Wait();

  WorkerPool pool(1);
  const kernels::DType kv_dtype = engine->options().kv_dtype;
  auto cache =
      std::move(KvBlockPool::Create(weights_->config, kv_dtype,
                                    KvBlockPool::BytesPerBlock(weights_->config, kv_dtype) * 8))
          .value();
  const KvLease lease = std::move(cache->Lease(70)).value();
  Transformer model(weights_, ComputeType::kF32, kv_dtype, &pool, 64, 1);
  std::vector<int32_t> ids = request.prompt;
  std::vector<int32_t> expected;
  size_t computed = 0;
  while (expected.size() < 20) {
    const SequenceSlice slice{std::span(ids).subspan(computed), computed, lease.blocks(),
                              LogitRows::kLast};
    model.Forward({&slice, 1});
    computed = ids.size();
    const auto logits = model.logits(0);
    expected.push_back(
        static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin()));
    ids.push_back(expected.back());
  }
  EXPECT_EQ(sink->tokens(), expected);
  std::string text;
  for (int32_t t : expected) text += tokenizer_->TokenBytes(t);
  EXPECT_EQ(sink->text(), text);
  EXPECT_EQ(result.reason, FinishReason::kLength);
  EXPECT_EQ(result.usage.prompt_tokens, 50u);
  EXPECT_EQ(result.usage.generated_tokens, 20u);
  EXPECT_NEAR(result.sparsity.ffn_active_fraction, 20.0 / 256, 0.03);
  EXPECT_GT(result.sparsity.flops_skipped_fraction, 0.1);
  EXPECT_LT(result.sparsity.flops_skipped_fraction, 0.9);
  EXPECT_GT(result.sparsity.attention_attended_positions, 1);
  EXPECT_LE(result.timings.first_token, result.timings.total);
  EXPECT_GE(result.timings.prefill, absl::ZeroDuration());
}

TEST_F(EngineTest, OutputDoesNotDependOnBatchMatesThreadsOrChunks) {
  constexpr uint32_t kRequests = 24;
  const auto run = [&](EngineOptions options, size_t threads, bool one_at_a_time) {
    auto engine = Make(options, threads);
    std::vector<std::shared_ptr<RecordingSink>> sinks;
    for (uint32_t i = 0; i < kRequests; ++i) {
      GenerationRequest request = Request(i, 1 + 7 * i, 10 + i);
      request.sampling.top_k = i % 3 == 0 ? 20 : 0;
      request.sampling.top_p = i % 2 == 0 ? 0.9f : 1.0f;
      sinks.push_back(Submit(*engine, request));
      if (one_at_a_time) sinks.back()->Wait();
    }
    std::vector<std::vector<int32_t>> tokens;
    for (auto& sink : sinks) {
      EXPECT_EQ(sink->Wait().reason, FinishReason::kLength);
      tokens.push_back(sink->tokens());
    }
    return tokens;
  };
  const auto alone = run({.max_batch_size = 1, .max_batch_tokens = 256}, 1, true);
  EXPECT_EQ(run({.max_batch_size = 8, .max_batch_tokens = 16}, 2, false), alone);
  EXPECT_EQ(run({.max_batch_size = 32, .max_batch_tokens = 100}, 3, false), alone);
  EXPECT_NE(alone[1], alone[2]);
}

// Sequence i of n is what it would be in any other company: only its number tells it apart.
TEST_F(EngineTest, SequencesShareThePromptAndDifferInTheirDraws) {
  auto engine = Make({.max_batch_size = 8, .max_batch_tokens = 40});
  GenerationRequest request = Request(5, 45, 12);
  request.stopping.ignore_eos = false;
  request.n = 5;
  auto five = Submit(*engine, request);
  auto neighbour = Submit(*engine, Request(6, 30, 20));
  const GenerationResult result = five->Wait();
  EXPECT_EQ(neighbour->Wait().reason, FinishReason::kLength);
  EXPECT_EQ(result.usage.prompt_tokens, 45u);
  const auto sequences = five->sequences();
  ASSERT_EQ(sequences.size(), 5u);
  uint32_t generated = 0;
  for (const auto& sequence : sequences) {
    EXPECT_TRUE(sequence.end.has_value());
    generated += static_cast<uint32_t>(sequence.tokens.size());
  }
  EXPECT_EQ(result.usage.generated_tokens, generated);
  EXPECT_NE(sequences[0].tokens, sequences[1].tokens);

  request.n = 2;
  auto two = Submit(*engine, request);
  two->Wait();
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(two->sequences()[i].tokens, sequences[i].tokens) << i;
    EXPECT_EQ(two->sequences()[i].text, sequences[i].text) << i;
  }
  ASSERT_TRUE(engine->FinishDrain(absl::InfiniteFuture()));
  EXPECT_EQ(engine->gauges().kv_usage_ratio, 0.0);
}

TEST_F(EngineTest, PromptsAreComputedOnceForAllWhoMayShareThem) {
  auto engine = Make({.max_batch_tokens = 64});
  const auto cached = [&](GenerationRequest request) {
    auto sink = Submit(*engine, std::move(request));
    const GenerationResult result = sink->Wait();
    EXPECT_EQ(result.reason, FinishReason::kLength);
    return result.usage.cached_tokens;
  };
  GenerationRequest request = Request(5, 100, 10);
  request.client = "ann";
  EXPECT_EQ(cached(request), 0u);
  EXPECT_EQ(cached(request), 96u);
  GenerationRequest longer = request;
  longer.prompt.resize(140, 7);
  longer.n = 3;
  EXPECT_EQ(cached(longer), 96u);
  GenerationRequest shorter = request;
  shorter.prompt.resize(96);
  EXPECT_EQ(cached(shorter), 64u) << "the last token is computed for its logits";
  GenerationRequest other = request;
  other.client = "bob";
  EXPECT_EQ(cached(other), 0u);
  other = request;
  other.cache_salt = "salt";
  EXPECT_EQ(cached(other), 0u);
  // Nor can a client pass for another by a salt that looks alike.
  other = request;
  other.client = "an";
  other.cache_salt = "n";
  EXPECT_EQ(cached(other), 0u);
  GenerationRequest scored = request;
  scored.prompt_logprobs = true;
  EXPECT_EQ(cached(scored), 0u) << "every position is needed";

  MutexLock lock(&observer_.mutex_);
  EXPECT_EQ(observer_.prefix_queries, 100u + 100 + 140 + 96 + 100 + 100 + 100);
  EXPECT_EQ(observer_.prefix_hits, 96u + 96 + 64);
  EXPECT_EQ(observer_.last.kv_usage_ratio, 0.0) << "what is only cached is not in use";
}

// What was generated was computed another way than a prompt, and is not taken for one.
TEST_F(EngineTest, GeneratedPositionsAreNotShared) {
  auto engine = Make();
  GenerationRequest request = Greedy(5, 40, 100);
  auto sink = Submit(*engine, request);
  sink->Wait();
  const auto answer = sink->tokens();
  GenerationRequest next = request;
  next.prompt.insert(next.prompt.end(), answer.begin(), answer.end());
  next.max_tokens = 5;
  auto follow_up = Submit(*engine, next);
  EXPECT_EQ(follow_up->Wait().usage.cached_tokens, 32u);
}

// A cache that holds a fraction of what is asked for at once: the last come are preempted, and
// nobody can tell from what is generated.
TEST_F(EngineTest, PreemptionChangesNoToken) {
  const size_t block = KvBlockPool::BytesPerBlock(weights_->config, kernels::DType::kBF16);
  const auto run = [&](EngineOptions options) {
    auto engine = Make(options);
    std::vector<std::shared_ptr<RecordingSink>> sinks;
    for (uint32_t i = 0; i < 16; ++i) {
      GenerationRequest request = Request(i, 5 + 6 * i, 60 + i);
      request.n = i % 5 == 0 ? 3 : 1;
      request.logprobs = 1;
      request.prompt_logprobs = i % 4 == 1;
      sinks.push_back(Submit(*engine, request));
    }
    std::vector<std::vector<std::vector<int32_t>>> tokens;
    for (auto& sink : sinks) {
      EXPECT_EQ(sink->Wait().reason, FinishReason::kLength);
      tokens.emplace_back();
      for (const auto& sequence : sink->sequences()) tokens.back().push_back(sequence.tokens);
      const size_t i = tokens.size() - 1;
      EXPECT_EQ(sink->prompt_logprobs().size(), i % 4 == 1 ? 4 + 6 * i : 0) << "scored once";
    }
    EXPECT_TRUE(engine->FinishDrain(absl::InfiniteFuture()));
    EXPECT_EQ(engine->gauges().kv_usage_ratio, 0.0);
    return tokens;
  };
  const auto roomy = run({});
  {
    MutexLock lock(&observer_.mutex_);
    EXPECT_EQ(observer_.preemptions, 0u);
  }
  for (const bool prefix_cache : {false, true}) {
    const auto tight = run({.max_batch_size = 16,
                            .max_batch_tokens = 48,
                            .kv_cache_bytes = 18 * block,
                            .prefix_cache = prefix_cache,
                            .optimistic_admission = true});
    EXPECT_EQ(tight, roomy);
  }
  MutexLock lock(&observer_.mutex_);
  EXPECT_GT(observer_.preemptions, 4u);
  EXPECT_EQ(observer_.last.requests_waiting, 0u);
}

// Whoever lost its place gets it back before all others, however important: what was computed of it
// was paid for.
TEST_F(EngineTest, ThePreemptedComeBackBeforeAllWhoWait) {
  // What happens, in order; the engine's thread tells.
  class Witness final : public GenerationSink {
   public:
    Witness(std::string name, std::vector<std::string>* events)
        : name_(std::move(name)), events_(events) {}
    void OnDelta(TokenDelta) override {
      if (begun_.try_wait()) return;
      events_->push_back(name_ + " begins");
      begun_.count_down();
    }
    void OnFinish(GenerationResult) override { events_->push_back(name_ + " ends"); }
    void WaitForBeginning() { begun_.wait(); }

   private:
    const std::string name_;
    std::vector<std::string>* const events_;
    std::latch begun_{1};
  };
  const size_t block = KvBlockPool::BytesPerBlock(weights_->config, kernels::DType::kBF16);
  auto engine =
      Make({.max_batch_size = 2, .kv_cache_bytes = 4 * block, .optimistic_admission = true});
  std::vector<std::string> events;
  const auto submit = [&](const char* name, const GenerationRequest& request) {
    auto sink = std::make_shared<Witness>(name, &events);
    EXPECT_TRUE(engine->Submit(request, sink).ok());
    return sink;
  };
  submit("first", Request(1, 20, 60));
  // Loses its blocks where the first one needs a third.
  submit("preempted", Request(2, 20, 60))->WaitForBeginning();
  GenerationRequest important = Request(3, 20, 5);
  important.priority = 5;
  submit("important", important);
  EXPECT_TRUE(engine->FinishDrain(absl::InfiniteFuture()));
  EXPECT_THAT(events, ElementsAre("first begins", "preempted begins", "first ends",
                                  "important begins", "important ends", "preempted ends"));
  MutexLock lock(&observer_.mutex_);
  EXPECT_EQ(observer_.preemptions, 1u);
}

// log p of a text, from one pass over it, is what generating it says token by token.
TEST_F(EngineTest, PromptLogprobsAreThoseOfGeneration) {
  auto engine = Make({.max_batch_size = 4, .max_batch_tokens = 64});
  GenerationRequest request = Request(11, 20, 70);
  request.logprobs = 3;
  request.sampling.temperature = 0.5f;  // the log-probabilities are the model's own all the same
  request.sampling.repetition_penalty = 1.3f;
  request.sampling.logit_bias = {{4, 2.0f}};
  auto generated = Submit(*engine, request);
  generated->Wait();
  const auto tokens = generated->tokens();
  const auto logprobs = generated->sequences()[0].logprobs;
  ASSERT_EQ(logprobs.size(), tokens.size());

  GenerationRequest score = request;
  score.prompt.insert(score.prompt.end(), tokens.begin(), tokens.end());
  score.prompt_logprobs = true;
  score.max_tokens = 0;
  auto other = Submit(*engine, Request(12, 50, 90));  // company
  auto scored = Submit(*engine, score);
  const GenerationResult result = scored->Wait();
  EXPECT_EQ(result.reason, FinishReason::kLength);
  EXPECT_EQ(result.usage.generated_tokens, 0u);
  EXPECT_TRUE(scored->tokens().empty());
  const auto prompt = scored->prompt_logprobs();
  ASSERT_EQ(prompt.size(), score.prompt.size() - 1);
  for (size_t i = 0; i < tokens.size(); ++i) {
    const TokenLogprob& a = logprobs[i];
    const TokenLogprob& b = prompt[request.prompt.size() - 1 + i];
    EXPECT_EQ(a.token_id, tokens[i]);
    EXPECT_EQ(b.token_id, tokens[i]);
    EXPECT_NEAR(a.logprob, b.logprob, 1e-5) << i;
    ASSERT_EQ(a.alternatives.size(), 3u);
    EXPECT_EQ(a.alternatives[0].token_id, b.alternatives[0].token_id);
    EXPECT_GE(a.alternatives[0].logprob, a.logprob);
  }
  EXPECT_EQ(other->Wait().reason, FinishReason::kLength);

  // Both at once: the text is scored and goes on.
  score.max_tokens = 5;
  auto both = Submit(*engine, score);
  EXPECT_EQ(both->Wait().usage.generated_tokens, 5u);
  EXPECT_EQ(both->prompt_logprobs().size(), score.prompt.size() - 1);
  EXPECT_EQ(both->sequences()[0].logprobs.size(), 5u);
}

TEST_F(EngineTest, PenaltiesCountThePromptAndWhatWasGenerated) {
  auto engine = Make();
  GenerationRequest request = Greedy(3, 30, 40);
  request.sampling.presence_penalty = 2;
  request.sampling.frequency_penalty = 2;
  request.sampling.repetition_penalty = 100;
  auto sink = Submit(*engine, request);
  sink->Wait();
  std::vector<int32_t> all = request.prompt;
  const std::vector<int32_t> generated = sink->tokens();
  all.insert(all.end(), generated.begin(), generated.end());
  std::sort(all.begin(), all.end());
  const size_t distinct_prompt = [&] {
    std::vector<int32_t> prompt = request.prompt;
    std::sort(prompt.begin(), prompt.end());
    return static_cast<size_t>(std::unique(prompt.begin(), prompt.end()) - prompt.begin());
  }();
  const size_t distinct = static_cast<size_t>(std::unique(all.begin(), all.end()) - all.begin());
  EXPECT_EQ(distinct, distinct_prompt + generated.size()) << "a seen token came again";

  GenerationRequest biased = Greedy(3, 30, 8);
  biased.sampling.logit_bias = {{41, 100.0f}};
  sink = Submit(*engine, biased);
  sink->Wait();
  EXPECT_EQ(sink->tokens(), std::vector<int32_t>(8, 41));
}

TEST_F(EngineTest, BudgetsHoldAndCountersBalance) {
  auto engine = Make({.max_batch_size = 4, .max_batch_tokens = 20});
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  uint64_t prompt = 0;
  uint64_t generated = 0;
  for (uint32_t i = 0; i < 30; ++i) {
    sinks.push_back(Submit(*engine, Request(i, 1 + i * 3, 1 + i % 9)));
    prompt += 1 + i * 3;
    generated += 1 + i % 9;
  }
  for (auto& sink : sinks) sink->Wait();
  ASSERT_TRUE(engine->FinishDrain(absl::InfiniteFuture()));
  MutexLock lock(&observer_.mutex_);
  EXPECT_EQ(observer_.prefill_tokens, prompt);
  EXPECT_EQ(observer_.decode_tokens,
            generated - 30);  // the first token comes from the prompt's last row
  EXPECT_EQ(observer_.first_tokens, 30u);
  EXPECT_EQ(observer_.later_tokens, generated - 30);
  EXPECT_LE(observer_.largest_step, 20u);
  EXPECT_EQ(observer_.largest_batch, 4u);
  EXPECT_EQ(observer_.finished[static_cast<size_t>(FinishReason::kLength)], 30u);
  EXPECT_EQ(observer_.last.requests_running, 0u);
  EXPECT_EQ(observer_.last.requests_waiting, 0u);
  EXPECT_EQ(observer_.last.kv_usage_ratio, 0.0);
}

TEST_F(EngineTest, Stopping) {
  auto engine = Make();
  auto sink = Submit(*engine, Request(9, 5, 12));
  sink->Wait();
  const std::vector<int32_t> free_run = sink->tokens();
  ASSERT_EQ(free_run.size(), 12u);

  // A token that comes first at some position ≥ 2, so that the others are generated before it.
  size_t at = 2;
  while (at < free_run.size() &&
         std::count(free_run.begin(), free_run.begin() + static_cast<ptrdiff_t>(at), free_run[at]) >
             0)
    ++at;
  ASSERT_LT(at, free_run.size()) << "choose another seed: the run repeats itself";
  const int32_t token = free_run[at];
  const std::string bytes = tokenizer_->TokenBytes(token);

  GenerationRequest by_id = Request(9, 5, 12);
  by_id.stopping.stop_token_ids = {token};
  sink = Submit(*engine, by_id);
  EXPECT_EQ(sink->Wait().reason, FinishReason::kStop);
  EXPECT_EQ(sink->stop_match(), bytes);
  EXPECT_EQ(sink->tokens().size(), at + 1);
  EXPECT_THAT(sink->text(), Not(HasSubstr(bytes)));

  GenerationRequest by_text = Request(9, 5, 12);
  by_text.stopping.stop = {bytes};
  sink = Submit(*engine, by_text);
  EXPECT_EQ(sink->Wait().reason, FinishReason::kStop);
  EXPECT_EQ(sink->stop_match(), bytes);
  EXPECT_THAT(sink->text(), Not(HasSubstr(bytes)));
  EXPECT_EQ(sink->Wait().usage.generated_tokens, at + 1);
  // The token that is min_tokens' last may complete it, one before may not.
  by_text.stopping.min_tokens = static_cast<uint32_t>(at) + 1;
  EXPECT_EQ(Submit(*engine, by_text)->Wait().usage.generated_tokens, at + 1);
  by_text.stopping.min_tokens = static_cast<uint32_t>(at) + 2;
  sink = Submit(*engine, by_text);
  EXPECT_GT(sink->Wait().usage.generated_tokens, at + 1);
  EXPECT_THAT(sink->text(), HasSubstr(bytes));

  // Not before min_tokens: the stop token can't even be drawn until then.
  by_id.stopping.min_tokens = static_cast<uint32_t>(at) + 2;
  sink = Submit(*engine, by_id);
  sink->Wait();
  EXPECT_GE(sink->tokens().size(), at + 2);
  EXPECT_NE(sink->tokens()[at], token);
}

TEST_F(EngineTest, EosEndsUnlessIgnored) {
  ModelConfig config = SmallConfig();
  auto engine = Make();
  auto sink = Submit(*engine, Greedy(9, 5, 12));
  sink->Wait();
  // The same weights, with the third token of that run as eos.
  config.eos_token_ids = {sink->tokens()[2]};
  weights_ = MakeSyntheticWeights(config, kernels::DType::kBF16, 3);
  engine = Make();
  GenerationRequest request = Greedy(9, 5, 12);
  request.stopping.ignore_eos = false;
  auto ended = Submit(*engine, request);
  EXPECT_EQ(ended->Wait().reason, FinishReason::kEos);
  EXPECT_LE(ended->tokens().size(), 3u);
  EXPECT_EQ(ended->tokens().back(), config.eos_token_ids[0]);
  auto ignored = Submit(*engine, Greedy(9, 5, 12));
  EXPECT_EQ(ignored->Wait().reason, FinishReason::kLength);
  EXPECT_EQ(ignored->tokens(), sink->tokens());
}

TEST_F(EngineTest, CancelFreesMemoryAndNeighboursDoNotNotice) {
  auto engine = Make();
  auto alone = Submit(*engine, Request(77, 30, 100));
  alone->Wait();

  auto neighbour = Submit(*engine, Request(77, 30, 100));
  auto victim = std::make_shared<BlockingSink>();
  const Engine::RequestHandle handle = engine->Submit(Request(78, 100, 150), victim).value();
  victim->entered.wait();
  engine->Cancel(handle);
  victim->release.count_down();
  EXPECT_EQ(victim->Wait().reason, FinishReason::kCancelled);
  EXPECT_LT(victim->tokens().size(), 150u);
  EXPECT_EQ(neighbour->Wait().reason, FinishReason::kLength);
  EXPECT_EQ(neighbour->tokens(), alone->tokens());
  engine->Cancel(handle);   // long gone
  engine->Cancel(1234567);  // never was
  ASSERT_TRUE(engine->FinishDrain(absl::InfiniteFuture()));
  EXPECT_EQ(engine->gauges().kv_usage_ratio, 0.0);
}

// A clock that is never looked at tells of a thread that does not turn in vain.
TEST_F(EngineTest, SleepsWhereNothingIsLeft) {
  class CountingClock final : public Clock {
   public:
    absl::Time Now() const override {
      ++looks;
      return absl::UnixEpoch();
    }
    mutable std::atomic<int> looks = 0;
  };
  CountingClock clock;
  auto engine = Make({.clock = &clock});
  auto sink = std::make_shared<BlockingSink>();
  const Engine::RequestHandle handle = engine->Submit(Request(1, 20, 200), sink).value();
  sink->entered.wait();
  engine->Cancel(handle);
  sink->release.count_down();
  EXPECT_EQ(sink->Wait().reason, FinishReason::kCancelled);
  EXPECT_TRUE(engine->FinishDrain(absl::InfiniteFuture()));
  const int before = clock.looks;
  absl::SleepFor(absl::Milliseconds(20));
  EXPECT_LE(clock.looks, before + 10) << "what is left of the last turn";
}

TEST_F(EngineTest, DeadlinesEndWaiting) {
  ManualClock clock;
  auto engine = Make({.max_batch_size = 1, .clock = &clock});
  auto running = std::make_shared<BlockingSink>();
  ASSERT_TRUE(engine->Submit(Request(1, 10, 20), running).ok());
  running->entered.wait();
  GenerationRequest late = Request(2, 10, 5);
  late.deadline = clock.Now();
  auto expired = Submit(*engine, late);
  running->release.count_down();
  EXPECT_EQ(expired->Wait().reason, FinishReason::kDeadlineExceeded);
  EXPECT_EQ(expired->tokens().size(), 0u);
  EXPECT_NE(running->Wait().reason, FinishReason::kDeadlineExceeded);
}

TEST_F(EngineTest, DeadlinesEndRunning) {
  ManualClock clock;
  auto engine = Make({.max_batch_size = 1, .clock = &clock});
  GenerationRequest slow = Request(1, 10, 20);
  slow.deadline = clock.Now() + absl::Seconds(1);
  auto running = std::make_shared<BlockingSink>();
  ASSERT_TRUE(engine->Submit(slow, running).ok());
  running->entered.wait();
  clock.Advance(absl::Seconds(1));
  running->release.count_down();
  EXPECT_EQ(running->Wait().reason, FinishReason::kDeadlineExceeded);
  EXPECT_GE(running->Wait().timings.total, absl::Seconds(1));
}

TEST_F(EngineTest, QueueBoundsRefuseBeforeAnyWork) {
  auto engine = Make({.max_batch_size = 1, .max_queue_requests = 2, .max_queue_tokens = 30});
  auto blocker = std::make_shared<BlockingSink>();
  ASSERT_TRUE(engine->Submit(Request(0, 4, 2), blocker).ok());
  blocker->entered.wait();  // running; the queue is empty

  auto first = Submit(*engine, Request(1, 10, 1));
  auto never = std::make_shared<RecordingSink>();
  auto refused = engine->Submit(Request(2, 21, 1), never);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("max-queue-tokens 30"));
  auto second = Submit(*engine, Request(3, 20, 1));
  refused = engine->Submit(Request(4, 1, 1), never);
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("max-queue-requests 2"));
  int64_t retry_ms = 0;
  ASSERT_TRUE(refused.status().GetPayload(kRetryAfterPayload).has_value());
  ASSERT_TRUE(
      absl::SimpleAtoi(std::string(*refused.status().GetPayload(kRetryAfterPayload)), &retry_ms));
  EXPECT_GE(retry_ms, 50);
  EXPECT_EQ(engine->gauges().requests_waiting, 2u);

  blocker->release.count_down();
  EXPECT_EQ(first->Wait().reason, FinishReason::kLength);
  EXPECT_EQ(second->Wait().reason, FinishReason::kLength);
  MutexLock lock(&observer_.mutex_);
  EXPECT_EQ(observer_.rejected[static_cast<size_t>(RejectionReason::kQueueFull)], 1u);
  EXPECT_EQ(observer_.rejected[static_cast<size_t>(RejectionReason::kQueueTokens)], 1u);
  EXPECT_EQ(never->tokens().size(), 0u);
}

// Cancelled while a step runs: the next step is without it, and its memory is free by then.
TEST_F(EngineTest, CancelledLeavesBeforeTheNextStep) {
  auto engine = Make();
  auto victim = std::make_shared<BlockingSink>();
  const Engine::RequestHandle handle = engine->Submit(Request(1, 40, 200), victim).value();
  victim->entered.wait();
  auto blocker = std::make_shared<BlockingSink>();
  ASSERT_TRUE(engine->Submit(Request(2, 4, 3), blocker).ok());
  victim->release.count_down();
  blocker->entered.wait();  // in the middle of a step of both
  size_t steps = 0;
  {
    MutexLock lock(&observer_.mutex_);
    steps = observer_.history.size();
  }
  engine->Cancel(handle);
  blocker->release.count_down();
  blocker->Wait();
  MutexLock lock(&observer_.mutex_);
  ASSERT_GT(observer_.history.size(), steps + 1);
  EXPECT_EQ(observer_.history[steps].sequences, 2u);
  EXPECT_EQ(observer_.history[steps + 1].sequences, 1u);
  const double block = 1.0 / (static_cast<double>(engine->kv_capacity_tokens()) / 32);
  EXPECT_GE(observer_.history[steps].kv_usage_ratio, 2.9 * block);  // more than 40 and 4 tokens
  EXPECT_NEAR(observer_.history[steps + 1].kv_usage_ratio, 1 * block, 1e-12);
}

TEST_F(EngineTest, HigherPriorityIsAdmittedFirst) {
  auto engine = Make({.max_batch_size = 1});
  auto blocker = std::make_shared<BlockingSink>();
  ASSERT_TRUE(engine->Submit(Request(0, 4, 2), blocker).ok());
  blocker->entered.wait();
  // Each finds at its end how many ended before it.
  struct OrderSink final : GenerationSink {
    explicit OrderSink(std::atomic<int>* n) : next(n) {}
    void OnDelta(TokenDelta) override {}
    void OnFinish(GenerationResult) override {
      place = next->fetch_add(1);
      done.count_down();
    }
    std::atomic<int>* next;
    int place = -1;
    std::latch done{1};
  };
  std::atomic<int> next{0};
  std::vector<std::shared_ptr<OrderSink>> sinks;
  for (int32_t priority : {0, -1, 5, 5}) {
    sinks.push_back(std::make_shared<OrderSink>(&next));
    GenerationRequest request = Request(1, 3, 2);
    request.priority = priority;
    ASSERT_TRUE(engine->Submit(std::move(request), sinks.back()).ok());
  }
  blocker->release.count_down();
  for (auto& sink : sinks) sink->done.wait();
  EXPECT_EQ(sinks[0]->place, 2);
  EXPECT_EQ(sinks[1]->place, 3);
  EXPECT_EQ(sinks[2]->place, 0);
  EXPECT_EQ(sinks[3]->place, 1);
}

TEST_F(EngineTest, RequestsThatCanNeverFitAreRefused) {
  const size_t block = KvBlockPool::BytesPerBlock(weights_->config, kernels::DType::kF32);
  // The same bytes hold twice as many positions in bf16.
  EXPECT_EQ(
      Make({.kv_cache_bytes = 2 * block, .kv_dtype = kernels::DType::kBF16})->kv_capacity_tokens(),
      128u);
  auto engine = Make({.kv_cache_bytes = 2 * block, .kv_dtype = kernels::DType::kF32});
  EXPECT_EQ(engine->kv_capacity_tokens(), 64u);
  auto sink = std::make_shared<RecordingSink>();
  const auto refused = engine->Submit(Request(1, 60, 5), sink);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("64 tokens"));
  EXPECT_FALSE(refused.status().GetPayload(kRetryAfterPayload).has_value());
  // What fits goes through, one after the other.
  auto a = Submit(*engine, Request(2, 40, 24));
  auto b = Submit(*engine, Request(3, 40, 24));
  EXPECT_EQ(a->Wait().reason, FinishReason::kLength);
  EXPECT_EQ(b->Wait().reason, FinishReason::kLength);

  GenerationRequest bad = Request(1, 10, 5);
  bad.prompt[3] = 97;
  EXPECT_EQ(engine->Submit(bad, sink).status().code(), absl::StatusCode::kInvalidArgument);
  bad.prompt[3] = -1;
  EXPECT_EQ(engine->Submit(bad, sink).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(engine->Submit(Request(1, 0, 5), sink).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(engine->Submit(Request(1, 5, 0), sink).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(engine->Submit(Request(1, 200, 57), sink).status().code(),
            absl::StatusCode::kInvalidArgument);
  const auto refused_because = [&](auto change) {
    GenerationRequest request = Request(1, 10, 5);
    change(request);
    const absl::Status status = engine->Submit(request, sink).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  EXPECT_THAT(refused_because([](auto& r) { r.n = 0; }), HasSubstr("n: 0"));
  EXPECT_THAT(refused_because([](auto& r) { r.n = 17; }), HasSubstr("n: 17"));
  EXPECT_THAT(refused_because([](auto& r) { r.logprobs = 21; }), HasSubstr("logprobs: 21"));
  EXPECT_THAT(refused_because([](auto& r) { r.sampling.logit_bias = {{97, 1.0f}}; }),
              HasSubstr("logit_bias: 97"));
}

TEST_F(EngineTest, OptionsAreChecked) {
  WorkerPool pool(1);
  const auto create = [&](EngineOptions options) {
    return Engine::Create(weights_, tokenizer_, ComputeType::kF32, options, &pool, &observer_)
        .status();
  };
  EXPECT_THAT(std::string(create({.max_batch_size = 0}).message()), HasSubstr("max-batch-size"));
  EXPECT_THAT(std::string(create({.max_batch_size = 9, .max_batch_tokens = 8}).message()),
              HasSubstr("max-batch-tokens: 8 is below max-batch-size 9"));
  EXPECT_THAT(std::string(create({.max_queue_requests = 0}).message()),
              HasSubstr("max-queue-requests"));
  EXPECT_THAT(std::string(create({.max_queue_tokens = 0}).message()),
              HasSubstr("max-queue-tokens"));
  EXPECT_THAT(std::string(create({.kv_cache_bytes = 5}).message()), HasSubstr("kv-cache-bytes 5"));
  EXPECT_THAT(std::string(create({.ageing = absl::ZeroDuration()}).message()),
              HasSubstr("ageing-seconds: 0"));
  EXPECT_THAT(std::string(create({.max_queue_wait = absl::Milliseconds(-5)}).message()),
              HasSubstr("max-queue-ms: -5"));
  EXPECT_THAT(std::string(create({.target_itl = absl::Milliseconds(-1)}).message()),
              HasSubstr("target-itl-ms: -1"));
  weights_ = MakeSyntheticWeights(SmallConfig(), kernels::DType::kF32, 3);
  EXPECT_EQ(Engine::Create(weights_, tokenizer_, ComputeType::kBF16, {}, &pool, &observer_)
                .status()
                .code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(EngineTest, DrainFinishesOrCancels) {
  auto engine = Make();
  auto quick = Submit(*engine, Request(1, 5, 5));
  engine->BeginDrain();
  EXPECT_EQ(engine->Submit(Request(2, 5, 5), std::make_shared<RecordingSink>()).status().code(),
            absl::StatusCode::kUnavailable);
  EXPECT_TRUE(engine->FinishDrain(absl::InfiniteFuture()));
  EXPECT_EQ(quick->Wait().reason, FinishReason::kLength);

  engine = Make();
  auto blocker = std::make_shared<BlockingSink>();
  ASSERT_TRUE(engine->Submit(Request(3, 5, 200), blocker).ok());
  blocker->entered.wait();
  std::thread releaser([&] { blocker->release.count_down(); });
  EXPECT_FALSE(engine->FinishDrain(absl::InfinitePast()));
  releaser.join();
  blocker->Wait();
}

TEST_F(EngineTest, DestructionEndsWhatRuns) {
  auto engine = Make({.max_batch_size = 1});
  class SlowSink final : public RecordingSink {
    void OnDelta(TokenDelta delta) override {
      RecordingSink::OnDelta(std::move(delta));
      absl::SleepFor(absl::Milliseconds(5));
    }
  };
  auto running = std::make_shared<SlowSink>();
  ASSERT_TRUE(engine->Submit(Request(1, 5, 250), running).ok());
  auto waiting = Submit(*engine, Request(2, 5, 250));
  running->WaitForTokens(1);
  engine.reset();
  EXPECT_EQ(running->Wait().reason, FinishReason::kCancelled);
  EXPECT_EQ(waiting->Wait().reason, FinishReason::kCancelled);
}

// Each look at it takes a while.
class TickingClock final : public Clock {
 public:
  absl::Time Now() const override {
    MutexLock lock(&mutex_);
    return now_ += absl::Microseconds(100);
  }

 private:
  mutable Mutex mutex_;
  mutable absl::Time now_ ABSL_GUARDED_BY(mutex_) = absl::UnixEpoch() + absl::Hours(1);
};

TEST_F(EngineTest, DeadlinesThatCannotBeMetAreRefusedAtOnce) {
  TickingClock clock;
  auto engine = Make({.max_batch_size = 1, .clock = &clock});
  GenerationRequest request = Request(1, 10, 200);
  request.deadline = clock.Now() + absl::Milliseconds(1);
  // Nothing was measured yet: it may try.
  EXPECT_EQ(Submit(*engine, request)->Wait().reason, FinishReason::kDeadlineExceeded);
  Submit(*engine, Request(2, 10, 200))->Wait();

  request.deadline = clock.Now() + absl::Milliseconds(5);
  const auto refused = engine->Submit(request, std::make_shared<RecordingSink>()).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("would take about"));
  request.deadline = clock.Now() + absl::Hours(1);
  EXPECT_EQ(Submit(*engine, request)->Wait().reason, FinishReason::kLength);
  MutexLock lock(&observer_.mutex_);
  EXPECT_EQ(observer_.rejected[static_cast<size_t>(RejectionReason::kDeadline)], 1u);
}

// One client floods the queue; another's request is the next but one.
TEST_F(EngineTest, AFloodOfOneClientDoesNotStarveAnother) {
  auto engine = Make({.max_batch_size = 1});
  auto blocker = std::make_shared<BlockingSink>();
  ASSERT_TRUE(engine->Submit(Request(0, 4, 2), blocker).ok());
  blocker->entered.wait();
  std::atomic<int> ended{0};
  struct CountingSink final : GenerationSink {
    explicit CountingSink(std::atomic<int>* n) : ended(n) {}
    void OnDelta(TokenDelta) override {}
    void OnFinish(GenerationResult) override {
      place = ended->fetch_add(1);
      done.count_down();
    }
    std::atomic<int>* ended;
    int place = -1;
    std::latch done{1};
  };
  std::vector<std::shared_ptr<CountingSink>> sinks;
  for (uint32_t i = 0; i <= 300; ++i) {
    GenerationRequest request = Request(i, 3, 2);
    request.client = i < 300 ? "flood" : "one";
    sinks.push_back(std::make_shared<CountingSink>(&ended));
    ASSERT_TRUE(engine->Submit(std::move(request), sinks.back()).ok());
  }
  blocker->release.count_down();
  for (auto& sink : sinks) sink->done.wait();
  EXPECT_LE(sinks.back()->place, 1);
}

TEST_F(EngineTest, WatchdogSeesAStuckStep) {
  ManualClock clock;
  auto engine = Make({.clock = &clock});
  clock.Advance(absl::Hours(1));
  EXPECT_TRUE(engine->MakingProgress(absl::Seconds(1))) << "idle is not stuck";
  auto blocker = std::make_shared<BlockingSink>();
  ASSERT_TRUE(engine->Submit(Request(1, 5, 3), blocker).ok());
  blocker->entered.wait();
  EXPECT_TRUE(engine->MakingProgress(absl::Seconds(1)));
  clock.Advance(absl::Seconds(2));
  EXPECT_FALSE(engine->MakingProgress(absl::Seconds(1)));
  blocker->release.count_down();
  blocker->Wait();
}

TEST_F(EngineTest, ManyClientsSubmitAndCancelAtOnce) {
  auto engine = Make({.max_batch_size = 6, .max_batch_tokens = 40});
  std::atomic<uint64_t> ended{0};
  constexpr int kClients = 4;
  constexpr int kEach = 60;
  std::vector<std::thread> clients;
  for (int c = 0; c < kClients; ++c) {
    clients.emplace_back([&, c] {
      std::mt19937 random(static_cast<uint32_t>(c));
      for (int i = 0; i < kEach; ++i) {
        Engine::RequestHandle handle = 0;
        auto sink = Submit(*engine,
                           Request(static_cast<uint32_t>(c * 1000 + i), 1 + random() % 60,
                                   static_cast<uint32_t>(1 + random() % 20)),
                           &handle);
        if (random() % 3 == 0) {
          sink->WaitForTokens(random() % 4);
          engine->Cancel(handle);
        }
        const GenerationResult result = sink->Wait();
        EXPECT_TRUE(result.reason == FinishReason::kLength ||
                    result.reason == FinishReason::kCancelled);
        EXPECT_EQ(result.usage.generated_tokens, sink->tokens().size());
        ended.fetch_add(1);
      }
    });
  }
  for (std::thread& client : clients) client.join();
  ASSERT_TRUE(engine->FinishDrain(absl::InfiniteFuture()));
  EXPECT_EQ(ended.load(), static_cast<uint64_t>(kClients * kEach));
  EXPECT_EQ(
      observer_.Finished(FinishReason::kLength) + observer_.Finished(FinishReason::kCancelled),
      static_cast<uint64_t>(kClients * kEach));
  EXPECT_EQ(engine->gauges().kv_usage_ratio, 0.0);
  EXPECT_EQ(observer_.gauges().requests_running, 0u);
}

}  // namespace
}  // namespace firesteel
