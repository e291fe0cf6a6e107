// firesteel-server: options, models, server, signals.

#include <pthread.h>
#include <signal.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <iostream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/simd_target.h"
#include "runtime/threading/cpu_topology.h"
#include "runtime/threading/mutex.h"
#include "server/logging.h"
#include "server/model_loader.h"
#include "server/open_doors.h"
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

/// Takes SIGHUP, SIGINT and SIGTERM by a thread that waits for them. Made before any other thread,
/// so that all others inherit the blocked signals.
class Signals {
 public:
  Signals() {
    sigemptyset(&set_);
    sigaddset(&set_, SIGHUP);
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

  /// From now on SIGHUP calls `reload`, which must not block, and the first other signal is an
  /// orderly stop. Before, SIGHUP is kept for now, and any other signal ends the process.
  void Serving(std::function<void()> reload) {
    MutexLock lock(&mutex_);
    serving_ = true;
    reload_ = std::move(reload);
    if (reload_wanted_) reload_();
  }

  /// Waits for the first signal.
  int Wait() {
    MutexLock lock(&mutex_);
    while (first_ == 0) received_.Wait(&mutex_);
    reload_ = nullptr;
    return first_;
  }

 private:
  void Main() {
    while (true) {
      int number = 0;
      if (sigwait(&set_, &number) != 0) continue;
      MutexLock lock(&mutex_);
      if (stopping_) return;
      if (number == SIGHUP) {
        if (reload_ != nullptr) reload_();
        reload_wanted_ = !serving_;
        continue;
      }
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
  bool reload_wanted_ ABSL_GUARDED_BY(mutex_) = false;
  std::function<void()> reload_ ABSL_GUARDED_BY(mutex_);
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

ServerConfig MakeConfig(const ServerOptions& options) {
  ServerConfig config;
  config.address = options.address;
  config.metrics_address = options.metrics_address;
  config.admin_address = options.admin_address;
  config.health_address = options.health_address;
  config.max_message_bytes = options.max_message_bytes;
  config.drain = options.drain;
  config.stall = options.stall;
  config.reader_stall = {.write = options.reader_stall,
                         .buffer_bytes = options.reader_buffer_bytes};
  config.reflection = options.reflection;
  config.channelz = options.channelz;
  if (options.max_connection_age > absl::ZeroDuration()) {
    config.max_connection_age = options.max_connection_age;
  }
  config.tls = {
      .cert = options.tls_cert, .key = options.tls_key, .client_ca = options.tls_client_ca};
  config.auth_token_file = options.auth_token_file;
  config.credentials_reload = options.credentials_reload;
  config.simd_target = kernels::SimdTargetName();
  config.available_simd_targets = kernels::AvailableSimdTargets();
  config.threads = options.threads;
  return config;
}

// Before models are loaded, which takes long: what a server needs besides them.
absl::Status CheckCredentials(const ServerOptions& options) {
  const ServerConfig config = MakeConfig(options);
  const auto tls = MakeServerCredentials(config.tls, config.credentials_reload);
  if (!tls.ok()) return tls.status();
  return AccessControl::Create(config.auth_token_file, config.credentials_reload).status();
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
  ServerConfig config = MakeConfig(options);
  config.load_model = [&options, pool = loaded.pool.get(),
                       metrics = loaded.metrics.get()](const ModelSpec& spec) {
    return LoadModel(spec, options, pool, metrics);
  };
  auto server = Server::Start(config, std::move(loaded.metrics), std::move(loaded.registry));
  if (!server.ok()) return Fail(server.status());

  for (const OpenDoor& door : OpenDoors(options)) {
    Log(LogLevel::kWarn, door.warning, {{door.option, door.address}});
  }
  if (const size_t nodes = NumaNodeCount(); nodes > 1 && options.threads > 1) {
    Log(LogLevel::kWarn, "threads may span NUMA nodes",
        {{"nodes", nodes},
         {"advice", "start one replica a node (numactl --cpunodebind=N --membind=N)"}});
  }
  signals->Serving([&server] { (*server)->Reload(); });
  std::cout << "listening on " << (*server)->address() << ", metrics on "
            << (*server)->metrics_address() << std::endl;
  Log(LogLevel::kInfo, "serving",
      {{"version", Version()},
       {"address", (*server)->address()},
       {"admin_address", (*server)->admin_address()},
       {"health_address", (*server)->health_address()},
       {"metrics_address", (*server)->metrics_address()},
       {"tls", config.tls.enabled()},
       {"client_certificates", !config.tls.client_ca.empty()},
       {"tokens", !config.auth_token_file.empty()},
       {"simd_target", config.simd_target},
       {"threads", options.threads}});

  const int number = signals->Wait();
  Log(LogLevel::kInfo, "draining",
      {{"signal", number == SIGINT ? "SIGINT" : "SIGTERM"},
       {"withdraw_seconds", absl::ToDoubleSeconds(options.withdraw)},
       {"drain_seconds", absl::ToDoubleSeconds(options.drain)}});
  const bool clean = (*server)->Stop(options.withdraw, options.drain);
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
  const absl::Status credentials = CheckCredentials(command->options);
  if (!credentials.ok()) return Fail(credentials);
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
