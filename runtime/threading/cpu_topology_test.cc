#include "runtime/threading/cpu_topology.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

namespace firesteel {
namespace {

// A /proc and /sys of our own.
class CpuTopologyTest : public ::testing::Test {
 protected:
  void SetUp() override {
    root_ = std::filesystem::path(::testing::TempDir()) /
            ::testing::UnitTest::GetInstance()->current_test_info()->name();
    std::filesystem::remove_all(root_);
  }
  void TearDown() override { std::filesystem::remove_all(root_); }

  void Write(const std::string& path, const std::string& text) {
    const std::filesystem::path file = root_ / path;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text;
  }
  void WriteCores(int cpus, int threads_per_core) {
    for (int cpu = 0; cpu < cpus; ++cpu) {
      const std::string topology =
          "sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
      Write(topology + "core_id", std::to_string(cpu / threads_per_core) + "\n");
      Write(topology + "physical_package_id", "0\n");
    }
  }
  size_t Threads(const std::vector<int>& cpus) { return DefaultThreadCount(cpus, root_.string()); }

  std::filesystem::path root_;
};

TEST_F(CpuTopologyTest, CpusetWithoutOtherKnowledge) { EXPECT_EQ(Threads({0, 1, 2}), 3u); }

TEST_F(CpuTopologyTest, SmtSiblingsCountOnce) {
  WriteCores(8, 2);
  EXPECT_EQ(Threads({0, 1, 2, 3, 4, 5, 6, 7}), 4u);
  EXPECT_EQ(Threads({0, 1}), 1u);
  EXPECT_EQ(Threads({0, 2}), 2u);
}

TEST_F(CpuTopologyTest, NodesOfTheCpus) {
  const auto nodes = [&](const std::vector<int>& cpus) {
    return NumaNodeCount(cpus, root_.string());
  };
  EXPECT_EQ(nodes({0, 1}), 1u) << "the kernel knows of none";
  Write("sys/devices/system/node/online", "0-1,3\n");
  Write("sys/devices/system/node/node0/cpulist", "0-3,8-11\n");
  Write("sys/devices/system/node/node1/cpulist", "4-7,12-15\n");
  Write("sys/devices/system/node/node3/cpulist", "\n");  // memory alone
  EXPECT_EQ(nodes({0, 3, 9}), 1u);
  EXPECT_EQ(nodes({12, 5}), 1u);
  EXPECT_EQ(nodes({3, 4}), 2u);
  EXPECT_EQ(nodes({99}), 1u);
  Write("sys/devices/system/node/online", "0-x\n");
  EXPECT_EQ(nodes({3, 4}), 1u);
}

TEST_F(CpuTopologyTest, QuotaOfAnyEnclosingGroup) {
  Write("proc/self/cgroup", "0::/kubepods/pod1/box\n");
  Write("sys/fs/cgroup/kubepods/pod1/box/cpu.max", "max 100000\n");
  Write("sys/fs/cgroup/kubepods/pod1/cpu.max", "350000 100000\n");
  EXPECT_EQ(Threads({0, 1, 2, 3, 4, 5}), 3u);
  Write("sys/fs/cgroup/kubepods/cpu.max", "50000 100000\n");
  EXPECT_EQ(Threads({0, 1, 2, 3, 4, 5}), 1u);
}

TEST_F(CpuTopologyTest, QuotaOfVersionOne) {
  Write("proc/self/cgroup", "5:memory:/a\n4:cpu,cpuacct:/a\n");
  Write("sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "200000\n");
  Write("sys/fs/cgroup/cpu/a/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(Threads({0, 1, 2, 3}), 2u);
  Write("sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "-1\n");
  EXPECT_EQ(Threads({0, 1, 2, 3}), 4u);
}

TEST_F(CpuTopologyTest, MemoryLimitIsTheSmallest) {
  Write("proc/meminfo", "MemTotal:       1000 kB\nMemFree: 5 kB\n");
  EXPECT_EQ(MemoryLimitBytes(root_.string()), 1024000u);
  Write("proc/self/cgroup", "0::/box\n");
  Write("sys/fs/cgroup/box/memory.max", "max\n");
  EXPECT_EQ(MemoryLimitBytes(root_.string()), 1024000u);
  Write("sys/fs/cgroup/box/memory.max", "4096\n");
  EXPECT_EQ(MemoryLimitBytes(root_.string()), 4096u);
}

TEST(CpuTopology, ThisMachineHasAtLeastOneOfEverything) {
  EXPECT_GE(DefaultThreadCount(), 1u);
  EXPECT_LE(DefaultThreadCount(), AffinityCpuCount());
  EXPECT_GT(MemoryLimitBytes(), size_t{1} << 20);
}

}  // namespace
}  // namespace firesteel
