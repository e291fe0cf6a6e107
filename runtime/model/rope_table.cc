#include "runtime/model/rope_table.h"

#include <cmath>

namespace firesteel {

RopeTable::RopeTable(size_t dim, size_t positions, double theta) : dim_(dim) {
  const size_t pairs = dim / 2;
  cosines_.resize(positions * pairs);
  sines_.resize(positions * pairs);
  for (size_t i = 0; i < pairs; ++i) {
    const double frequency =
        std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(dim));
    for (size_t p = 0; p < positions; ++p) {
      const double angle = static_cast<double>(p) * frequency;
      cosines_[p * pairs + i] = static_cast<float>(std::cos(angle));
      sines_[p * pairs + i] = static_cast<float>(std::sin(angle));
    }
  }
}

}  // namespace firesteel
