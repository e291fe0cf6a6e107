// The machine that a benchmark ran on.

#ifndef FIRESTEEL_TOOLS_BENCH_MACHINE_H_
#define FIRESTEEL_TOOLS_BENCH_MACHINE_H_

#include <cstddef>
#include <string>

#include "runtime/threading/worker_pool.h"

namespace firesteel::bench {

/// The CPU's name as the kernel gives it, "unknown" where it doesn't.
std::string CpuName();

/// Bytes a second, in 10⁹, at which the whole team reads 512 MiB once: the best of 5 passes.
double ReadBandwidthGbps(WorkerPool& pool);

}  // namespace firesteel::bench

#endif  // FIRESTEEL_TOOLS_BENCH_MACHINE_H_
