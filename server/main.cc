// firesteel-server: options, models, server, signals.

#include <pthread.h>
#include <signal.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "kernels/simd_target.h"
#include "runtime/threading/mutex.h"
#include "server/logging.h"
#include "server/model_loader.h"
#include "server/options.h"
#include "server/server.h"

namespace firesteel::server {
namespace {

constexpr int kExitUsage = 2;

int Fail(const absl::Status& status) {
  ShutDownLogging();  // so that our line is the last one
  std::cerr << "firesteel-server: " << std::string(status.message()) << std::endl;
  return kExitUsage;
}

/// Takes SIGINT and SIGTERM by a thread that waits for them. Made before any other thread, so that
/// all others inherit the blocked signals.
class Signals {
 public:
  Signals() {
    sigemptyset(&set_);
    sigaddset(&set_, SIGINT);
    sigaddset(&set_, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &set_, nullptr);
    signal(SIGPIPE, SIG_IGN);
    thread_ = std::thread([this] { Main(); });
  }

  ~Signals() {
    {
      MutexLock lock(&mutex_);
      stopping_ = true;
    }
    pthread_kill(thread_.native_handle(), SIGTERM);
    thread_.join();
  }

  /// From now on the first signal is an orderly stop; before, any signal ends the process.
  void Serving() {
    MutexLock lock(&mutex_);
    serving_ = true;
  }

  /// Waits for the first signal.
  int Wait() {
    MutexLock lock(&mutex_);
    while (first_ == 0) received_.Wait(&mutex_);
    return first_;
  }

 private:
  void Main() {
    while (true) {
      int number = 0;
      if (sigwait(&set_, &number) != 0) continue;
      MutexLock lock(&mutex_);
      if (stopping_) return;
      // Nothing runs yet, or whoever asks twice means now.
      if (!serving_ || (first_ != 0 && number == SIGINT)) std::_Exit(128 + number);
      if (first_ == 0) first_ = number;
      received_.NotifyAll();
    }
  }

  sigset_t set_;
  Mutex mutex_;
  CondVar received_;
  bool serving_ ABSL_GUARDED_BY(mutex_) = false;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  int first_ ABSL_GUARDED_BY(mutex_) = 0;
  std::thread thread_;  // last: it uses the others
};

absl::Status ForceSimdTarget(const Environment& environment) {
  const std::string target = environment("FIRESTEEL_SIMD_TARGET").value_or("");
  if (target.empty() || kernels::ForceSimdTarget(target)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("FIRESTEEL_SIMD_TARGET: '", target.substr(0, 100), "' is not one of ",
                   absl::StrJoin(kernels::AvailableSimdTargets(), ", ")));
}

int Check(const LoadedModels& loaded) {
  for (const auto& model : loaded.registry->models()) {
    const auto took = GenerateOnce(*model, 1);
    if (!took.ok()) {
      return Fail(absl::Status(took.status().code(), absl::StrCat("--check: model ", model->name,
                                                                  ": ", took.status().message())));
    }
    std::cout << "ok: model " << model->name << " generated one token in "
              << absl::ToDoubleMilliseconds(*took) << " ms" << std::endl;
  }
  return 0;
}

// `loaded` keeps the thread pool until the server and its engines are gone.
int Serve(const ServerOptions& options, LoadedModels loaded, Signals* signals) {
  ServerConfig config;
  config.address = options.address;
  config.metrics_address = options.metrics_address;
  config.max_message_bytes = options.max_message_bytes;
  config.stall = options.stall;
  config.reflection = options.reflection;
  config.simd_target = kernels::SimdTargetName();
  config.available_simd_targets = kernels::AvailableSimdTargets();
  config.threads = options.threads;
  auto server = Server::Start(config, std::move(loaded.metrics), std::move(loaded.registry));
  if (!server.ok()) return Fail(server.status());

  signals->Serving();
  std::cout << "listening on " << (*server)->address() << ", metrics on "
            << (*server)->metrics_address() << std::endl;
  Log(LogLevel::kInfo, "serving",
      {{"version", Version()},
       {"address", (*server)->address()},
       {"metrics_address", (*server)->metrics_address()},
       {"simd_target", config.simd_target},
       {"threads", options.threads}});

  const int number = signals->Wait();
  Log(LogLevel::kInfo, "draining",
      {{"signal", number == SIGINT ? "SIGINT" : "SIGTERM"},
       {"seconds", absl::ToDoubleSeconds(options.drain)}});
  const bool clean = (*server)->Stop(absl::Now() + options.drain);
  server->reset();
  Log(LogLevel::kInfo, "stopped", {{"all_finished", clean}});
  return 0;
}

int Main(const std::vector<std::string>& arguments) {
  const Environment environment = ProcessEnvironment();
  const auto command = ParseCommandLine(arguments, environment);
  if (!command.ok()) return Fail(command.status());
  if (command->action == CommandLine::Action::kPrint) {
    std::cout << command->text << std::flush;
    return 0;
  }
  const absl::Status simd = ForceSimdTarget(environment);
  if (!simd.ok()) return Fail(simd);

  Signals signals;
  SetUpLogging(command->options.log_level, command->options.log_format);
  auto loaded = LoadModels(command->options);
  if (!loaded.ok()) return Fail(loaded.status());
  const int status = command->action == CommandLine::Action::kCheck
                         ? Check(*loaded)
                         : Serve(command->options, std::move(*loaded), &signals);
  ShutDownLogging();
  return status;
}

}  // namespace
}  // namespace firesteel::server

int main(int argc, char** argv) {
  try {
    return firesteel::server::Main(std::vector<std::string>(argv + 1, argv + argc));
  } catch (const std::exception& e) {
    std::cerr << "firesteel-server: " << e.what() << std::endl;
    return 2;
  }
}
