// For tests: tiny checkpoints in a temporary folder, whole or damaged on purpose.

#ifndef FIRESTEEL_RUNTIME_CHECKPOINT_TEST_CHECKPOINT_H_
#define FIRESTEEL_RUNTIME_CHECKPOINT_TEST_CHECKPOINT_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "nlohmann/json.hpp"

namespace firesteel {

/// A new folder that goes away with the object.
class TempFolder {
 public:
  TempFolder();
  ~TempFolder();
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;

  const std::string& path() const { return path_; }
  std::string File(const std::string& name) const { return path_ + "/" + name; }
  void Write(const std::string& name, const std::string& content) const;

 private:
  std::string path_;
};

struct TestTensor {
  std::string dtype;  // "F32", "F16" or "BF16"
  std::vector<size_t> shape;
  std::string bytes;
};
using TestTensors = std::map<std::string, TestTensor>;

/// Element `index` of the tensor `name` in a tiny checkpoint: multiples of 1/64 in [-2, 2), exact
/// in every dtype.
float TinyValue(const std::string& name, size_t index);

/// Little-endian bytes of `values` as `dtype`; each value must be exact in it.
std::string Encode(const std::string& dtype, const std::vector<float>& values);

/// A valid config of a few hundred parameters.
nlohmann::json TinyConfig(bool spark);
/// All tensors of TinyConfig, filled with TinyValue.
TestTensors TinyTensors(const nlohmann::json& config, const std::string& dtype);

/// A file from its parts: the header's true size, the header, the data.
std::string SafetensorsFromParts(const std::string& header, const std::string& data);
/// A valid file of these tensors in their order. `padding` spaces end the header: an odd sum leaves
/// the data unaligned.
std::string SafetensorsBytes(const TestTensors& tensors, size_t padding = 0);

/// Writes config.json and model.safetensors.
void WriteCheckpoint(const TempFolder& folder, const nlohmann::json& config,
                     const TestTensors& tensors);
/// Writes config.json, `shards` files that take turns, and their index; returns the index.
nlohmann::json WriteSharded(const TempFolder& folder, const nlohmann::json& config,
                            const TestTensors& tensors, size_t shards);
/// The name of one of those files.
std::string ShardName(size_t shard);

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_CHECKPOINT_TEST_CHECKPOINT_H_
