// GET /metrics over HTTP, in Prometheus' text format.
//
// Prometheus-cpp's own exposer would add families of its own names; this serves exactly what it is
// given.

#ifndef FIRESTEEL_SERVER_METRICS_ENDPOINT_H_
#define FIRESTEEL_SERVER_METRICS_ENDPOINT_H_

#include <prometheus/collectable.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace firesteel::server {

/// An HTTP server with a few threads of its own. Stops when destroyed.
class MetricsEndpoint {
 public:
  /// `address` is HOST:PORT; port 0 picks a free one. Unavailable where it cannot listen there.
  static absl::StatusOr<std::unique_ptr<MetricsEndpoint>> Start(
      const std::string& address,
      std::vector<std::shared_ptr<const prometheus::Collectable>> sources);
  virtual ~MetricsEndpoint() = default;

  virtual int port() const = 0;
};

/// What a scrape of these returns.
std::string ExpositionText(
    const std::vector<std::shared_ptr<const prometheus::Collectable>>& sources);

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_METRICS_ENDPOINT_H_
