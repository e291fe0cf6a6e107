#include "kernels/memory_read.h"

#include <numeric>

#include "kernels/test_util.h"

namespace firesteel::kernels {
namespace {

class MemoryReadTest : public SimdTest {};
FIRESTEEL_FOR_EACH_SIMD_TARGET(MemoryReadTest);

uint32_t XorOf(std::span<const uint32_t> words) {
  uint32_t result = 0;
  for (const uint32_t word : words) result ^= word;
  return result;
}

TEST_P(MemoryReadTest, ReadsEveryWordOnce) {
  std::mt19937 engine(1);
  for (const size_t bytes : {0, 256, 512, 4096, 25600}) {
    Guarded<uint32_t> memory(bytes / 4);
    for (uint32_t& word : memory.span()) word = engine();
    EXPECT_EQ(ReadAll(memory.data(), bytes), XorOf(memory.span())) << bytes;
  }
}

TEST_P(MemoryReadTest, ReadsTheListedRows) {
  std::mt19937 engine(2);
  Guarded<uint32_t> memory(40 * 48);  // 40 rows of 192 bytes
  for (uint32_t& word : memory.span()) word = engine();
  const std::vector<uint32_t> rows = {0, 3, 4, 9, 10, 11, 12, 20, 31, 39};
  uint32_t expected = 0;
  for (const uint32_t row : rows) expected ^= XorOf(memory.span().subspan(row * 48, 48));
  EXPECT_EQ(ReadRows(memory.data(), 192, rows.data(), rows.size()), expected);
  EXPECT_EQ(ReadRows(memory.data(), 192, rows.data(), 0), 0u);
}

}  // namespace
}  // namespace firesteel::kernels
