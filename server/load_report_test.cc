#include "server/load_report.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <ctime>
#include <future>
#include <set>

#include "server/server_fixture.h"

// The trailing metadata itself can't be seen from here: gRPC's C++ client keeps it for its own
// balancing. The test of Node's client reads it (foreign/node_test.js).

namespace firesteel::server {
namespace {

using ::testing::Pair;
using ::testing::UnorderedElementsAre;

class FixedClock final : public Clock {
 public:
  absl::Time Now() const override { return now; }
  absl::Time now = absl::FromUnixSeconds(1'000'000);
};

const grpc::Status kOk;
const grpc::Status kFull(grpc::StatusCode::RESOURCE_EXHAUSTED, "full");
const grpc::Status kWrong(grpc::StatusCode::INVALID_ARGUMENT, "wrong");

class LoadMonitorTest : public testing::Test {
 protected:
  LoadMonitorTest()
      : health_(&models_, absl::Seconds(30)), monitor_(&models_, &health_, 2, &clock_) {}

  v1::GetLoadResponse LoadAfter(absl::Duration time) {
    clock_.now += time;
    return monitor_.Load();
  }
  void Count(int calls, const grpc::Status& status) {
    for (int i = 0; i < calls; ++i) monitor_.CountCall(status);
  }

  ModelRegistry models_;
  HealthMonitor health_;
  FixedClock clock_;
  LoadMonitor monitor_;
};

TEST_F(LoadMonitorTest, RatesAreOfTheLastTenSeconds) {
  Count(20, kOk);
  EXPECT_EQ(LoadAfter(absl::Milliseconds(999)).requests_per_second(), 0) << "too early to say";
  EXPECT_EQ(LoadAfter(absl::Milliseconds(1)).requests_per_second(), 20);
  Count(1'000, kOk);
  EXPECT_EQ(LoadAfter(absl::Milliseconds(500)).requests_per_second(), 20)
      << "looked at once a second";
  EXPECT_EQ(LoadAfter(absl::Milliseconds(500)).requests_per_second(), 510);
  for (int i = 0; i < 9; ++i) LoadAfter(absl::Seconds(1));
  EXPECT_EQ(LoadAfter(absl::Seconds(1)).requests_per_second(), 0) << "long ago";
}

TEST_F(LoadMonitorTest, OnlyTheServersFaultsAreErrors) {
  Count(6, kOk);
  Count(3, kFull);
  Count(1, kWrong);
  const v1::GetLoadResponse load = LoadAfter(absl::Seconds(2));
  EXPECT_EQ(load.requests_per_second(), 5);
  EXPECT_EQ(load.errors_per_second(), 1.5);
}

TEST_F(LoadMonitorTest, EachCodeIsTheServersFaultOrNot) {
  using grpc::StatusCode;
  const std::set<StatusCode> faults = {StatusCode::RESOURCE_EXHAUSTED, StatusCode::UNAVAILABLE,
                                       StatusCode::INTERNAL, StatusCode::UNKNOWN,
                                       StatusCode::DATA_LOSS};
  LoadAfter(absl::Seconds(1));
  for (int i = StatusCode::OK; i <= StatusCode::UNAUTHENTICATED; ++i) {
    const auto code = static_cast<StatusCode>(i);
    LoadAfter(absl::Seconds(10));  // forgets the ones before
    Count(10, grpc::Status(code, ""));
    EXPECT_EQ(LoadAfter(absl::Seconds(10)).errors_per_second(), faults.contains(code) ? 1 : 0) << i;
  }
}

TEST_F(LoadMonitorTest, CpuTimeIsAPartOfWhatTheThreadsHave) {
  // This process is busy for a moment that the clock takes for a second.
  const auto cpu = [] { return static_cast<double>(clock()) / CLOCKS_PER_SEC; };
  const double begin = cpu();
  while (cpu() - begin < 0.05) {
  }
  const double used = LoadAfter(absl::Seconds(1)).cpu_utilization() * 2;
  EXPECT_GE(used, 0.05);
  EXPECT_LE(used, cpu());
}

TEST_F(LoadMonitorTest, SaysThatItDrains) {
  EXPECT_FALSE(monitor_.Load().draining());
  health_.Withdraw();
  EXPECT_TRUE(monitor_.Load().draining());
}

TEST_F(LoadMonitorTest, AReportCountsTheRequestThatEndsWithIt) {
  ServedModel model;
  model.name = "only";
  model.engine = std::make_unique<FakeEngine>();
  const double places = model.engine->options().max_batch_size;
  models_.Put(std::move(model));
  EXPECT_EQ(monitor_.Load().utilization(), 0);
  EXPECT_EQ(monitor_.LoadSeenBy(1).utilization(), 1 / places);
}

TEST(OrcaReportTest, HasWhatBalancersKnow) {
  v1::GetLoadResponse load;
  load.set_utilization(1.25);
  load.set_cpu_utilization(0.5);
  load.set_requests_per_second(3.5);
  load.set_errors_per_second(0.25);
  for (const uint32_t n : {1, 2}) {
    v1::ModelLoad* const model = load.add_models();
    model->set_requests_running(n);
    model->set_requests_waiting(10 * n);
    model->set_kv_cache_usage_ratio(1.0 / n);
  }
  const auto report = ToOrcaReport(load);
  EXPECT_EQ(report.application_utilization(), 1.25);
  EXPECT_EQ(report.cpu_utilization(), 0.5);
  EXPECT_EQ(report.rps_fractional(), 3.5);
  EXPECT_EQ(report.eps(), 0.25);
  EXPECT_THAT(report.named_metrics(), UnorderedElementsAre(Pair("firesteel.requests_running", 3),
                                                           Pair("firesteel.requests_waiting", 30)));
  EXPECT_THAT(report.utilization(), UnorderedElementsAre(Pair("firesteel.kv_cache", 1)));
}

class LoadReportTest : public ServerTest {
 protected:
  v1::GetLoadResponse Load() {
    grpc::ClientContext context;
    v1::GetLoadResponse load;
    const grpc::Status status = models_->GetLoad(&context, {}, &load);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return load;
  }
};

TEST_F(LoadReportTest, GetLoadTellsWhatRunsOfWhichModel) {
  grpc::ClientContext context;
  const auto reader = generation_->GenerateStream(&context, Request());
  const auto handle = alpha_->WaitForRequest(0);
  const v1::GetLoadResponse load = Load();
  ASSERT_EQ(load.models_size(), 2);
  EXPECT_EQ(load.models(0).model(), "alpha");
  EXPECT_EQ(load.models(0).requests_running(), 1);
  EXPECT_EQ(load.models(0).max_batch_size(), alpha_->options().max_batch_size);
  EXPECT_EQ(load.models(0).max_queue_requests(), alpha_->options().max_queue_requests);
  EXPECT_EQ(load.models(0).kv_cache_capacity_tokens(), alpha_->kv_capacity_tokens());
  EXPECT_EQ(load.models(1).model(), "beta");
  EXPECT_EQ(load.models(1).requests_running(), 0);
  EXPECT_EQ(load.utilization(), 0.5 / alpha_->options().max_batch_size);
  EXPECT_FALSE(load.draining());

  alpha_->SetGauges(3, 0.25);
  beta_->SetGauges(2, 0.5);
  const v1::GetLoadResponse more = Load();
  EXPECT_EQ(more.models(0).requests_waiting(), 3);
  EXPECT_EQ(more.models(0).kv_cache_usage_ratio(), 0.25);
  EXPECT_EQ(more.models(1).requests_waiting(), 2);
  EXPECT_EQ(more.models(1).kv_cache_usage_ratio(), 0.5);
  const double places = alpha_->options().max_batch_size + beta_->options().max_batch_size;
  EXPECT_EQ(more.utilization(), std::max(0.5, (1 + 3 + 2) / places));
  beta_->SetGauges(100, 0.5);
  EXPECT_EQ(Load().utilization(), (1 + 3 + 100) / places) << "what waits counts, too";
  beta_->SetGauges(0, 0.75);
  EXPECT_EQ(Load().utilization(), std::max(0.75, 4 / places)) << "the fullest cache decides";
  alpha_->Finish(handle, FakeResult(FinishReason::kEos));
  EXPECT_TRUE(ReadAll(reader.get()).status.ok());
}

TEST_F(LoadReportTest, GetLoadAnswersWhileTheServerDrains) {
  grpc::ClientContext context;
  const auto reader = generation_->GenerateStream(&context, Request());
  const auto handle = alpha_->WaitForRequest(0);
  auto stop = std::async(std::launch::async, [this] {
    return server_->Stop(absl::ZeroDuration(), absl::InfiniteDuration());
  });
  while (!Load().draining()) {
  }
  alpha_->Finish(handle, FakeResult(FinishReason::kEos));
  EXPECT_TRUE(ReadAll(reader.get()).status.ok());
  EXPECT_TRUE(stop.get());
}

}  // namespace
}  // namespace firesteel::server
