// The machine that a benchmark ran on.

#ifndef FIRESTEEL_TOOLS_BENCH_MACHINE_H_
#define FIRESTEEL_TOOLS_BENCH_MACHINE_H_

#include <cstddef>
#include <string>

#include "runtime/threading/worker_pool.h"

namespace firesteel::bench {

/// The CPU's name as the kernel gives it, "unknown" where it doesn't.
std::string CpuName();

/// How fast the whole team reads memory that no cache holds, in 10⁹ bytes a second.
struct MemorySpeed {
  double sequential = 0;
  double gather = 0;  // 8% of the rows of a matrix, each 2,560 bytes: the rows of a sparse FFN
};

/// How fast the whole team multiplies, in 10⁹ operations a second.
struct ComputeSpeed {
  double f32 = 0;   // vectors of f32
  double bf16 = 0;  // a product of 64 × 2304 × 256 from the caches on AMX; 0 without
};

/// The best of several passes.
ComputeSpeed MeasureCompute(WorkerPool& pool);

/// The best of several passes over a gigabyte of huge pages.
MemorySpeed MeasureMemory(WorkerPool& pool);

}  // namespace firesteel::bench

#endif  // FIRESTEEL_TOOLS_BENCH_MACHINE_H_
