// How many threads this process should compute with.

#ifndef FIRESTEEL_RUNTIME_THREADING_CPU_TOPOLOGY_H_
#define FIRESTEEL_RUNTIME_THREADING_CPU_TOPOLOGY_H_

#include <cstddef>
#include <string>
#include <vector>

namespace firesteel {

/// The CPUs that this process may run on (its cpuset), at least one.
size_t AffinityCpuCount();

/// The smallest of: CPUs in the cpuset, whole CPUs of the cgroup's cpu quota (version 2 cpu.max of
/// every enclosing group, version 1 cfs quota), physical cores in the cpuset. At least 1.
size_t DefaultThreadCount();

/// The same for given CPUs and a file system below `root` (its /proc and /sys): for tests.
size_t DefaultThreadCount(const std::vector<int>& cpus, const std::string& root);

/// NUMA nodes that the CPUs in the cpuset belong to, at least 1. Weights lie in the memory of one
/// or of all, so that threads of more than one node wait for a link between them.
size_t NumaNodeCount();

/// The same for given CPUs below another root, for tests.
size_t NumaNodeCount(const std::vector<int>& cpus, const std::string& root);

/// Memory this process may use, bytes: the smaller of the machine's and its cgroup's limit.
size_t MemoryLimitBytes();

/// The same below another root, for tests.
size_t MemoryLimitBytes(const std::string& root);

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_THREADING_CPU_TOPOLOGY_H_
