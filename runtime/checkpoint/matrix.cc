#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "runtime/checkpoint/weights.h"

namespace firesteel {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

constexpr size_t RoundUp(size_t n, size_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

/// Zeroed memory; from two huge pages on, the kernel is asked to back it by those, which saves most
/// TLB misses of a decode step (it walks all weights once) and costs at most one page of padding.
std::byte* Allocate(size_t bytes) {
  const bool huge = bytes >= 2 * kHugePage;
  const size_t alignment = huge ? kHugePage : kernels::kAlignment;
  const size_t padded = RoundUp(bytes, alignment);
  void* const data = std::aligned_alloc(alignment, padded);
  if (data == nullptr) throw std::bad_alloc();  // LoadWeights turns it into a status
  if (huge) (void)madvise(data, padded, MADV_HUGEPAGE);
  std::memset(data, 0, padded);
  return static_cast<std::byte*>(data);
}

}  // namespace

void Matrix::Free::operator()(std::byte* p) const { std::free(p); }

Matrix::Matrix(size_t rows, size_t cols, kernels::DType dtype)
    : rows_(rows),
      cols_(cols),
      stride_(RoundUp(cols, kernels::kAlignment / kernels::SizeOf(dtype))),
      dtype_(dtype) {
  if (rows_ * stride_ > 0) data_.reset(Allocate(bytes()));
}

kernels::TypedView Matrix::view() const { return {data_.get(), dtype_, rows_, cols_, stride_}; }

void* Matrix::MutableRow(size_t row) {
  return data_.get() + row * stride_ * kernels::SizeOf(dtype_);
}

size_t Matrix::bytes() const { return rows_ * stride_ * kernels::SizeOf(dtype_); }

}  // namespace firesteel
