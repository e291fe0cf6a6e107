#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "kernels/matmul.h"
#include "kernels/quantized.h"
#include "runtime/checkpoint/weights.h"

namespace firesteel {
namespace {

using kernels::DType;

constexpr size_t kHugePage = size_t{2} << 20;

/// Elements that rows are padded to: 64 bytes.
constexpr size_t PaddingOf(DType dtype) {
  return dtype == DType::kI4 ? kernels::kI4Group : kernels::kAlignment / kernels::BytesOf(dtype, 1);
}

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
    : rows_(rows), cols_(cols), stride_(RoundUp(cols, PaddingOf(dtype))), dtype_(dtype) {
  if (rows_ * stride_ > 0) data_.reset(Allocate(kernels::BytesOf(dtype_, rows_ * stride_)));
  if (dtype_ == DType::kI8) row_scales_.resize(rows_);
  if (dtype_ == DType::kI4) block_scales_.resize(rows_ * stride_ / kernels::kI4Block);
}

kernels::TypedView Matrix::view() const {
  return {data_.get(), dtype_, rows_, cols_, stride_, row_scales_.data(), block_scales_.data()};
}

void* Matrix::MutableRow(size_t row) {
  return data_.get() + kernels::BytesOf(dtype_, row * stride_);
}

void Matrix::SetRow(size_t row, const float* values) {
  void* const out = MutableRow(row);
  switch (dtype_) {
    case DType::kF32:
      std::memcpy(out, values, cols_ * sizeof(float));
      break;
    case DType::kBF16:
      kernels::RoundToBF16(values, cols_, static_cast<kernels::BF16*>(out));
      break;
    case DType::kI8:
      row_scales_[row] = kernels::QuantizeWeightsI8(values, cols_, static_cast<int8_t*>(out));
      break;
    case DType::kI4:
      kernels::QuantizeWeightsI4(values, cols_, static_cast<uint8_t*>(out),
                                 &block_scales_[row * stride_ / kernels::kI4Block]);
      break;
  }
}

size_t Matrix::bytes() const {
  return kernels::BytesOf(dtype_, rows_ * stride_) + row_scales_.size() * sizeof(float) +
         block_scales_.size() * sizeof(kernels::BF16);
}

const char* DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "f32";
    case DType::kBF16:
      return "bf16";
    case DType::kI8:
      return "int8";
    case DType::kI4:
      return "int4";
  }
  return "";
}

}  // namespace firesteel
