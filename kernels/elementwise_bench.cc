// The element-wise kernels on vectors of a model's width; bytes are those read and written.

#include "kernels/bench_util.h"
#include "kernels/elementwise.h"

namespace firesteel::kernels {
namespace {

// One input, one more where a kernel takes two, and an output that is not reused as input.
struct Vectors {
  explicit Vectors(benchmark::State& state)
      : n(static_cast<size_t>(state.range(0))),
        x(NormalFloats(n, 1)),
        other(NormalFloats(n, 2)),
        out(n) {}
  size_t n;
  AlignedVector<float> x, other, out;
};

template <typename Fn>
void Run(benchmark::State& state, Vectors& v, double bytes_per_element, const Fn& fn) {
  for (auto _ : state) {
    fn();
    benchmark::ClobberMemory();
  }
  SetBytes(state, bytes_per_element * static_cast<double>(v.n));
}

void RmsNorm(benchmark::State& state) {
  Vectors v(state);
  Run(state, v, 12,
      [&] { kernels::RmsNorm(v.x.data(), v.other.data(), 1e-6f, v.n, v.out.data()); });
}
void Rope(benchmark::State& state) {
  Vectors v(state);
  for (size_t i = 0; i < v.n; ++i) {  // angle 0: values stay as they are however often they turn
    v.other[i] = 1.0f;
    v.x[i] = 0.0f;
  }
  Run(state, v, 12, [&] { kernels::Rope(v.other.data(), v.x.data(), v.n, v.out.data()); });
}
void GeluMul(benchmark::State& state) {
  Vectors v(state);
  Run(state, v, 12, [&] { kernels::GeluMul(v.x.data(), v.other.data(), v.n, v.out.data()); });
}
void ScaleSoftCap(benchmark::State& state) {
  Vectors v(state);
  Run(state, v, 8, [&] { kernels::ScaleSoftCap(v.x.data(), 0.5f, 50.0f, v.n, v.out.data()); });
}
void Softplus(benchmark::State& state) {
  Vectors v(state);
  Run(state, v, 8, [&] { kernels::Softplus(v.x.data(), v.n, v.out.data()); });
}
void Softmax(benchmark::State& state) {
  Vectors v(state);
  Run(state, v, 8, [&] { kernels::Softmax(v.x.data(), v.n, v.out.data()); });
}
BENCHMARK(RmsNorm)->Arg(512)->Arg(2304);
BENCHMARK(Rope)->Arg(64)->Arg(256);
BENCHMARK(GeluMul)->Arg(246)->Arg(3072);
BENCHMARK(ScaleSoftCap)->Arg(1024);
BENCHMARK(Softplus)->Arg(64)->Arg(1024);
BENCHMARK(Softmax)->Arg(64)->Arg(1024);

}  // namespace
}  // namespace firesteel::kernels
