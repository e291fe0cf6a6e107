#include "runtime/model/kv_cache.h"

#include <gtest/gtest.h>

#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "runtime/model/synthetic.h"

namespace firesteel {
namespace {

constexpr size_t kTokens = kernels::kKvBlockTokens;

class KvCacheTest : public ::testing::Test {
 protected:
  static std::unique_ptr<KvBlockPool> MakePool(size_t blocks) {
    const ModelConfig config = *NamedShape("spark-stories");
    auto pool =
        KvBlockPool::Create(config, kernels::DType::kBF16,
                            blocks * KvBlockPool::BytesPerBlock(config, kernels::DType::kBF16));
    EXPECT_TRUE(pool.ok()) << pool.status();
    return *std::move(pool);
  }
  static std::vector<int32_t> Prompt(size_t tokens, int32_t first = 0) {
    std::vector<int32_t> prompt(tokens);
    std::iota(prompt.begin(), prompt.end(), first);
    return prompt;
  }
  static void Fill(const KvLease& lease, size_t block, char value) {
    std::memset(lease.blocks()[block], value, 64);
  }
  static char Content(const KvLease& lease, size_t block) {
    return *reinterpret_cast<const char*>(lease.blocks()[block]);
  }
};

TEST_F(KvCacheTest, LeasesTakeAndGiveBack) {
  auto pool = MakePool(5);
  EXPECT_EQ(pool->total_blocks(), 5u);
  {
    KvLease lease = std::move(pool->Lease(2 * kTokens + 1)).value();
    EXPECT_EQ(lease.blocks().size(), 3u);
    EXPECT_EQ(pool->available_blocks(), 2u);
    const auto refused = pool->Lease(3 * kTokens);
    EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
    EXPECT_EQ(pool->available_blocks(), 2u);
    EXPECT_EQ(lease.BlocksToWrite(2 * kTokens, 5 * kTokens), 2u);
    EXPECT_FALSE(lease.PrepareWrite(2 * kTokens, 5 * kTokens + 1));
    EXPECT_EQ(lease.blocks().size(), 3u) << "all or nothing";
    EXPECT_TRUE(lease.PrepareWrite(2 * kTokens, 5 * kTokens));
    EXPECT_EQ(pool->usage_ratio(), 1.0);
    const KvLease moved = std::move(lease);
    EXPECT_EQ(moved.capacity_tokens(), 5 * kTokens);
  }
  EXPECT_EQ(pool->available_blocks(), 5u);
}

TEST_F(KvCacheTest, SharedBlocksAreCopiedWhenWritten) {
  auto pool = MakePool(6);
  KvLease a = std::move(pool->Lease(kTokens + 3)).value();
  Fill(a, 0, 'x');
  Fill(a, 1, 'y');
  KvLease b = a.Share();
  KvLease c = a.Share();
  EXPECT_EQ(pool->available_blocks(), 4u);
  EXPECT_EQ(a.NumHeldBy(3), 2u);

  // The first two to write copy the block that they write; the last one keeps it.
  EXPECT_EQ(a.BlocksToWrite(kTokens + 3, kTokens + 4), 1u);
  ASSERT_TRUE(a.PrepareWrite(kTokens + 3, kTokens + 4));
  EXPECT_EQ(b.BlocksToWrite(kTokens + 3, kTokens + 4), 1u);
  {
    const KvLease rest = std::move(pool->Lease(3 * kTokens)).value();
    EXPECT_FALSE(b.PrepareWrite(kTokens + 3, kTokens + 4)) << "there is no block for the copy";
  }
  ASSERT_TRUE(b.PrepareWrite(kTokens + 3, kTokens + 4));
  EXPECT_EQ(c.BlocksToWrite(kTokens + 3, kTokens + 4), 0u);
  EXPECT_EQ(pool->available_blocks(), 2u);
  EXPECT_EQ(a.blocks()[0], b.blocks()[0]);
  EXPECT_NE(a.blocks()[1], b.blocks()[1]);
  EXPECT_NE(a.blocks()[1], c.blocks()[1]);
  Fill(a, 1, 'a');
  EXPECT_EQ(Content(b, 1), 'y');
  EXPECT_EQ(Content(c, 1), 'y');
  a = KvLease();
  b = KvLease();
  EXPECT_EQ(pool->available_blocks(), 4u);
  EXPECT_EQ(Content(c, 0), 'x');
}

TEST_F(KvCacheTest, PublishedPromptsAreFound) {
  auto pool = MakePool(8);
  const std::vector<int32_t> prompt = Prompt(3 * kTokens + 5);
  {
    KvLease lease = std::move(pool->Lease(prompt.size())).value();
    for (size_t i = 0; i < 3; ++i) Fill(lease, i, static_cast<char>('a' + i));
    pool->Publish({"me", prompt}, kTokens + 7, &lease);  // one whole block so far
    EXPECT_EQ(pool->FindPublished({"me", prompt}).blocks, 1u);
    pool->Publish({"me", prompt}, prompt.size(), &lease);
    EXPECT_EQ(pool->FindPublished({"me", prompt}).blocks, 3u);
    EXPECT_EQ(pool->FindPublished({"me", prompt}).in_use, 3u);
  }
  EXPECT_EQ(pool->available_blocks(), 8u);
  EXPECT_EQ(pool->cached_blocks(), 3u);
  EXPECT_EQ(pool->FindPublished({"me", prompt}).in_use, 0u);

  // Another that begins alike.
  std::vector<int32_t> other = prompt;
  other[2 * kTokens] = 77777;
  const KvLease found = pool->LeasePublished({"me", other});
  ASSERT_EQ(found.blocks().size(), 2u);
  EXPECT_EQ(Content(found, 0), 'a');
  EXPECT_EQ(Content(found, 1), 'b');
  EXPECT_EQ(pool->available_blocks(), 6u);

  // Every token counts.
  for (size_t i = 0; i < prompt.size(); ++i) {
    other = prompt;
    other[i] += 77777;
    EXPECT_EQ(pool->FindPublished({"me", other}).blocks, std::min<size_t>(i / kTokens, 3)) << i;
  }

  // Not a beginning: the same tokens behind something else.
  const std::vector<int32_t> behind(prompt.begin() + kTokens, prompt.end());
  EXPECT_EQ(pool->FindPublished({"me", behind}).blocks, 0u);
  EXPECT_EQ(pool->FindPublished({"you", prompt}).blocks, 0u);
  EXPECT_EQ(pool->FindPublished({"", prompt}).blocks, 0u);
  EXPECT_EQ(pool->FindPublished({"me", std::span(prompt).first(kTokens - 1)}).blocks, 0u);
}

TEST_F(KvCacheTest, TheLeastRecentlyUsedPromptGoesFirstFromItsEnd) {
  auto pool = MakePool(4);
  const std::vector<int32_t> a = Prompt(2 * kTokens), b = Prompt(2 * kTokens, 5000);
  for (const auto& prompt : {a, b}) {
    KvLease lease = std::move(pool->Lease(prompt.size())).value();
    pool->Publish({"", prompt}, prompt.size(), &lease);
  }
  EXPECT_EQ(pool->cached_blocks(), 4u);
  {
    const KvLease used = pool->LeasePublished({"", a});
  }
  KvLease one = std::move(pool->Lease(kTokens)).value();
  EXPECT_EQ(pool->FindPublished({"", a}).blocks, 2u);
  EXPECT_EQ(pool->FindPublished({"", b}).blocks, 1u);
  const KvLease two = std::move(pool->Lease(2 * kTokens)).value();
  EXPECT_EQ(pool->FindPublished({"", a}).blocks, 1u);
  EXPECT_EQ(pool->FindPublished({"", b}).blocks, 0u);
  pool->EvictAll();
  EXPECT_EQ(pool->FindPublished({"", a}).blocks, 0u);
  EXPECT_EQ(pool->available_blocks(), 1u);
  // What was taken over from the cache goes back as what nobody looks for.
  {
    const KvLease last = std::move(one);
  }
  EXPECT_EQ(pool->available_blocks(), 2u);
  EXPECT_EQ(pool->cached_blocks(), 0u);
}

// Two that computed the same at once: the later one takes over the block of the first.
TEST_F(KvCacheTest, TheSameContentIsKeptOnce) {
  auto pool = MakePool(6);
  const std::vector<int32_t> prompt = Prompt(2 * kTokens + 1);
  KvLease a = std::move(pool->Lease(prompt.size())).value();
  KvLease b = std::move(pool->Lease(prompt.size())).value();
  EXPECT_EQ(pool->available_blocks(), 0u);
  pool->Publish({"", prompt}, prompt.size(), &a);
  pool->Publish({"", prompt}, prompt.size(), &b);
  EXPECT_EQ(pool->available_blocks(), 2u);
  EXPECT_EQ(a.blocks()[0], b.blocks()[0]);
  EXPECT_EQ(a.blocks()[1], b.blocks()[1]);
  EXPECT_NE(a.blocks()[2], b.blocks()[2]) << "what is not whole is not shared";
}

// Random work of several sequences; all blocks come back, and what is found is what was published.
TEST_F(KvCacheTest, BlocksBalanceUnderRandomWork) {
  for (uint32_t seed = 0; seed < 20; ++seed) {
    std::mt19937 random(seed);
    auto pool = MakePool(24);
    std::vector<KvLease> leases;
    for (int step = 0; step < 2000; ++step) {
      const uint32_t kind = random() % 4;
      if (kind == 0) {
        // Prompts from a small family, whose blocks say by their first byte which they are.
        std::vector<int32_t> prompt;
        std::vector<char> marks;
        char mark = 0;
        for (uint32_t i = 0, n = 1 + random() % 4; i < n; ++i) {
          const int32_t word = static_cast<int32_t>(random() % 3);
          prompt.insert(prompt.end(), kTokens, word);
          mark = static_cast<char>(mark * 3 + word + 1);
          marks.push_back(mark);
        }
        KvLease lease = pool->LeasePublished({"", prompt});
        const size_t found = lease.blocks().size();
        for (size_t i = 0; i < found; ++i) ASSERT_EQ(Content(lease, i), marks[i]);
        if (!lease.PrepareWrite(found * kTokens, prompt.size())) continue;
        for (size_t i = found; i < marks.size(); ++i) Fill(lease, i, marks[i]);
        pool->Publish({"", prompt}, prompt.size(), &lease);
        leases.push_back(std::move(lease));
      } else if (leases.empty()) {
        continue;
      } else if (kind == 1) {
        leases.erase(leases.begin() + random() % leases.size());
      } else if (kind == 2) {
        leases.push_back(leases[random() % leases.size()].Share());
      } else {
        KvLease& lease = leases[random() % leases.size()];
        const size_t end = lease.capacity_tokens() + 1 + random() % (2 * kTokens);
        lease.PrepareWrite(lease.capacity_tokens(), end);
      }
      std::vector<std::byte*> held;
      for (const KvLease& lease : leases) {
        held.insert(held.end(), lease.blocks().begin(), lease.blocks().end());
      }
      std::sort(held.begin(), held.end());
      const auto distinct = std::unique(held.begin(), held.end()) - held.begin();
      ASSERT_EQ(pool->available_blocks() + static_cast<size_t>(distinct), 24u);
    }
    leases.clear();
    EXPECT_EQ(pool->available_blocks(), 24u);
    EXPECT_EQ(pool->usage_ratio(), 0.0);
  }
}

}  // namespace
}  // namespace firesteel
