#include "runtime/gemm/gemm.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "runtime/gemm/block_product.h"
#include "runtime/gemm/pack.h"

namespace firesteel::gemm {
namespace {

using kernels::BF16;

// Tokens multiplied at once. The same for every chunk, so that a token's bits never depend on
// another's presence: the last tile is filled up with zeros.
constexpr size_t kTileRows = 64;
// A packed block of 2304 × 256 bf16 is 1.1 MiB: with its tile of tokens (0.3 MiB) and its sums it
// stays in an L2 of 2 MiB while all tokens pass. Narrower blocks read tokens and write sums in
// shorter pieces, wider ones leave L2.
constexpr size_t kBlockCols = 256;
constexpr size_t kMaxDepth = 2304;

size_t RoundUp(size_t n, size_t grain) { return (n + grain - 1) / grain * grain; }

// Grows and never shrinks. What it held is lost when it grows.
class Buffer {
 public:
  template <typename T>
  T* AtLeast(size_t count) {
    if (count * sizeof(T) > size_) {
      data_.reset();
      size_ = 0;
      data_.reset(::operator new(count * sizeof(T), kAlign));
      size_ = count * sizeof(T);
    }
    return static_cast<T*>(data_.get());
  }

 private:
  static constexpr std::align_val_t kAlign{4096};
  struct Delete {
    void operator()(void* p) const { ::operator delete(p, kAlign); }
  };
  std::unique_ptr<void, Delete> data_;
  size_t size_ = 0;
};

struct Backend {
  absl::Status status = CheckBackend();
  std::string description = status.ok() ? BackendDescription()
                                        : absl::StrCat("none (", status.message(),
                                                       "; library: ", BackendDescription(), ")");
};

const Backend& TheBackend() {
  static const Backend* backend = new Backend;
  return *backend;
}

// Rows [begin, end) of x from column k on, dense with `depth` columns; zeros where x ends.
void CopyTile(const View<const BF16>& x, size_t begin, size_t k, size_t depth, BF16* tile) {
  const size_t cols = std::min(depth, x.cols - k);
  for (size_t r = 0; r < kTileRows; ++r, tile += depth) {
    const size_t valid = begin + r < x.rows ? cols : 0;
    if (valid != 0) std::memcpy(tile, x.Row(begin + r) + k, valid * sizeof(BF16));
    std::memset(static_cast<void*>(tile + valid), 0, (depth - valid) * sizeof(BF16));
  }
}

void AddRow(const float* from, size_t n, bool first, float* to) {
  if (first) {
    std::memcpy(to, from, n * sizeof(float));
  } else {
    for (size_t i = 0; i < n; ++i) to[i] += from[i];
  }
}

}  // namespace

bool Available() { return TheBackend().status.ok(); }

const std::string& Description() { return TheBackend().description; }

struct Gemm::State {
  absl::StatusOr<BlockProduct*> Product(const BlockShape& shape) {
    for (const auto& [known, product] : products) {
      if (known.depth == shape.depth && known.cols == shape.cols) {
        return product.get();
      }
    }
    auto product = BlockProduct::Create(shape);
    if (!product.ok()) return product.status();
    products.emplace_back(shape, *std::move(product));
    return products.back().second.get();
  }

  std::vector<std::pair<BlockShape, std::unique_ptr<BlockProduct>>> products;
  Buffer tokens;   // the part of x at hand, where x itself will not do
  Buffer weights;  // a packed block
  Buffer sums;     // of a tile of tokens and a block
};

Gemm::Gemm(std::unique_ptr<State> state) : state_(std::move(state)) {}
Gemm::~Gemm() = default;

absl::StatusOr<std::unique_ptr<Gemm>> Gemm::Create() {
  if (!Available()) return TheBackend().status;
  return std::unique_ptr<Gemm>(new Gemm(std::make_unique<State>()));
}

absl::Status Gemm::Multiply(const View<const BF16>& x, const View<const BF16>& w, size_t row_begin,
                            size_t row_end, const View<float>& c) {
  if (w.cols != x.cols || row_begin > row_end || row_end > w.rows || c.rows < x.rows ||
      c.cols < w.rows || x.stride < x.cols || w.stride < w.cols || c.stride < c.cols) {
    return absl::InvalidArgumentError(absl::StrCat(
        "gemm: x [", x.rows, ", ", x.cols, "], weights [", w.rows, ", ", w.cols, "], outputs ",
        row_begin, " to ", row_end, " and c [", c.rows, ", ", c.cols, "] do not fit together"));
  }
  if (x.rows == 0 || row_begin == row_end) return absl::OkStatus();
  if (x.cols == 0) {
    for (size_t m = 0; m < x.rows; ++m) {
      std::fill(c.Row(m) + row_begin, c.Row(m) + row_end, 0.0f);
    }
    return absl::OkStatus();
  }
  const size_t parts = (x.cols + kMaxDepth - 1) / kMaxDepth;
  const size_t depth = RoundUp((x.cols + parts - 1) / parts, kDepthGrain);
  const bool in_place = x.cols == depth && x.stride == depth;
  const size_t tiles_end = RoundUp(x.rows, kTileRows);
  BF16* const packed = state_->weights.AtLeast<BF16>(kBlockCols * depth);
  float* const sum = state_->sums.AtLeast<float>(kTileRows * kBlockCols);
  // Where x is used in place, only its last, incomplete tile is copied.
  const size_t first_copied = in_place ? x.rows / kTileRows * kTileRows : 0;
  BF16* const copies = state_->tokens.AtLeast<BF16>((tiles_end - first_copied) * depth);
  for (size_t k = 0; k < x.cols; k += depth) {
    for (size_t m = first_copied; m < tiles_end; m += kTileRows) {
      CopyTile(x, m, k, depth, copies + (m - first_copied) * depth);
    }
    for (size_t n = row_begin; n < row_end; n += kBlockCols) {
      const size_t valid = std::min(kBlockCols, row_end - n);
      const size_t cols = RoundUp(valid, kPackCols);
      const auto product = state_->Product({kTileRows, depth, cols});
      if (!product.ok()) return product.status();
      PackBlock({w.Row(n) + k, valid, std::min(depth, x.cols - k), w.stride}, depth, packed);
      for (size_t m = 0; m < tiles_end; m += kTileRows) {
        const BF16* tile = m < first_copied ? x.Row(m) : copies + (m - first_copied) * depth;
        if (absl::Status s = (*product)->Run(tile, packed, sum); !s.ok()) return s;
        for (size_t r = 0; r < std::min(kTileRows, x.rows - m); ++r) {
          AddRow(sum + r * cols, valid, k == 0, c.Row(m + r) + n);
        }
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace firesteel::gemm
