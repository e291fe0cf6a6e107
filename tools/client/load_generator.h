// Sends many generations and records what became of each.

#ifndef FIRESTEEL_TOOLS_CLIENT_LOAD_GENERATOR_H_
#define FIRESTEEL_TOOLS_CLIENT_LOAD_GENERATOR_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/time/time.h"
#include "firesteel/v1/generation_service.pb.h"
#include "grpcpp/channel.h"
#include "grpcpp/client_context.h"
#include "tools/client/load_report.h"

namespace firesteel::client {

/// When requests are sent.
struct LoadPlan {
  /// Closed loop: this many are open at any time; one that ends is followed by the next. 0: open
  /// loop.
  uint32_t concurrency = 1;
  /// Open loop: so many a second on average, however many are open.
  double rate = 0;
  bool poisson = true;  // open loop: random gaps, as many users together make them; else equal ones
  uint64_t seed = 0;    // of the gaps
  absl::Duration warm_up = absl::ZeroDuration();  // requests due in it are not measured
  absl::Duration duration = absl::Seconds(10);    // of what is measured; then what is open ends
  uint64_t max_requests = 0;                      // measured ones; 0: as many as the time allows
  uint32_t max_open = 10'000;                     // open loop: one more is recorded as not sent
};

/// What to send and how.
struct LoadTraffic {
  std::function<v1::GenerateRequest(uint64_t number)> request;
  std::function<void(grpc::ClientContext& context)> prepare;  // deadline, metadata
};

/// Told about now and then, for a progress line.
struct LoadProgress {
  double seconds = 0;  // since the start
  uint64_t open = 0;
  uint64_t resting = 0;  // places of the closed loop kept by requests that have just failed
  uint64_t succeeded = 0;
  uint64_t failed = 0;
};

/// Runs the plan over `channel` with GenerateStream and returns a record of every request, in the
/// order in which they ended. Blocks until all have ended. `interrupted` is asked a few times a
/// second: true cancels what is open and ends the run. `progress` may be null; both are called from
/// the calling thread. REQUIRES: concurrency or rate is above 0.
std::vector<LoadRecord> GenerateLoad(const std::shared_ptr<grpc::Channel>& channel,
                                     const LoadPlan& plan, const LoadTraffic& traffic,
                                     const std::function<bool()>& interrupted,
                                     const std::function<void(const LoadProgress&)>& progress);

}  // namespace firesteel::client

#endif  // FIRESTEEL_TOOLS_CLIENT_LOAD_GENERATOR_H_
