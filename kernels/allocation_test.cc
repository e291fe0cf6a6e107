// No kernel allocates: this program counts every operator new.

#include <atomic>
#include <cstdlib>
#include <new>

#include "kernels/attention.h"
#include "kernels/elementwise.h"
#include "kernels/matmul.h"
#include "kernels/sparse_ffn.h"
#include "kernels/statistical_topk.h"
#include "kernels/test_util.h"

namespace {

std::atomic<int64_t> allocations{0};

void* Allocate(size_t size, size_t alignment) {
  ++allocations;
  const size_t rounded = (size + alignment - 1) / alignment * alignment;
  void* p = std::aligned_alloc(alignment, rounded == 0 ? alignment : rounded);
  if (p == nullptr) std::abort();
  return p;
}

}  // namespace

void* operator new(size_t size) { return Allocate(size, alignof(std::max_align_t)); }
void* operator new[](size_t size) { return Allocate(size, alignof(std::max_align_t)); }
void* operator new(size_t size, std::align_val_t alignment) {
  return Allocate(size, static_cast<size_t>(alignment));
}
void* operator new[](size_t size, std::align_val_t alignment) {
  return Allocate(size, static_cast<size_t>(alignment));
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }
void operator delete[](void* p, size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete[](void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, size_t, std::align_val_t) noexcept { std::free(p); }
void operator delete[](void* p, size_t, std::align_val_t) noexcept { std::free(p); }

namespace firesteel::kernels {
namespace {

class AllocationTest : public SimdTest {};
FIRESTEEL_FOR_EACH_SIMD_TARGET(AllocationTest);

TEST_P(AllocationTest, TheCounterCounts) {
  const int64_t before = allocations;
  const auto p = std::make_unique<std::vector<float>>(10);
  EXPECT_GE(allocations - before, 2);
}

TEST_P(AllocationTest, KernelsDoNotAllocate) {
  constexpr size_t kTokens = 70, kDepth = 1100, kRows = 40;
  Random random(6);
  const auto x = random.Floats(kTokens * kDepth);
  const auto weight = random.Floats(kDepth);
  std::vector<BF16> w(kRows * kDepth), x16(kTokens * kDepth);
  random.Fill(std::span<BF16>(w));
  std::vector<float> y(kTokens * kRows), row(kDepth);
  const std::vector<uint32_t> active = {1, 5, 6, 7, 20, 21, 22, 23, 24, 39};
  std::vector<uint32_t> indices(kDepth + kCompactionSlack);
  std::vector<float> excess(kDepth + kCompactionSlack);
  const TypedView x32v{x.data(), DType::kF32, kTokens, kDepth, kDepth};
  const TypedView x16v{x16.data(), DType::kBF16, kTokens, kDepth, kDepth};
  const TypedView one{x.data(), DType::kF32, 1, kDepth, kDepth};
  const TypedView wv{w.data(), DType::kBF16, kRows, kDepth, kDepth};
  const MatView yv{y.data(), kTokens, kRows, kRows};
  const AttentionShape shape{64, 32, 20, 0.125f, 50.0f, DType::kBF16};
  std::vector<std::byte> block(shape.BlockBytes());
  const std::byte* blocks[] = {block.data(), block.data()};
  size_t num_kept = 0;
  const auto key = random.Floats(64);
  std::vector<float> scratch(AttentionScratchFloats(1, 64));

  const int64_t before = allocations;
  RoundToBF16(x.data(), x.size(), x16.data());
  MatMul(x32v, wv, 0, kRows, yv);
  MatMul(x16v, wv, 0, kRows, yv);
  MaskedMatVec(one, wv, active.data(), 0, active.size(), y.data());
  AddSparseVecMat(x.data(), active.data(), active.size(), wv, row.data());
  SumSparseColumns(x.data(), active.data(), active.size(), wv, true, row.data());
  RmsNorm(x.data(), weight.data(), 1e-6f, kDepth, row.data());
  RmsNormAdd(x.data(), weight.data(), 1e-6f, kDepth, row.data());
  Rope(weight.data(), weight.data(), kDepth, row.data());
  GeluMul(x.data(), weight.data(), kDepth, row.data());
  ScaleSoftCap(x.data(), 1.0f, 50.0f, kDepth, row.data());
  Softplus(x.data(), kDepth, row.data());
  Softmax(x.data(), kDepth, row.data());
  const double theta = StatisticalThreshold(x.data(), kDepth, NormalQuantile(0.92));
  CompactAbove(x.data(), kDepth, theta, indices.data(), excess.data());
  for (size_t slot = 0; slot < kKvBlockTokens; ++slot) {
    StoreKeyValue(shape, key.data(), key.data(), slot, block.data());
  }
  Attend(shape, key.data(), 1, blocks, 0, 0, 64, NormalQuantile(0.7), scratch.data(), row.data(),
         &num_kept, nullptr, 0);
  EXPECT_EQ(allocations - before, 0);
}

}  // namespace
}  // namespace firesteel::kernels
