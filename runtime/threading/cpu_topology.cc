#include "runtime/threading/cpu_topology.h"

#include <sched.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <set>
#include <sstream>
#include <thread>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace firesteel {
namespace {

std::vector<int> AffinityCpus() {
  std::vector<int> cpus;
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
    }
  }
  // More CPUs than the fixed-size set holds, or no permission: what the library counts.
  if (cpus.empty()) {
    for (unsigned i = 0; i < std::max(1u, std::thread::hardware_concurrency()); ++i) {
      cpus.push_back(static_cast<int>(i));
    }
  }
  return cpus;
}

// The file's text without surrounding white space; empty where it can't be read.
std::string ReadFile(const std::string& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return std::string(absl::StripAsciiWhitespace(text.str()));
}

size_t PhysicalCores(const std::vector<int>& cpus, const std::string& root) {
  std::set<std::pair<std::string, std::string>> cores;
  for (int cpu : cpus) {
    const std::string topology =
        absl::StrCat(root, "/sys/devices/system/cpu/cpu", cpu, "/topology/");
    const std::string core = ReadFile(topology + "core_id");
    if (core.empty()) return cpus.size();  // the kernel doesn't say: assume one thread a core
    cores.emplace(ReadFile(topology + "physical_package_id"), core);
  }
  return cores.size();
}

// The group's folder and all that enclose it, innermost first, for one line of /proc/self/cgroup.
std::vector<std::string> EnclosingGroups(const std::string& mount, std::string path) {
  std::vector<std::string> groups;
  while (path.size() > 1) {
    groups.push_back(mount + path);
    path.resize(path.rfind('/'));
  }
  groups.push_back(mount);
  return groups;
}

struct CgroupFolders {
  std::vector<std::string> unified;  // version 2
  std::vector<std::string> v1_cpu;   // version 1, where mounted
  std::vector<std::string> v1_memory;
};

CgroupFolders FindCgroups(const std::string& root) {
  CgroupFolders found;
  const std::string mount = root + "/sys/fs/cgroup";
  for (absl::string_view line : absl::StrSplit(ReadFile(root + "/proc/self/cgroup"), '\n')) {
    const std::vector<std::string> part = absl::StrSplit(line, absl::MaxSplits(':', 2));
    if (part.size() != 3) continue;
    if (part[1].empty()) found.unified = EnclosingGroups(mount, part[2]);
    for (absl::string_view controller : absl::StrSplit(part[1], ',')) {
      if (controller == "cpu") found.v1_cpu = EnclosingGroups(mount + "/cpu", part[2]);
      if (controller == "memory") found.v1_memory = EnclosingGroups(mount + "/memory", part[2]);
    }
  }
  return found;
}

// Whole CPUs of a quota over a period, or no limit where either isn't a positive number ("max",
// -1).
size_t QuotaCpus(absl::string_view quota, absl::string_view period) {
  int64_t q = 0;
  int64_t p = 0;
  if (!absl::SimpleAtoi(quota, &q) || !absl::SimpleAtoi(period, &p) || q <= 0 || p <= 0) {
    return std::numeric_limits<size_t>::max();
  }
  return std::max<size_t>(1, static_cast<size_t>(q / p));
}

size_t CgroupCpus(const std::string& root) {
  const CgroupFolders groups = FindCgroups(root);
  size_t cpus = std::numeric_limits<size_t>::max();
  for (const std::string& group : groups.unified) {
    const std::vector<std::string> field = absl::StrSplit(ReadFile(group + "/cpu.max"), ' ');
    if (field.size() == 2) cpus = std::min(cpus, QuotaCpus(field[0], field[1]));
  }
  for (const std::string& group : groups.v1_cpu) {
    cpus = std::min(cpus, QuotaCpus(ReadFile(group + "/cpu.cfs_quota_us"),
                                    ReadFile(group + "/cpu.cfs_period_us")));
  }
  return cpus;
}

// The numbers of a kernel list such as "0-3,8"; of what is no such list, none.
std::vector<int> ParseList(const std::string& text) {
  std::vector<int> numbers;
  for (absl::string_view part : absl::StrSplit(text, ',', absl::SkipEmpty())) {
    const std::vector<absl::string_view> ends = absl::StrSplit(part, '-');
    int first = 0, last = 0;
    if (ends.size() > 2 || !absl::SimpleAtoi(ends.front(), &first) ||
        !absl::SimpleAtoi(ends.back(), &last) || first < 0 || last > CPU_SETSIZE) {
      return {};
    }
    for (int n = first; n <= last; ++n) numbers.push_back(n);
  }
  return numbers;
}

}  // namespace

size_t AffinityCpuCount() { return AffinityCpus().size(); }

size_t DefaultThreadCount() { return DefaultThreadCount(AffinityCpus(), ""); }

size_t DefaultThreadCount(const std::vector<int>& cpus, const std::string& root) {
  return std::max<size_t>(1, std::min({cpus.size(), CgroupCpus(root), PhysicalCores(cpus, root)}));
}

size_t NumaNodeCount() { return NumaNodeCount(AffinityCpus(), ""); }

size_t NumaNodeCount(const std::vector<int>& cpus, const std::string& root) {
  const std::string nodes = root + "/sys/devices/system/node/";
  size_t count = 0;
  for (const int node : ParseList(ReadFile(nodes + "online"))) {
    const std::vector<int> own = ParseList(ReadFile(absl::StrCat(nodes, "node", node, "/cpulist")));
    count += std::any_of(own.begin(), own.end(), [&](int cpu) {
      return std::find(cpus.begin(), cpus.end(), cpu) != cpus.end();
    });
  }
  return std::max<size_t>(1, count);
}

size_t MemoryLimitBytes() { return MemoryLimitBytes(""); }

size_t MemoryLimitBytes(const std::string& root) {
  size_t limit = std::numeric_limits<size_t>::max();
  for (absl::string_view line : absl::StrSplit(ReadFile(root + "/proc/meminfo"), '\n')) {
    uint64_t kib = 0;
    if (absl::ConsumePrefix(&line, "MemTotal:") && absl::ConsumeSuffix(&line, "kB") &&
        absl::SimpleAtoi(absl::StripAsciiWhitespace(line), &kib)) {
      limit = kib * 1024;
    }
  }
  const CgroupFolders groups = FindCgroups(root);
  const auto apply = [&](const std::vector<std::string>& folders, const char* file) {
    for (const std::string& group : folders) {
      uint64_t bytes = 0;
      if (absl::SimpleAtoi(ReadFile(group + file), &bytes) && bytes > 0) {
        limit = std::min<size_t>(limit, bytes);
      }
    }
  };
  apply(groups.unified, "/memory.max");
  apply(groups.v1_memory, "/memory.limit_in_bytes");
  return limit;
}

}  // namespace firesteel
