// A storm of clients that read, dawdle, give up or run out of time, over real gRPC and in front of
// a real engine: each call ends once, and nothing stays behind.

#include <gmock/gmock.h>
#include <grpcpp/create_channel.h>
#include <gtest/gtest.h>
#include <malloc.h>
#include <spdlog/sinks/null_sink.h>

#include <chrono>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "firesteel/v1/generation_service.grpc.pb.h"
#include "runtime/model/kv_cache.h"
#include "runtime/scheduler/testing.h"
#include "runtime/threading/mutex.h"
#include "server/logging.h"
#include "server/server.h"
#include "server/test_client.h"

namespace firesteel::server {
namespace {

constexpr int kCalls = 10'000;
constexpr int kAtOnce = 64;
constexpr int kSlowAtOnce = 24;  // the others go on, and with their ends these

enum class Manner : uint8_t {
  kReads,     // as fast as it comes
  kCancels,   // after some messages, or before the first
  kDeadline,  // is short
  kSlow,      // reads a message when two other calls have ended
};

/// What the calls share. Thread-safe.
class Storm {
 public:
  class Call;

  /// Waits until there is room for one more call, which then counts.
  void WaitForRoom() {
    MutexLock lock(&mutex_);
    while (in_flight_ >= kAtOnce) changed_.Wait(&mutex_);
    ++in_flight_;
  }
  bool RoomForSlow() {
    MutexLock lock(&mutex_);
    if (slow_ >= kSlowAtOnce) return false;
    ++slow_;
    ++all_slow_;
    return true;
  }
  /// The call reads on when it is poked; false: at once.
  bool Park(Call* call) {
    MutexLock lock(&mutex_);
    if (hurry_) return false;
    parked_.push_back(call);
    return true;
  }
  void Ended(grpc::StatusCode code, int last_messages, bool slow);
  /// Nobody is slow until all have ended.
  void WaitForAll();

  std::map<grpc::StatusCode, int> codes() {
    MutexLock lock(&mutex_);
    return codes_;
  }
  int wrong_ends() {
    MutexLock lock(&mutex_);
    return wrong_ends_;
  }
  int all_slow() {
    MutexLock lock(&mutex_);
    return all_slow_;
  }

 private:
  Mutex mutex_;
  CondVar changed_;
  int in_flight_ ABSL_GUARDED_BY(mutex_) = 0;
  int slow_ ABSL_GUARDED_BY(mutex_) = 0;
  int all_slow_ ABSL_GUARDED_BY(mutex_) = 0;
  bool hurry_ ABSL_GUARDED_BY(mutex_) = false;
  std::deque<Call*> parked_ ABSL_GUARDED_BY(mutex_);
  std::map<grpc::StatusCode, int> codes_ ABSL_GUARDED_BY(mutex_);
  int wrong_ends_ ABSL_GUARDED_BY(mutex_) = 0;
};

/// One stream; deletes itself when it has ended.
class Storm::Call final : public grpc::ClientReadReactor<v1::GenerateStreamResponse> {
 public:
  Call(Storm* storm, Manner manner, v1::GenerateRequest request)
      : storm_(storm), manner_(manner), request_(std::move(request)) {}

  void Start(v1::GenerationService::Stub* stub, std::chrono::microseconds time, int cancel_after) {
    cancel_after_ = cancel_after;
    if (manner_ == Manner::kDeadline) {
      context_.set_deadline(std::chrono::system_clock::now() + time);
    }
    stub->async()->GenerateStream(&context_, &request_, this);
    // It may be parked while the call ends: until its last read it is not done.
    if (manner_ == Manner::kSlow) AddHold();
    StartRead(&message_);
    const bool at_once = manner_ == Manner::kCancels && cancel_after == 0;
    if (at_once) AddHold();
    StartCall();
    if (at_once) {
      context_.TryCancel();
      RemoveHold();
    }
  }

  void Poke() { StartRead(&message_); }

  void OnReadDone(bool ok) override {
    if (!ok) {
      if (manner_ == Manner::kSlow) RemoveHold();
      return;
    }
    if (message_.has_usage()) ++last_messages_;
    if (manner_ == Manner::kCancels && ++messages_ == cancel_after_) context_.TryCancel();
    if (manner_ == Manner::kSlow && storm_->Park(this)) return;
    StartRead(&message_);
  }

  void OnDone(const grpc::Status& status) override {
    storm_->Ended(status.error_code(), last_messages_, manner_ == Manner::kSlow);
    delete this;
  }

 private:
  Storm* const storm_;
  const Manner manner_;
  const v1::GenerateRequest request_;
  grpc::ClientContext context_;
  v1::GenerateStreamResponse message_;
  int cancel_after_ = 0;
  int messages_ = 0;
  int last_messages_ = 0;
};

void Storm::Ended(grpc::StatusCode code, int last_messages, bool slow) {
  Call* poked[2] = {};
  {
    MutexLock lock(&mutex_);
    ++codes_[code];
    // The end of a generation comes once, and always where the call succeeded.
    if (last_messages > 1 || (code == grpc::StatusCode::OK && last_messages != 1)) ++wrong_ends_;
    --in_flight_;
    if (slow) --slow_;
    for (Call*& call : poked) {
      if (parked_.empty()) break;
      call = parked_.front();
      parked_.pop_front();
    }
    changed_.NotifyAll();
  }
  for (Call* const call : poked) {
    if (call != nullptr) call->Poke();
  }
}

void Storm::WaitForAll() {
  std::deque<Call*> parked;
  {
    MutexLock lock(&mutex_);
    hurry_ = true;
    parked.swap(parked_);
  }
  for (Call* const call : parked) call->Poke();
  MutexLock lock(&mutex_);
  while (in_flight_ > 0) changed_.Wait(&mutex_);
  hurry_ = false;
}

/// A client whose window is so narrow that what a slow reader leaves stays with the server.
std::unique_ptr<v1::GenerationService::Stub> Connect(const std::string& address, bool narrow) {
  grpc::ChannelArguments arguments;
  arguments.SetInt("test.own_connection", narrow ? 1 : 0);
  if (narrow) {
    arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
    arguments.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 1024);
  }
  return v1::GenerationService::NewStub(
      grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments));
}

// In KiB, without what the allocator keeps for later.
size_t LiveRss() {
  malloc_trim(0);
  return ProcessStatus("VmRSS");
}

class StormTest : public testing::Test {
 protected:
  StormTest() {
    SetUpLogging("off", LogFormat::kText, std::make_shared<spdlog::sinks::null_sink_mt>());
    ModelConfig config = SmallConfig();
    config.eos_token_ids = {11};
    const auto weights = MakeSyntheticWeights(config, kernels::DType::kBF16, 3);
    auto metrics = std::make_unique<ServerMetrics>();
    auto observer = metrics->AddModel("m", config);
    observer->StartCounting();
    const size_t block = KvBlockPool::BytesPerBlock(config, kernels::DType::kBF16);
    auto engine = Engine::Create(weights, std::make_shared<NumberTokenizer>(), ComputeType::kF32,
                                 {.max_batch_size = 24,
                                  .max_batch_tokens = 96,
                                  .kv_cache_bytes = 120 * block,
                                  .optimistic_admission = true},
                                 &pool_, observer.get());
    EXPECT_TRUE(engine.ok()) << engine.status();
    engine_ = engine->get();
    ServedModel model;
    model.name = "m";
    model.observer = std::move(observer);
    model.engine = *std::move(engine);
    model.max_prompt_tokens = 255;
    model.max_message_bytes = 1u << 20;
    auto models = std::make_unique<ModelRegistry>();
    models->Put(std::move(model));
    auto server = Server::Start(ServerConfig(), std::move(metrics), std::move(models));
    EXPECT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
  }

  v1::GenerateRequest RandomCall(Manner manner) {
    v1::GenerateRequest request;
    const uint32_t tokens = 1 + random_() % 90;
    for (uint32_t i = 0; i < tokens; ++i) request.mutable_token_ids()->add_ids(3 + random_() % 90);
    request.set_max_tokens(1 + static_cast<uint32_t>(random_() % 30));
    request.set_n(random_() % 10 == 0 ? 1 + static_cast<uint32_t>(random_() % 4) : 1);
    request.set_priority(static_cast<int32_t>(random_() % 3));
    request.mutable_sampling()->set_seed(random_());
    if (manner == Manner::kSlow) {  // many bytes
      request.mutable_output()->set_logprobs(20);
      request.mutable_output()->set_echo(random_() % 2 == 0);
    }
    return request;
  }

  WorkerPool pool_{2};
  Engine* engine_ = nullptr;
  std::unique_ptr<Server> server_;
  std::mt19937 random_{7};
};

TEST_F(StormTest, EveryCallEndsOnceAndNothingIsLeftBehind) {
  const auto wide = Connect(server_->address(), false);
  const auto narrow = Connect(server_->address(), true);
  Storm storm;
  size_t warm_rss = 0;
  size_t warm_threads = 0;
  for (int i = 0; i < kCalls; ++i) {
    if (i == kCalls / 3) {
      storm.WaitForAll();
      warm_rss = LiveRss();
      warm_threads = ProcessStatus("Threads");
    }
    const uint32_t draw = random_() % 8;
    Manner manner = draw < 2   ? Manner::kCancels
                    : draw < 4 ? Manner::kDeadline
                    : draw < 6 ? Manner::kSlow
                               : Manner::kReads;
    storm.WaitForRoom();
    if (manner == Manner::kSlow && !storm.RoomForSlow()) manner = Manner::kReads;
    const std::chrono::microseconds time(random_() % 20'000);
    const int cancel_after = static_cast<int>(random_() % 4);
    auto* const call = new Storm::Call(&storm, manner, RandomCall(manner));
    call->Start(manner == Manner::kSlow ? narrow.get() : wide.get(), time, cancel_after);
  }
  storm.WaitForAll();

  int ended = 0;
  for (const auto& [code, count] : storm.codes()) {
    ended += count;
    EXPECT_THAT(code, testing::AnyOf(grpc::StatusCode::OK, grpc::StatusCode::CANCELLED,
                                     grpc::StatusCode::DEADLINE_EXCEEDED));
    EXPECT_GT(count, 300) << code;
  }
  EXPECT_EQ(ended, kCalls);
  EXPECT_EQ(storm.wrong_ends(), 0);
  EXPECT_GT(storm.all_slow(), 300);
  // What clients gave up leaves by itself.
  ASSERT_TRUE(engine_->FinishDrain(absl::InfiniteFuture()));
  EXPECT_EQ(engine_->gauges().requests_running, 0u);
  EXPECT_EQ(engine_->gauges().requests_waiting, 0u);
  EXPECT_EQ(engine_->gauges().kv_usage_ratio, 0.0);
  const size_t rss = LiveRss();
  RecordProperty("slow_calls", storm.all_slow());
  RecordProperty("warm_rss_kib", static_cast<int>(warm_rss));
  RecordProperty("rss_growth_kib", static_cast<int>(rss) - static_cast<int>(warm_rss));
  RecordProperty("thread_growth",
                 static_cast<int>(ProcessStatus("Threads")) - static_cast<int>(warm_threads));
  if (!kSanitized) {
    // A hundredth of the bundled model's server; this process is so small that the allocator's
    // fragments weigh more than a hundredth. What each call leaked would be thousands of times
    // that.
    EXPECT_LE(rss, warm_rss + 1024);
  }
  EXPECT_LE(ProcessStatus("Threads"), warm_threads + 2) << "gRPC adds some where all are busy";
  // Many are given up before the server has read what they ask for.
  EXPECT_THAT(HttpGet(server_->metrics_address(), "/metrics"),
              testing::AllOf(testing::HasSubstr("grpc_code=\"Canceled\""),
                             testing::Not(testing::HasSubstr("grpc_code=\"InvalidArgument\""))));
  EXPECT_TRUE(server_->Stop(absl::ZeroDuration(), absl::Minutes(1)));
}

}  // namespace
}  // namespace firesteel::server
