#include "tools/client/load_generator.h"

#include <algorithm>
#include <chrono>
#include <deque>
#include <random>
#include <set>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "firesteel/v1/generation_service.grpc.pb.h"
#include "grpcpp/support/client_callback.h"
#include "tools/client/format.h"

namespace firesteel::client {
namespace {

using SteadyClock = std::chrono::steady_clock;

constexpr absl::Duration kGlance = absl::Milliseconds(100);  // at interrupts and the progress line
// Closed loop: so long a failed request keeps its place, or a server that refuses at once would be
// asked as fast as this client can.
constexpr double kRestSeconds = 0.1;

/// The requests that are open, and the records of those that have ended. Thread-safe.
class Calls {
 public:
  Calls(const std::shared_ptr<grpc::Channel>& channel, const LoadTraffic& traffic)
      : traffic_(traffic),
        stub_(v1::GenerationService::NewStub(channel)),
        start_(SteadyClock::now()) {}

  /// Seconds since the start.
  double Now() const { return std::chrono::duration<double>(SteadyClock::now() - start_).count(); }

  void Start(uint64_t number, double due, bool measured) ABSL_LOCKS_EXCLUDED(mutex_);
  void AddNotSent(double due, bool measured) ABSL_LOCKS_EXCLUDED(mutex_);
  void CancelAll() ABSL_LOCKS_EXCLUDED(mutex_);

  /// Waits until `time`, or until fewer than `below` are open, but never long.
  void Wait(double time, uint64_t below) ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    const auto ready = [this, below]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return open_ < below; };
    mutex_.AwaitWithTimeout(absl::Condition(&ready),
                            std::min(kGlance, absl::Seconds(std::max(0.0, time - Now()))));
  }

  LoadProgress progress() ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    while (!resting_until_.empty() && resting_until_.front() <= Now()) resting_until_.pop_front();
    return {.seconds = Now(),
            .open = open_,
            .resting = resting_until_.size(),
            .succeeded = succeeded_,
            .failed = records_.size() - succeeded_};
  }

  /// REQUIRES: none is open.
  std::vector<LoadRecord> TakeRecords() ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    return std::move(records_);
  }

 private:
  class Call;
  void Forget(Call* call) ABSL_LOCKS_EXCLUDED(mutex_);
  void Ended(LoadRecord record) ABSL_LOCKS_EXCLUDED(mutex_);

  const LoadTraffic& traffic_;
  const std::unique_ptr<v1::GenerationService::Stub> stub_;
  const SteadyClock::time_point start_;

  absl::Mutex mutex_;
  std::set<Call*> cancellable_ ABSL_GUARDED_BY(mutex_);
  uint64_t open_ ABSL_GUARDED_BY(mutex_) = 0;
  std::vector<LoadRecord> records_ ABSL_GUARDED_BY(mutex_);
  std::deque<double> resting_until_ ABSL_GUARDED_BY(mutex_);
  uint64_t succeeded_ ABSL_GUARDED_BY(mutex_) = 0;
};

/// One stream; destroys itself when it has ended. gRPC calls one method at a time.
class Calls::Call final : public grpc::ClientReadReactor<v1::GenerateStreamResponse> {
 public:
  Call(Calls* calls, v1::GenerateRequest request, double due, bool measured)
      : calls_(calls), request_(std::move(request)) {
    record_.due = due;
    record_.measured = measured;
    calls->traffic_.prepare(context_);
  }

  void Start() {
    calls_->stub_->async()->GenerateStream(&context_, &request_, this);
    StartRead(&message_);
    StartCall();
  }

  void Cancel() { context_.TryCancel(); }

  void OnReadDone(bool ok) override {
    if (!ok) return;
    Note();
    StartRead(&message_);
  }

  void OnDone(const grpc::Status& status) override {
    record_.end = calls_->Now();
    record_.code = status.error_code();
    record_.message = status.error_message();
    Calls* const calls = calls_;
    LoadRecord record = std::move(record_);
    calls->Forget(this);
    // Before the end is known: this context holds the channel, and were its last reference dropped
    // in one of gRPC's own threads, gRPC would wait for that thread in itself.
    delete this;
    calls->Ended(std::move(record));
  }

 private:
  void Note() {
    const v1::Sequence& sequence = message_.sequence();
    if (sequence.finish_reason() != v1::FINISH_REASON_UNSPECIFIED) {
      record_.finish_reason = sequence.finish_reason();
    }
    if (const int tokens = sequence.token_ids_size(); tokens > 0) NoteTokens(tokens);
    if (!message_.has_usage()) return;
    record_.prompt_tokens = message_.usage().prompt_tokens();
    record_.generated_tokens = message_.usage().generated_tokens();
    record_.queue_seconds = absl::ToDoubleSeconds(ToDuration(message_.timings().queue()));
    const v1::Sparsity& sparsity = message_.sparsity();
    record_.ffn_active_fraction = sparsity.ffn_active_fraction();
    record_.attended_positions = sparsity.attention_attended_positions();
    record_.attended_fraction = sparsity.attention_attended_fraction();
    record_.flops_skipped_fraction = sparsity.flops_skipped_fraction();
  }

  void NoteTokens(int tokens) {
    const double now = calls_->Now();
    int waits = tokens;
    if (record_.generated_tokens == 0) {
      record_.first = last_ = now;
      --waits;
    }
    const auto wait = static_cast<float>((now - last_) / tokens);
    record_.inter_token.insert(record_.inter_token.end(), static_cast<size_t>(waits), wait);
    record_.generated_tokens += static_cast<uint32_t>(tokens);
    last_ = now;
  }

  Calls* const calls_;
  const v1::GenerateRequest request_;
  grpc::ClientContext context_;
  v1::GenerateStreamResponse message_;
  LoadRecord record_;
  double last_ = 0;  // when tokens came last
};

void Calls::Start(uint64_t number, double due, bool measured) {
  auto* const call = new Call(this, traffic_.request(number), due, measured);
  {
    absl::MutexLock lock(&mutex_);
    cancellable_.insert(call);
    ++open_;
  }
  call->Start();
}

void Calls::AddNotSent(double due, bool measured) {
  LoadRecord record;
  record.due = record.end = due;
  record.measured = measured;
  record.not_sent = true;
  record.code = grpc::StatusCode::RESOURCE_EXHAUSTED;
  record.message = "too many requests were open in this client";
  absl::MutexLock lock(&mutex_);
  records_.push_back(std::move(record));
}

void Calls::CancelAll() {
  absl::MutexLock lock(&mutex_);
  for (Call* const call : cancellable_) call->Cancel();
}

void Calls::Forget(Call* call) {
  absl::MutexLock lock(&mutex_);
  cancellable_.erase(call);
}

void Calls::Ended(LoadRecord record) {
  absl::MutexLock lock(&mutex_);
  --open_;
  if (record.code == grpc::StatusCode::OK) {
    ++succeeded_;
  } else {
    resting_until_.push_back(record.end + kRestSeconds);
  }
  records_.push_back(std::move(record));
}

/// When the next request is due.
class Pace {
 public:
  explicit Pace(const LoadPlan& plan) : plan_(plan), random_(plan.seed) {}

  bool open_loop() const { return plan_.concurrency == 0; }
  double due() const { return due_; }

  void Advance() {
    due_ +=
        plan_.poisson ? std::exponential_distribution<double>(plan_.rate)(random_) : 1 / plan_.rate;
  }

 private:
  const LoadPlan& plan_;
  std::mt19937_64 random_;
  double due_ = 0;
};

}  // namespace

std::vector<LoadRecord> GenerateLoad(const std::shared_ptr<grpc::Channel>& channel,
                                     const LoadPlan& plan, const LoadTraffic& traffic,
                                     const std::function<bool()>& interrupted,
                                     const std::function<void(const LoadProgress&)>& progress) {
  Calls calls(channel, traffic);
  Pace pace(plan);
  const double warm_up = absl::ToDoubleSeconds(plan.warm_up);
  const double end = warm_up + absl::ToDoubleSeconds(plan.duration);
  uint64_t number = 0, measured = 0;
  bool sending = true, cancelled = false;
  while (true) {
    const LoadProgress now = calls.progress();
    if (progress != nullptr) progress(now);
    if (!cancelled && interrupted()) {
      sending = false;
      cancelled = true;
      calls.CancelAll();
    }
    const double due = pace.open_loop() ? pace.due() : now.seconds;
    if (due >= end || (plan.max_requests > 0 && measured >= plan.max_requests)) sending = false;
    if (!sending) {
      if (now.open == 0) break;
      calls.Wait(now.seconds + 1, 1);
    } else if (pace.open_loop() && due > now.seconds) {
      calls.Wait(due, 0);
    } else if (!pace.open_loop() && now.open + now.resting >= plan.concurrency) {
      calls.Wait(end, plan.concurrency - std::min<uint64_t>(now.resting, plan.concurrency));
    } else {
      const bool counts = due >= warm_up;
      if (pace.open_loop() && now.open >= plan.max_open) {
        calls.AddNotSent(due, counts);
      } else {
        calls.Start(number++, due, counts);
      }
      if (counts) ++measured;
      if (pace.open_loop()) pace.Advance();
    }
  }
  return calls.TakeRecords();
}

}  // namespace firesteel::client
