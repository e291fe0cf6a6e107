// The promises of the engine, each with something that tries to break it.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <deque>
#include <random>
#include <string>
#include <vector>

#include "runtime/model/kv_cache.h"
#include "runtime/scheduler/testing.h"

namespace firesteel {
namespace {

ModelConfig LongContext() {
  ModelConfig config = SmallConfig();
  config.max_position_embeddings = 768;
  config.eos_token_ids = {11};
  return config;
}

/// Ignores what the small model does, so that any can be observed.
class NullObserver final : public EngineObserver {
 public:
  void OnRejected(RejectionReason) override {}
  void OnStep(const StepReport& report) override { preemptions += report.preemptions; }
  void OnFinish(const FinishReport&) override { ++finished; }
  void OnGauges(const EngineGauges&) override {}
  std::atomic<uint64_t> preemptions{0};
  std::atomic<uint64_t> finished{0};
};

// Everything that a client sees of one request.
struct Answer {
  FinishReason reason;
  std::vector<RecordingSink::Output> sequences;
  std::vector<TokenLogprob> prompt;
};

bool SameLogprobs(const std::vector<TokenLogprob>& a, const std::vector<TokenLogprob>& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i].token_id != b[i].token_id || a[i].alternatives.size() != b[i].alternatives.size() ||
        std::memcmp(&a[i].logprob, &b[i].logprob, sizeof(float)) != 0) {
      return false;
    }
    for (size_t j = 0; j < a[i].alternatives.size(); ++j) {
      if (a[i].alternatives[j].token_id != b[i].alternatives[j].token_id ||
          a[i].alternatives[j].logprob != b[i].alternatives[j].logprob) {
        return false;
      }
    }
  }
  return true;
}

bool Same(const Answer& a, const Answer& b) {
  if (a.reason != b.reason || a.sequences.size() != b.sequences.size() ||
      !SameLogprobs(a.prompt, b.prompt)) {
    return false;
  }
  for (size_t i = 0; i < a.sequences.size(); ++i) {
    const auto &x = a.sequences[i], &y = b.sequences[i];
    if (x.tokens != y.tokens || x.text != y.text || !SameLogprobs(x.logprobs, y.logprobs) ||
        x.end->reason != y.end->reason || x.end->stop_match != y.end->stop_match) {
      return false;
    }
  }
  return true;
}

// The i-th of 200 requests: prompts of 1 to 500 tokens, every third with one of three beginnings of
// 300, drawn and stopped in every way there is.
GenerationRequest VariedRequest(uint32_t i) {
  std::mt19937 random(1000 + i);
  GenerationRequest request = RandomRequest(i, 1 + random() % 120, 1 + random() % 24);
  if (i % 3 == 0) {
    const std::vector<int32_t> beginning = RandomRequest(5000 + i % 9, 300, 1).prompt;
    request.prompt.insert(request.prompt.begin(), beginning.begin(), beginning.end());
  }
  request.n = i % 11 == 0 ? 2 : 1;
  request.sampling.temperature = std::vector<float>{1.0f, 0.0f, 0.7f, 1.4f}[i % 4];
  request.sampling.top_k = i % 5 == 1 ? 20 : 0;
  request.sampling.top_p = i % 6 == 2 ? 0.9f : 1.0f;
  request.sampling.min_p = i % 7 == 3 ? 0.05f : 0.0f;
  if (i % 8 == 4) request.sampling.repetition_penalty = 1.2f;
  if (i % 9 == 5) request.sampling.frequency_penalty = 0.3f;
  if (i % 10 == 6) request.sampling.logit_bias = {{20, 1.5f}, {30, -3.0f}};
  request.stopping.ignore_eos = i % 2 == 0;
  if (i % 12 == 7) request.stopping.stop = {"<4", "7>"};
  if (i % 13 == 8) request.stopping.min_tokens = request.max_tokens / 2;
  if (i % 5 == 2) request.logprobs = i % 4;
  request.prompt_logprobs = i % 17 == 9;
  return request;
}

struct Way {
  const char* name;
  EngineOptions options;
  size_t threads = 1;
  size_t at_once = 1;        // requests in flight
  bool whole_chunks = true;  // beside decodes, too, whatever that costs them
};

class IdenticalOutputTest : public ::testing::TestWithParam<ComputeType> {};

TEST_P(IdenticalOutputTest, TwoHundredRequestsInEveryCompany) {
  constexpr uint32_t kRequests = 200;
  const kernels::DType dtype =
      GetParam() == ComputeType::kInteger ? kernels::DType::kI8 : kernels::DType::kBF16;
  const auto weights = MakeSyntheticWeights(LongContext(), dtype, 3);
  const auto tokenizer = std::make_shared<NumberTokenizer>();
  const size_t block = KvBlockPool::BytesPerBlock(weights->config, kernels::DType::kBF16);
  NullObserver observer;
  const auto run = [&](const Way& way) {
    WorkerPool pool(way.threads);
    EngineOptions options = way.options;
    if (way.whole_chunks) options.target_itl = absl::Minutes(1);
    auto engine =
        std::move(Engine::Create(weights, tokenizer, GetParam(), options, &pool, &observer))
            .value();
    std::vector<std::shared_ptr<RecordingSink>> sinks;
    for (uint32_t i = 0; i < kRequests; ++i) {
      if (i >= way.at_once) sinks[i - way.at_once]->Wait();
      sinks.push_back(std::make_shared<RecordingSink>());
      const auto submitted = engine->Submit(VariedRequest(i), sinks.back());
      EXPECT_TRUE(submitted.ok()) << submitted.status();
    }
    std::vector<Answer> answers;
    for (auto& sink : sinks) {
      const FinishReason reason = sink->Wait().reason;
      answers.push_back({reason, sink->sequences(), sink->prompt_logprobs()});
    }
    EXPECT_TRUE(engine->FinishDrain(absl::InfiniteFuture()));
    EXPECT_EQ(engine->gauges().kv_usage_ratio, 0.0) << way.name;
    return answers;
  };
  const std::vector<Answer> alone =
      run({"alone", {.max_batch_size = 2, .max_batch_tokens = 512, .prefix_cache = false}});
  EXPECT_FALSE(Same(alone[1], alone[2])) << "the comparison can fail";
  const std::vector<Way> ways = {
      {"alone, prompts shared", {.max_batch_size = 2, .max_batch_tokens = 512}, 1, 1},
      {"two, chunks of 16", {.max_batch_size = 2, .max_batch_tokens = 16}, 1, 2},
      {"two threads, chunks of 64, nothing shared",
       {.max_batch_size = 5, .max_batch_tokens = 64, .prefix_cache = false},
       2,
       5},
      {"eight, two threads, chunks of 33", {.max_batch_size = 8, .max_batch_tokens = 33}, 2, 8},
      {"sixteen, chunks of 128", {.max_batch_size = 16, .max_batch_tokens = 128}, 1, 16},
      {"thirty-two, two threads, chunks of 512",
       {.max_batch_size = 32, .max_batch_tokens = 512},
       2,
       32},
      {"thirty-two, nothing shared, chunks of 100",
       {.max_batch_size = 32, .max_batch_tokens = 100, .prefix_cache = false},
       2,
       200},
      {"twelve, chunks as decodes allow", {.max_batch_size = 12}, 2, 12, false},
      {"all at once, preempted",
       {.max_batch_size = 32,
        .max_batch_tokens = 48,
        .kv_cache_bytes = 34 * block,
        .optimistic_admission = true},
       2,
       200},
  };
  const auto check = [&](const Way& way) {
    const std::vector<Answer> answers = run(way);
    for (uint32_t i = 0; i < kRequests; ++i) {
      EXPECT_TRUE(Same(answers[i], alone[i])) << way.name << ", request " << i;
    }
  };
  for (const Way& way : ways) check(way);
  // Where this thread hardly runs, requests may come one by one and preempt nobody.
  for (int more = 0; more < 4 && observer.preemptions.load() == 0; ++more) check(ways.back());
  EXPECT_GT(observer.preemptions.load(), 0u) << "the last way was to preempt";
}

INSTANTIATE_TEST_SUITE_P(ComputeTypes, IdenticalOutputTest,
                         ::testing::Values(ComputeType::kF32, ComputeType::kBF16,
                                           ComputeType::kInteger),
                         [](const auto& param) {
                           return std::string(ComputeTypeName(param.param));
                         });

// Ends exactly once, counts, and gives a slot back.
class StormSink final : public GenerationSink {
 public:
  struct Shared {
    Mutex mutex;
    CondVar changed;
    int in_flight ABSL_GUARDED_BY(mutex) = 0;
    std::atomic<uint64_t> ended[kNumFinishReasons] = {};
    std::atomic<uint64_t> twice{0};
  };
  explicit StormSink(Shared* shared) : shared_(shared) {}
  void OnDelta(TokenDelta) override {
    if (finished_.load()) ++shared_->twice;
  }
  void OnFinish(GenerationResult result) override {
    if (finished_.exchange(true)) ++shared_->twice;
    ++shared_->ended[static_cast<size_t>(result.reason)];
    MutexLock lock(&shared_->mutex);
    --shared_->in_flight;
    shared_->changed.NotifyAll();
  }

 private:
  Shared* const shared_;
  std::atomic<bool> finished_{false};
};

TEST(CancelStorm, TenThousandRequestsEndOnceAndLeaveNothingBehind) {
  const auto weights = MakeSyntheticWeights(LongContext(), kernels::DType::kBF16, 3);
  const size_t block = KvBlockPool::BytesPerBlock(weights->config, kernels::DType::kBF16);
  NullObserver observer;
  WorkerPool pool(2);
  auto engine =
      std::move(Engine::Create(weights, std::make_shared<NumberTokenizer>(), ComputeType::kF32,
                               {.max_batch_size = 24,
                                .max_batch_tokens = 96,
                                .kv_cache_bytes = 120 * block,
                                .optimistic_admission = true},
                               &pool, &observer))
          .value();
  constexpr int kRequests = 10000;
  constexpr int kAtOnce = 64;
  const size_t threads_before = ProcessStatus("Threads");
  size_t warm_rss = 0;
  StormSink::Shared shared;
  uint64_t accepted = 0;
  uint64_t refused = 0;
  std::mt19937 random(7);
  std::deque<Engine::RequestHandle> handles;  // the latest: more would count as growth
  for (int i = 0; i < kRequests; ++i) {
    if (i == kRequests / 3) warm_rss = ProcessStatus("VmRSS");
    {
      MutexLock lock(&shared.mutex);
      while (shared.in_flight >= kAtOnce) shared.changed.Wait(&shared.mutex);
      ++shared.in_flight;
    }
    GenerationRequest request =
        RandomRequest(static_cast<uint32_t>(i % 50), 1 + random() % 90, 1 + random() % 30);
    request.client = std::to_string(random() % 5);
    request.priority = static_cast<int32_t>(random() % 3);
    request.n = random() % 10 == 0 ? 1 + random() % 4 : 1;
    request.prompt_logprobs = random() % 20 == 0;
    if (random() % 4 == 0) {
      request.deadline = Clock::Real()->Now() + absl::Microseconds(random() % 20000);
    }
    const auto submitted = engine->Submit(std::move(request), std::make_shared<StormSink>(&shared));
    if (submitted.ok()) {
      ++accepted;
      handles.push_back(*submitted);
      if (handles.size() > 100) handles.pop_front();
    } else {
      EXPECT_EQ(submitted.status().code(), absl::StatusCode::kDeadlineExceeded);
      ++refused;
      MutexLock lock(&shared.mutex);
      --shared.in_flight;
    }
    // One in three is cancelled, at once, while it runs or when it is long gone.
    if (random() % 3 == 0 && !handles.empty()) {
      engine->Cancel(handles[random() % handles.size()]);
    }
  }
  ASSERT_TRUE(engine->FinishDrain(absl::InfiniteFuture()));
  uint64_t ended = 0;
  for (const auto& count : shared.ended) ended += count.load();
  EXPECT_EQ(ended, accepted);
  EXPECT_EQ(observer.finished.load(), accepted);
  EXPECT_EQ(accepted + refused, static_cast<uint64_t>(kRequests));
  EXPECT_EQ(shared.twice.load(), 0u);
  for (const FinishReason reason : {FinishReason::kLength, FinishReason::kCancelled}) {
    EXPECT_GT(shared.ended[static_cast<size_t>(reason)].load(), 500u);
  }
  EXPECT_EQ(shared.ended[static_cast<size_t>(FinishReason::kError)].load(), 0u);
  EXPECT_EQ(engine->gauges().kv_usage_ratio, 0.0);
  EXPECT_EQ(engine->gauges().requests_waiting, 0u);
  EXPECT_EQ(ProcessStatus("Threads"), threads_before);
  const size_t rss = ProcessStatus("VmRSS");
  RecordProperty("rss_growth_kib", static_cast<int>(rss) - static_cast<int>(warm_rss));
  if (!kSanitized) {  // sanitizers hold freed memory back
    EXPECT_LE(static_cast<double>(rss), 1.01 * static_cast<double>(warm_rss));
  }
}

}  // namespace
}  // namespace firesteel
