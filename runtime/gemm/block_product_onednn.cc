// Builds with oneDNN, version 2.6 (Debian 12) or 3.x.

#include <dlfcn.h>

#include <array>
#include <cstdint>
#include <memory>
#include <oneapi/dnnl/dnnl.hpp>
#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/tensor.h"
#include "runtime/gemm/block_product.h"

namespace firesteel::gemm {
namespace {

using dnnl::memory;
using kernels::BF16;

// While it lives, oneDNN compiles and runs for the calling thread alone. Debian's oneDNN takes its
// threads from OpenMP, whose number of threads is a setting of each thread. The functions are
// looked up rather than linked so that the build needs no OpenMP and follows whichever runtime
// oneDNN was linked with; builds of oneDNN that use none take no threads of their own.
class OneThread {
 public:
  OneThread() {
    if (Functions().set == nullptr) return;
    before_ = Functions().get();
    if (before_ != 1) Functions().set(1);
  }
  ~OneThread() {
    if (before_ > 1) Functions().set(before_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

  static bool Works() {
    return DNNL_CPU_THREADING_RUNTIME != DNNL_RUNTIME_OMP ||
           (Functions().set != nullptr && Functions().get != nullptr);
  }

 private:
  struct OpenMP {
    void (*set)(int);
    int (*get)();
  };
  static const OpenMP& Functions() {
    static const OpenMP functions = {
        reinterpret_cast<void (*)(int)>(dlsym(RTLD_DEFAULT, "omp_set_num_threads")),
        reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_max_threads"))};
    return functions;
  }
  int before_ = 1;
};

const dnnl::engine& Engine() {
  // Never destroyed: kernels may outlive the order in which a process tears down its globals.
  static const auto* engine = new dnnl::engine(dnnl::engine::kind::cpu, 0);
  return *engine;
}

absl::Status FromException(const std::exception& e) {
  return absl::InternalError(absl::StrCat("oneDNN: ", e.what()));
}

bool HasAmx() {
  const auto isa = static_cast<unsigned>(dnnl_get_effective_cpu_isa());
  const auto amx = static_cast<unsigned>(dnnl_cpu_isa_avx512_core_amx);
  return (isa & amx) == amx;
}

class OneDnnProduct : public BlockProduct {
 public:
  static std::unique_ptr<OneDnnProduct> Make(const BlockShape& shape) {
    const auto m = static_cast<memory::dim>(shape.rows);
    const auto k = static_cast<memory::dim>(shape.depth);
    const auto n = static_cast<memory::dim>(shape.cols);
    const memory::desc x({m, k}, memory::data_type::bf16, memory::format_tag::ab);
    const memory::desc w({k, n}, memory::data_type::bf16, memory::format_tag::BA16a64b2a);
    const memory::desc c({m, n}, memory::data_type::f32, memory::format_tag::ab);
    dnnl::primitive_attr attributes;
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
#if DNNL_VERSION_MAJOR >= 3
    const dnnl::matmul::primitive_desc description(Engine(), x, w, c, attributes);
#else
    const dnnl::matmul::primitive_desc description(dnnl::matmul::desc(x, w, c), attributes,
                                                   Engine());
#endif
    return std::unique_ptr<OneDnnProduct>(new OneDnnProduct(description, x, w, c));
  }

  bool OnMatrixUnits() const { return implementation_.find("amx") != std::string::npos; }
  const std::string& implementation() const { return implementation_; }

  absl::Status Run(const BF16* x, const BF16* packed, float* c) override {
    const OneThread one_thread;
    // oneDNN's inputs are not const; it only reads them.
    dnnl_status_t status = dnnl_memory_set_data_handle(x_.get(), const_cast<BF16*>(x));
    if (status == dnnl_success) {
      status = dnnl_memory_set_data_handle(w_.get(), const_cast<BF16*>(packed));
    }
    if (status == dnnl_success) status = dnnl_memory_set_data_handle(c_.get(), c);
    if (status == dnnl_success) {
      // The C function: the C++ one takes a map, built on the heap for each call.
      status = dnnl_primitive_execute(product_.get(), stream_.get(),
                                      static_cast<int>(arguments_.size()), arguments_.data());
    }
    if (status == dnnl_success) status = dnnl_stream_wait(stream_.get());
    if (status == dnnl_success) return absl::OkStatus();
    return absl::InternalError(
        absl::StrCat("oneDNN: matmul failed with status ", static_cast<int>(status)));
  }

 private:
  OneDnnProduct(const dnnl::matmul::primitive_desc& description, const memory::desc& x,
                const memory::desc& w, const memory::desc& c)
      : implementation_(description.impl_info_str()),
        product_(description),
        stream_(Engine()),
        x_(x, Engine(), nullptr),
        w_(w, Engine(), nullptr),
        c_(c, Engine(), nullptr),
        scratchpad_(description.scratchpad_desc(), Engine()),
        arguments_{{{DNNL_ARG_SRC, x_.get()},
                    {DNNL_ARG_WEIGHTS, w_.get()},
                    {DNNL_ARG_DST, c_.get()},
                    {DNNL_ARG_SCRATCHPAD, scratchpad_.get()}}} {}

  const std::string implementation_;
  const dnnl::matmul product_;
  const dnnl::stream stream_;
  const memory x_, w_, c_, scratchpad_;
  const std::array<dnnl_exec_arg_t, 4> arguments_;
};

// A product of ones: a CPU or a kernel of the system that only claims matrix units shows here.
absl::Status Try() {
  constexpr size_t kSize = 64;
  struct Blocks {
    alignas(64) std::array<BF16, kSize * kSize> x, w;
    alignas(64) std::array<float, kSize * kSize> c;
  };
  const auto blocks = std::make_unique<Blocks>();
  blocks->x.fill(kernels::ToBF16(1));
  blocks->w.fill(kernels::ToBF16(1));
  auto product = BlockProduct::Create({kSize, kSize, kSize});
  if (!product.ok()) return product.status();
  if (absl::Status s = (*product)->Run(blocks->x.data(), blocks->w.data(), blocks->c.data());
      !s.ok()) {
    return s;
  }
  for (const float c : blocks->c) {
    if (c != static_cast<float>(kSize)) {
      return absl::InternalError("oneDNN: a product of ones came out wrong");
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<BlockProduct>> BlockProduct::Create(const BlockShape& shape) {
  try {
    const OneThread one_thread;
    auto product = OneDnnProduct::Make(shape);
    if (!product->OnMatrixUnits()) {
      return absl::InternalError(absl::StrCat(
          "oneDNN: ", shape.rows, " x ", shape.depth, " x ", shape.cols, " would run as ",
          product->implementation(), ", which does not use the matrix units"));
    }
    return product;
  } catch (const std::exception& e) {  // dnnl::error and bad_alloc
    return FromException(e);
  }
}

absl::Status CheckBackend() {
  try {
    if (!OneThread::Works()) {
      return absl::UnavailableError("oneDNN uses OpenMP, but its functions are not to be found");
    }
    // This is also where oneDNN asks the system for the permission to use AMX.
    if (!HasAmx()) return absl::UnavailableError("no AMX");
    if (absl::Status s = Try(); !s.ok()) return absl::UnavailableError(s.message());
    return absl::OkStatus();
  } catch (const std::exception& e) {
    return absl::UnavailableError(FromException(e).message());
  }
}

std::string BackendDescription() {
  const dnnl_version_t* version = dnnl_version();
  return absl::StrCat("oneDNN ", version->major, ".", version->minor, ".", version->patch,
                      HasAmx() ? ", avx512_core_amx" : "", " (isa 0x",
                      absl::Hex(static_cast<unsigned>(dnnl_get_effective_cpu_isa())), ")");
}

}  // namespace firesteel::gemm
