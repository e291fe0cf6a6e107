#include "kernels/row_fetcher.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "kernels/integer_rows.h"
#include "kernels/quantized_test_util.h"
#include "kernels/simd_target.h"

namespace firesteel::kernels {
namespace {

constexpr size_t kStride = 256;  // four lines

struct Rows {
  explicit Rows(size_t rows) : memory(rows * kStride), scales(rows, 1.0f) {}
  TypedView view() const {
    return {memory.data(), DType::kI8, scales.size(), kStride, kStride, scales.data(), nullptr};
  }
  // Offset of a line, in bytes.
  size_t OffsetOf(const uint8_t* line) const {
    return static_cast<size_t>(line - view().RowBytes(0));
  }
  std::vector<int8_t> memory;
  std::vector<float> scales;
};

// Offsets of the lines that are left in the queue, in their order.
std::vector<size_t> Drain(RowFetcher& fetcher, const Rows& w, size_t most) {
  std::vector<size_t> offsets;
  for (RowFetcher::Lines lines = fetcher.Take(most); lines.count != 0; lines = fetcher.Take(most)) {
    EXPECT_LE(lines.count, most);
    for (size_t i = 0; i < lines.count; ++i) {
      for (const uint8_t* row : lines.rows) offsets.push_back(w.OffsetOf(row) + i * kAlignment);
    }
  }
  return offsets;
}

std::vector<size_t> Sorted(std::vector<size_t> v) {
  std::sort(v.begin(), v.end());
  v.erase(std::unique(v.begin(), v.end()), v.end());
  return v;
}

// Exactly the lines of the bytes [begin, end) of the rows.
std::vector<size_t> LinesOf(const std::vector<uint32_t>& rows, size_t begin, size_t end) {
  std::vector<size_t> offsets;
  for (const uint32_t row : rows) {
    for (size_t at = begin; at < end; at += kAlignment) offsets.push_back(row * kStride + at);
  }
  return Sorted(offsets);
}

TEST(RowFetcherTest, AsksForExactlyTheLinesThatAreQueued) {
  const Rows w(40);
  for (const size_t most : {1, 3, 100}) {
    for (const size_t count : {1, 3, 4, 5, 11}) {
      std::vector<uint32_t> rows;
      for (size_t i = 0; i < count; ++i) rows.push_back(static_cast<uint32_t>(3 * i + 1));
      RowFetcher fetcher;
      fetcher.Add(w.view(), rows.data(), count, 64, 192);
      const std::vector<size_t> got = Drain(fetcher, w, most);
      EXPECT_EQ(Sorted(got), LinesOf(rows, 64, 192)) << count;
      // Groups of four rows; the last one's missing rows are others again.
      EXPECT_EQ(got.size(), (count + 3) / 4 * 4 * 2) << count;
    }
  }
}

TEST(RowFetcherTest, PartsComeInTheirOrder) {
  const Rows w(40);
  const std::vector<uint32_t> rows = {0, 1, 2, 3, 4, 5};
  RowFetcher fetcher;
  fetcher.Add(w.view(), rows.data(), 4, 0, 64);
  fetcher.Add(w.view(), rows.data(), 0, 0, 64);       // no rows
  fetcher.Add(w.view(), rows.data() + 4, 1, 64, 64);  // no bytes
  fetcher.Add(w.view(), rows.data() + 4, 2, 64, 128);
  const std::vector<size_t> got = Drain(fetcher, w, 8);
  ASSERT_EQ(got.size(), 8u);
  EXPECT_EQ(Sorted({got.begin(), got.begin() + 4}), LinesOf({0, 1, 2, 3}, 0, 64));
  EXPECT_EQ(Sorted({got.begin() + 4, got.end()}), LinesOf({4, 5}, 64, 128));
}

// Whoever queues more than there is room for has asked for what was before.
TEST(RowFetcherTest, QueuesAnyNumberOfParts) {
  const Rows w(40);
  const std::vector<uint32_t> rows = {7, 9, 20, 31};
  RowFetcher fetcher;
  for (size_t part = 0; part < 11; ++part) fetcher.Add(w.view(), rows.data(), 4, 0, kStride);
  EXPECT_EQ(Sorted(Drain(fetcher, w, 2)), LinesOf(rows, 0, kStride));
  fetcher.Add(w.view(), rows.data() + 1, 1, 0, 64);  // and goes on
  EXPECT_EQ(Sorted(Drain(fetcher, w, 2)), LinesOf({9}, 0, 64));
  fetcher.FetchAll();  // nothing is left
  fetcher.Next();
  EXPECT_EQ(fetcher.Take(1).count, 0u);
}

// Kernels ask for as many lines as they read, so that memory is never idle and never far ahead.
TEST(RowFetcherTest, KernelsAskForAsMuchAsTheyRead) {
  const Rows w(64);
  std::vector<uint32_t> all(64);
  for (uint32_t i = 0; i < 64; ++i) all[i] = i;
  const std::vector<uint32_t> active = {1, 4, 5, 9, 13, 22, 30, 31, 40, 44, 57, 63};
  const size_t read = active.size() * kStride / kAlignment;
  const size_t queued = all.size() * kStride / kAlignment;
  ASSERT_GT(queued, read);

  GuardedRows rounded(1, kStride);
  const QuantizedRows& x = rounded.view();
  QuantizeActivations(std::vector<float>(kStride, 1.0f).data(), x, 0);
  QuantizedRows c = x;
  c.cols = active.size();
  std::vector<float> y(kStride);
  std::vector<int32_t> sums(kStride);
  const auto left = [&](auto&& multiply) {
    RowFetcher fetcher;
    fetcher.Add(w.view(), all.data(), all.size(), 0, kStride);
    multiply(fetcher);
    return Drain(fetcher, w, 1).size();
  };
  for (const std::string& target : AvailableSimdTargets()) {
    ASSERT_TRUE(ForceSimdTarget(target));
    EXPECT_EQ(left([&](RowFetcher& fetcher) {
                QuantizedMaskedMatVec(x, w.view(), active.data(), 0, active.size(), fetcher,
                                      y.data());
              }),
              queued - read)
        << target;
    EXPECT_EQ(left([&](RowFetcher& fetcher) {
                SumIntegerRows(c, active.data(), w.view(), fetcher, sums.data(), y.data());
              }),
              queued - read)
        << target;
    EXPECT_EQ(left([&](RowFetcher& fetcher) {
                SumIntegerColumns(c, active.data(), w.view(), 0, kStride, false, fetcher, y.data());
              }),
              queued - read)
        << target;
  }
  ASSERT_TRUE(ForceSimdTarget(AvailableSimdTargets().front()));
}

}  // namespace
}  // namespace firesteel::kernels
