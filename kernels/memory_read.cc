#include "kernels/memory_read.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/memory_read.cc"
#include "hwy/foreach_target.h"
// The rest is compiled once per target, so it has to follow foreach_target.h.
#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "kernels/dot-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace firesteel::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using WordTag = hn::CappedTag<uint32_t, 16>;

// From four streams, as the kernels read four rows at a time.
uint32_t ReadAllImpl(const void* data, size_t bytes) {
  const WordTag d;
  const auto* const p = static_cast<const uint32_t*>(data);
  const size_t quarter = bytes / sizeof(uint32_t) / 4;
  auto s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0;
  for (size_t i = 0; i < quarter; i += hn::Lanes(d)) {
    s0 = hn::Xor(s0, hn::LoadU(d, p + i));
    s1 = hn::Xor(s1, hn::LoadU(d, p + quarter + i));
    s2 = hn::Xor(s2, hn::LoadU(d, p + 2 * quarter + i));
    s3 = hn::Xor(s3, hn::LoadU(d, p + 3 * quarter + i));
  }
  const auto sum = hn::Xor(hn::Xor(s0, s1), hn::Xor(s2, s3));
  HWY_ALIGN uint32_t lanes[16] = {};
  hn::Store(sum, d, lanes);
  uint32_t result = 0;
  for (const uint32_t lane : lanes) result ^= lane;
  return result;
}

uint32_t ReadRowsImpl(const void* data, size_t row_bytes, const uint32_t* rows, size_t num) {
  constexpr size_t kAhead = 8;
  const WordTag d;
  const auto* const base = static_cast<const uint8_t*>(data);
  auto sum = hn::Zero(d);
  for (size_t j = 0; j < num; ++j) {
    const uint8_t* const row = base + rows[j] * row_bytes;
    const uint8_t* const next = base + rows[j + kAhead < num ? j + kAhead : j] * row_bytes;
    for (size_t i = 0; i < row_bytes; i += 64) {
      FetchToL2(next + i);
      for (size_t v = 0; v < 64; v += 4 * hn::Lanes(d)) {
        sum = hn::Xor(sum, hn::LoadU(d, reinterpret_cast<const uint32_t*>(row + i + v)));
      }
    }
  }
  HWY_ALIGN uint32_t lanes[16] = {};
  hn::Store(sum, d, lanes);
  uint32_t result = 0;
  for (const uint32_t lane : lanes) result ^= lane;
  return result;
}

}  // namespace HWY_NAMESPACE
}  // namespace firesteel::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace firesteel::kernels {

HWY_EXPORT(ReadAllImpl);
HWY_EXPORT(ReadRowsImpl);

uint32_t ReadAll(const void* data, size_t bytes) {
  HWY_DASSERT(bytes % 256 == 0);
  return HWY_DYNAMIC_DISPATCH(ReadAllImpl)(data, bytes);
}

uint32_t ReadRows(const void* data, size_t row_bytes, const uint32_t* rows, size_t num) {
  HWY_DASSERT(row_bytes % 64 == 0);
  return HWY_DYNAMIC_DISPATCH(ReadRowsImpl)(data, row_bytes, rows, num);
}

}  // namespace firesteel::kernels
#endif  // HWY_ONCE
