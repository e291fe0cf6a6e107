// Multiplying as fast as it goes: what the arithmetic of the other kernels is measured against.

#ifndef FIRESTEEL_KERNELS_COMPUTE_PEAK_H_
#define FIRESTEEL_KERNELS_COMPUTE_PEAK_H_

#include <cstddef>

namespace firesteel::kernels {

/// `steps` rounds of twelve independent f32 multiply-adds of whole vectors, from values [3] and
/// with a result in values[2]. Returns how many floating-point operations that took. Thread-safe
/// for distinct values.
double MultiplyAdds(size_t steps, float* values);

}  // namespace firesteel::kernels

#endif  // FIRESTEEL_KERNELS_COMPUTE_PEAK_H_
