// What tests of the engine share: a small model, sinks and observers that remember.

#ifndef FIRESTEEL_RUNTIME_SCHEDULER_TESTING_H_
#define FIRESTEEL_RUNTIME_SCHEDULER_TESTING_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <latch>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "runtime/model/synthetic.h"
#include "runtime/scheduler/engine.h"
#include "runtime/threading/mutex.h"

namespace firesteel {

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define FIRESTEEL_SANITIZED 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define FIRESTEEL_SANITIZED 1
#endif
// Sanitizers hold freed memory back.
#ifdef FIRESTEEL_SANITIZED
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

// A number of /proc/self/status: "VmRSS" in KiB, "Threads".
inline size_t ProcessStatus(const std::string& key) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind(key + ":", 0) == 0) return std::stoul(line.substr(key.size() + 1));
  }
  return 0;
}

inline ModelConfig SmallConfig() {
  ModelConfig c = *NamedShape("spark-stories");
  c.vocab_size = 97;
  c.hidden_size = 64;
  c.intermediate_size = 256;
  c.num_layers = 2;
  c.num_heads = 4;
  c.num_kv_heads = 2;
  c.head_dim = 16;
  c.sliding_window = 24;
  c.max_position_embeddings = 256;
  c.layer_types.resize(2);
  c.ffn_predictor_dim = 32;
  c.ffn_top_k = 20;
  c.attention_predictor_dim = 8;
  c.attention_top_k = 8;
  return c;
}

// Token 7 is "<7>".
class NumberTokenizer final : public Tokenizer {
 public:
  explicit NumberTokenizer(int vocab = 97) {
    for (int i = 0; i < vocab; ++i) bytes_.push_back("<" + std::to_string(i) + ">");
  }
  absl::StatusOr<std::vector<int32_t>> EncodePrompt(absl::string_view) const override {
    return std::vector<int32_t>{2};
  }
  const std::string& TokenBytes(int32_t token) const override {
    return bytes_[static_cast<size_t>(token)];
  }

 private:
  std::vector<std::string> bytes_;
};

class ManualClock final : public Clock {
 public:
  absl::Time Now() const override {
    MutexLock lock(&mutex_);
    return now_;
  }
  void Advance(absl::Duration d) {
    MutexLock lock(&mutex_);
    now_ += d;
  }

 private:
  mutable Mutex mutex_;
  absl::Time now_ ABSL_GUARDED_BY(mutex_) = absl::UnixEpoch() + absl::Hours(1);
};

class RecordingSink : public GenerationSink {
 public:
  void OnDelta(TokenDelta delta) override {
    MutexLock lock(&mutex_);
    EXPECT_FALSE(finished_) << "a delta behind the end";
    if (sequences_.size() <= delta.index) sequences_.resize(delta.index + 1);
    Output& out = sequences_[delta.index];
    EXPECT_FALSE(out.end.has_value()) << "a delta behind the end of its sequence";
    out.text += delta.text;
    out.tokens.insert(out.tokens.end(), delta.token_ids.begin(), delta.token_ids.end());
    out.logprobs.insert(out.logprobs.end(), delta.logprobs.begin(), delta.logprobs.end());
    out.end = delta.end;
    changed_.NotifyAll();
  }
  void OnPromptLogprobs(std::vector<TokenLogprob> logprobs) override {
    MutexLock lock(&mutex_);
    EXPECT_FALSE(finished_);
    EXPECT_TRUE(sequences_[0].tokens.empty()) << "the prompt's scores come first";
    prompt_logprobs_.insert(prompt_logprobs_.end(), logprobs.begin(), logprobs.end());
  }
  void OnFinish(GenerationResult result) override {
    {
      MutexLock lock(&mutex_);
      result_ = std::move(result);
      finished_ = true;
      changed_.NotifyAll();
    }
    ASSERT_FALSE(done_.try_wait()) << "ended twice";
    done_.count_down();
  }
  GenerationResult Wait() {
    done_.wait();
    MutexLock lock(&mutex_);
    return result_;
  }
  // Waits for the first `n` tokens, or for the end.
  void WaitForTokens(size_t n) {
    MutexLock lock(&mutex_);
    while (sequences_[0].tokens.size() < n && !finished_) changed_.Wait(&mutex_);
  }
  // What came of one sequence.
  struct Output {
    std::vector<int32_t> tokens;
    std::string text;
    std::vector<TokenLogprob> logprobs;
    std::optional<SequenceEnd> end;
  };
  std::vector<Output> sequences() {
    MutexLock lock(&mutex_);
    return sequences_;
  }
  std::vector<int32_t> tokens() { return sequences()[0].tokens; }
  std::string text() { return sequences()[0].text; }
  std::string stop_match() { return sequences()[0].end.value_or(SequenceEnd()).stop_match; }
  std::vector<TokenLogprob> prompt_logprobs() {
    MutexLock lock(&mutex_);
    return prompt_logprobs_;
  }

 private:
  Mutex mutex_;
  CondVar changed_;
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<Output> sequences_ ABSL_GUARDED_BY(mutex_) = std::vector<Output>(1);
  std::vector<TokenLogprob> prompt_logprobs_ ABSL_GUARDED_BY(mutex_);
  GenerationResult result_ ABSL_GUARDED_BY(mutex_);
  std::latch done_{1};
};

// Holds the engine's thread at its first delta until released, so that what a test does meanwhile
// does so on any machine.
class BlockingSink final : public RecordingSink {
 public:
  void OnDelta(TokenDelta delta) override {
    RecordingSink::OnDelta(std::move(delta));
    if (!std::exchange(first_, false)) return;
    entered.count_down();
    release.wait();
  }
  std::latch entered{1};
  std::latch release{1};

 private:
  bool first_ = true;
};

class CountingObserver final : public EngineObserver {
 public:
  void OnRejected(RejectionReason reason) override {
    MutexLock lock(&mutex_);
    ++rejected[static_cast<size_t>(reason)];
  }
  void OnStep(const StepReport& report) override {
    MutexLock lock(&mutex_);
    history.push_back({report.sequences, report.kv_usage_ratio});
    prefix_queries += report.prefix_cache_queries;
    prefix_hits += report.prefix_cache_hits;
    preemptions += report.preemptions;
    prefill_tokens += report.prefill_tokens;
    decode_tokens += report.decode_tokens;
    largest_step = std::max(largest_step, report.prefill_tokens + report.decode_tokens);
    largest_batch = std::max(largest_batch, report.sequences);
    first_tokens += report.times_to_first_token.size();
    later_tokens += report.inter_token_latencies.size();
    EXPECT_EQ(report.layers.size(), 2u);
    EXPECT_EQ(report.layers[0].rows.size(), report.prefill_tokens + report.decode_tokens);
    EXPECT_GT(report.flops_performed, 0);
    // Rows may together need every neuron; a lone one never does.
    const bool alone = report.layers[0].rows.size() == 1;
    EXPECT_TRUE(report.weight_bytes_skipped > 0 || (report.weight_bytes_skipped == 0 && !alone));
  }
  void OnFinish(const FinishReport& report) override {
    MutexLock lock(&mutex_);
    ++finished[static_cast<size_t>(report.reason)];
  }
  void OnGauges(const EngineGauges& gauges) override {
    MutexLock lock(&mutex_);
    last = gauges;
  }
  EngineGauges gauges() {
    MutexLock lock(&mutex_);
    return last;
  }
  uint64_t Finished(FinishReason reason) {
    MutexLock lock(&mutex_);
    return finished[static_cast<size_t>(reason)];
  }

  Mutex mutex_;
  uint64_t rejected[kNumRejectionReasons] = {};
  uint64_t finished[kNumFinishReasons] = {};
  struct Step {
    uint32_t sequences;
    double kv_usage_ratio;
  };
  std::vector<Step> history;
  uint64_t prefill_tokens = 0;
  uint64_t decode_tokens = 0;
  uint64_t prefix_queries = 0;
  uint64_t prefix_hits = 0;
  uint64_t preemptions = 0;
  uint32_t largest_step = 0;
  uint32_t largest_batch = 0;
  uint64_t first_tokens = 0;
  uint64_t later_tokens = 0;
  EngineGauges last;
};

// A prompt of random tokens, drawn by temperature 1.
inline GenerationRequest RandomRequest(uint32_t seed, size_t prompt, uint32_t max_tokens) {
  GenerationRequest request;
  std::mt19937 random(seed);
  for (size_t i = 0; i < prompt; ++i) {
    request.prompt.push_back(static_cast<int32_t>(3 + random() % 90));
  }
  request.max_tokens = max_tokens;
  request.sampling.seed = seed;
  request.stopping.ignore_eos = true;
  return request;
}

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_SCHEDULER_TESTING_H_
