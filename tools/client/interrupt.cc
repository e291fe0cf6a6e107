#include "tools/client/interrupt.h"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>

#include "tools/client/console.h"

namespace firesteel::client {
namespace {

sigset_t WatchedSignals() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGINT);
  sigaddset(&set, SIGTERM);
  return set;
}

int BlockAndOpen() {
  const sigset_t set = WatchedSignals();
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  return signalfd(-1, &set, SFD_CLOEXEC);
}

}  // namespace

Interrupt::Interrupt() : signals_(BlockAndOpen()), stop_(eventfd(0, EFD_CLOEXEC)) {
  if (signals_ < 0 || stop_ < 0) std::abort();  // out of file descriptors before any was used
  watcher_ = std::thread(&Interrupt::Watch, this);
}

Interrupt::~Interrupt() {
  eventfd_write(stop_, 1);
  watcher_.join();
  const sigset_t set = WatchedSignals();
  pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
  close(signals_);
  close(stop_);
}

void Interrupt::Watch() {
  for (;;) {
    pollfd events[] = {{signals_, POLLIN, 0}, {stop_, POLLIN, 0}};
    if (poll(events, 2, -1) < 0) continue;  // EINTR
    if (events[1].revents != 0) return;
    signalfd_siginfo info;
    if (read(signals_, &info, sizeof(info)) != sizeof(info)) continue;
    absl::MutexLock lock(&mutex_);
    if (raised_.exchange(true) || context_ == nullptr) _exit(kInterrupted);
    context_->TryCancel();
  }
}

void Interrupt::Register(grpc::ClientContext* context) {
  absl::MutexLock lock(&mutex_);
  context_ = context;
}

Interrupt::Scope::Scope(Interrupt* interrupt, grpc::ClientContext* context)
    : interrupt_(interrupt) {
  if (interrupt_ != nullptr) interrupt_->Register(context);
}

Interrupt::Scope::~Scope() {
  if (interrupt_ != nullptr) interrupt_->Register(nullptr);
}

}  // namespace firesteel::client
