// Ctrl-C as an event that cancels the call in progress, instead of one that ends the process.

#ifndef FIRESTEEL_TOOLS_CLIENT_INTERRUPT_H_
#define FIRESTEEL_TOOLS_CLIENT_INTERRUPT_H_

#include <atomic>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "grpcpp/client_context.h"

namespace firesteel::client {

/// Takes over SIGINT and SIGTERM for as long as it lives: the first one cancels the call that is
/// registered; the second one, or one while there is no call, ends the process at once with status
/// 130. Create it before any other thread (gRPC makes some), since a signal mask is inherited; at
/// most one at a time. Thread-safe.
class Interrupt {
 public:
  Interrupt();
  ~Interrupt();
  Interrupt(const Interrupt&) = delete;
  Interrupt& operator=(const Interrupt&) = delete;

  /// Whether a signal has come.
  bool raised() const { return raised_.load(); }

  /// Registers a call for cancellation while it lives. One at a time. `interrupt` may be null: then
  /// nothing is registered.
  class Scope {
   public:
    Scope(Interrupt* interrupt, grpc::ClientContext* context);
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Interrupt* const interrupt_;
  };

 private:
  void Watch();
  void Register(grpc::ClientContext* context);

  const int signals_;  // signalfd
  const int stop_;     // eventfd: readable when the watcher must end

  std::atomic<bool> raised_ = false;

  absl::Mutex mutex_;
  grpc::ClientContext* context_ ABSL_GUARDED_BY(mutex_) = nullptr;

  std::thread watcher_;  // last: it uses all of the above
};

}  // namespace firesteel::client

#endif  // FIRESTEEL_TOOLS_CLIENT_INTERRUPT_H_
