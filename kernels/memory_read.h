// Reading memory as fast as it goes: what the speed of the other kernels is measured against.

#ifndef FIRESTEEL_KERNELS_MEMORY_READ_H_
#define FIRESTEEL_KERNELS_MEMORY_READ_H_

#include <cstddef>
#include <cstdint>

namespace firesteel::kernels {

/// The exclusive or of all 32-bit words of `bytes` bytes, a multiple of 256. Thread-safe.
uint32_t ReadAll(const void* data, size_t bytes);

/// The same of the rows that `rows` [num] lists, each `row_bytes` long, a multiple of 64: the
/// pattern of a sparse FFN. Rows to come are fetched ahead. Thread-safe.
uint32_t ReadRows(const void* data, size_t row_bytes, const uint32_t* rows, size_t num);

}  // namespace firesteel::kernels

#endif  // FIRESTEEL_KERNELS_MEMORY_READ_H_
