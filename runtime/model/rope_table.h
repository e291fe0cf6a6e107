// Cosines and sines of rotary position embeddings, for every position of a context.

#ifndef FIRESTEEL_RUNTIME_MODEL_ROPE_TABLE_H_
#define FIRESTEEL_RUNTIME_MODEL_ROPE_TABLE_H_

#include <cstddef>
#include <vector>

namespace firesteel {

/// Angles position · theta^(−2i/dim), i < dim/2, computed in double and kept as float. Immutable.
/// 4 · dim bytes a position.
class RopeTable {
 public:
  RopeTable(size_t dim, size_t positions, double theta);

  size_t dim() const { return dim_; }
  const float* cosines(size_t position) const { return &cosines_[position * (dim_ / 2)]; }
  const float* sines(size_t position) const { return &sines_[position * (dim_ / 2)]; }

 private:
  size_t dim_;
  std::vector<float> cosines_;  // [positions, dim / 2]
  std::vector<float> sines_;    // [positions, dim / 2]
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_MODEL_ROPE_TABLE_H_
