#include "tools/client/health.h"

#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "tools/client/duration_option.h"
#include "tools/client/load_report.h"
#include "tools/client/rpc_error.h"

namespace firesteel::client {
namespace {

using grpc::health::v1::Health;
using grpc::health::v1::HealthCheckResponse;

std::string StatusName(HealthCheckResponse::ServingStatus status) {
  const std::string name = HealthCheckResponse::ServingStatus_Name(status);
  return name.empty() ? "UNKNOWN" : name;
}

/// What came of all checks.
struct Answers {
  HealthCheckResponse::ServingStatus last = HealthCheckResponse::UNKNOWN;
  uint64_t not_serving = 0;
  std::vector<double> seconds;
};

// The text of the only answer, or what all of them have in common.
std::string Show(const HealthOptions& options, Answers answers) {
  const std::string status = StatusName(answers.last);
  const uint64_t not_serving = answers.not_serving;
  const LoadDistribution latency = Distribute(answers.seconds);
  if (options.json) {
    return nlohmann::json({{"status", status},
                           {"answers", latency.count},
                           {"not_serving", not_serving},
                           {"latency_seconds",
                            {{"p50", latency.p50},
                             {"p90", latency.p90},
                             {"p99", latency.p99},
                             {"max", latency.max}}}})
        .dump();
  }
  if (options.repeat == 1) return status;
  return absl::StrFormat(
      "%s; %d answers, %d of them not SERVING; p50 %.1f ms, p90 %.1f ms, p99 %.1f ms, max %.1f ms",
      status, latency.count, not_serving, latency.p50 * 1e3, latency.p90 * 1e3, latency.p99 * 1e3,
      latency.max * 1e3);
}

}  // namespace

int RunHealth(const HealthOptions& options, Console& console, Interrupt* interrupt) {
  const auto stub = Health::NewStub(Connect(options.connection));
  const auto interrupted = [interrupt] { return interrupt != nullptr && interrupt->raised(); };
  Answers answers;
  for (uint32_t i = 0; i < options.repeat && !interrupted(); ++i) {
    grpc::ClientContext context;
    const Interrupt::Scope scope(interrupt, &context);  // also while waiting for the next turn
    if (i > 0) absl::SleepFor(options.interval);
    PrepareCall(options.connection, context);
    grpc::health::v1::HealthCheckRequest request;
    request.set_service(options.service);
    HealthCheckResponse response;
    const absl::Time start = absl::Now();
    const grpc::Status status = stub->Check(&context, request, &response);
    if (!status.ok()) {
      if (interrupted() && i > 0) break;
      console.err << FormatError(status, context) << std::flush;
      return interrupted() ? kInterrupted : kFailed;
    }
    answers.seconds.push_back(absl::ToDoubleSeconds(absl::Now() - start));
    answers.last = response.status();
    if (answers.last != HealthCheckResponse::SERVING) ++answers.not_serving;
  }
  const bool good = answers.not_serving == 0;
  console.out << Show(options, std::move(answers)) << std::endl;
  if (interrupted()) return kInterrupted;
  return good ? kSucceeded : kFailed;
}

void AddHealthCommand(CLI::App& app, Console& console, Interrupt* interrupt, int& exit_status) {
  auto options = std::make_shared<HealthOptions>();  // lives in the callback
  options->connection.deadline = absl::Seconds(5);
  CLI::App& command = *app.add_subcommand(
      "health", "Print the health of the server; exit status 0 only where it is SERVING");
  AddConnectionOptions(command, options->connection);
  command.add_option("--service", options->service,
                     "Name of a service or a model (default: the whole server)");
  command
      .add_option("--repeat", options->repeat,
                  "Ask so often, and tell how long the answers took (Ctrl-C: of those so far)")
      ->check(CLI::Range(1u, 1'000'000'000u));
  AddDurationOption(command, "--interval", options->interval, absl::ZeroDuration(),
                    "Time between two of them (default: 1s)");
  command.add_flag("--json", options->json, "One JSON object; latencies in seconds");
  command.callback([options, &console, interrupt, &exit_status] {
    exit_status = RunHealth(*options, console, interrupt);
  });
}

}  // namespace firesteel::client
