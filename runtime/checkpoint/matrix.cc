#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

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

/// From two huge pages on, the kernel is asked to back the memory by those, which saves most TLB
/// misses of a decode step (it walks all weights once) and costs at most one page of padding.
std::byte* Allocate(size_t bytes, Matrix::Fill fill) {
  const bool huge = bytes >= 2 * kHugePage;
  const size_t alignment = huge ? kHugePage : kernels::kAlignment;
  const size_t padded = RoundUp(bytes, alignment);
  void* const data = std::aligned_alloc(alignment, padded);
  if (data == nullptr) throw std::bad_alloc();  // LoadWeights turns it into a status
  if (huge) (void)madvise(data, padded, MADV_HUGEPAGE);
  if (fill == Matrix::Fill::kZeros) std::memset(data, 0, padded);
  return static_cast<std::byte*>(data);
}

}  // namespace

void Matrix::Free::operator()(std::byte* p) const { std::free(p); }

size_t Matrix::StrideOf(size_t cols, DType dtype) { return RoundUp(cols, PaddingOf(dtype)); }

Matrix::Matrix(size_t rows, size_t cols, DType dtype, Fill fill)
    : rows_(rows), cols_(cols), stride_(StrideOf(cols, dtype)), dtype_(dtype) {
  if (rows_ * stride_ > 0) data_.reset(Allocate(DataBytes(), fill));
  if (dtype_ == DType::kI8) row_scales_.resize(rows_);
  if (dtype_ == DType::kI4) block_scales_.resize(rows_ * stride_ / kernels::kI4Block);
}

Matrix::Matrix(const kernels::TypedView& view, std::shared_ptr<const void> owner)
    : borrowed_(view),
      owner_(std::move(owner)),
      rows_(view.rows),
      cols_(view.cols),
      stride_(view.stride),
      dtype_(view.dtype) {}

kernels::TypedView Matrix::view() const {
  if (owner_ != nullptr) return borrowed_;
  return {data_.get(), dtype_, rows_, cols_, stride_, row_scales_.data(), block_scales_.data()};
}

void* Matrix::MutableRow(size_t row) {
  return data_.get() + kernels::BytesOf(dtype_, row * stride_);
}

void* Matrix::MutableScales() {
  if (dtype_ == DType::kI8) return row_scales_.data();
  return dtype_ == DType::kI4 ? block_scales_.data() : nullptr;
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

size_t Matrix::DataBytes() const { return kernels::BytesOf(dtype_, rows_ * stride_); }

size_t Matrix::ScaleBytes() const {
  if (dtype_ == DType::kI8) return rows_ * sizeof(float);
  if (dtype_ == DType::kI4) return rows_ * stride_ / kernels::kI4Block * sizeof(kernels::BF16);
  return 0;
}

}  // namespace firesteel
