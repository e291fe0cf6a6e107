// The time as the scheduler sees it; tests bring their own.

#ifndef FIRESTEEL_RUNTIME_SCHEDULER_CLOCK_H_
#define FIRESTEEL_RUNTIME_SCHEDULER_CLOCK_H_

#include "absl/time/time.h"

namespace firesteel {

/// Thread-safe.
class Clock {
 public:
  virtual ~Clock() = default;
  virtual absl::Time Now() const = 0;

  /// Starts at the wall clock's time and advances steadily, whatever is done to the wall clock.
  /// Never deleted.
  static const Clock* Real();
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_SCHEDULER_CLOCK_H_
