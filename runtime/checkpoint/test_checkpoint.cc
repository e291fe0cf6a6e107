#include "runtime/checkpoint/test_checkpoint.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>

#include "kernels/tensor.h"

namespace firesteel {
namespace {

/// FNV-1a: the same values on every machine.
uint32_t Hash(const std::string& text) {
  uint32_t hash = 2166136261u;
  for (const char c : text) hash = (hash ^ static_cast<uint8_t>(c)) * 16777619u;
  return hash;
}

/// A value with at most 8 significant bits in half's normal range.
uint16_t HalfBits(float value) {
  if (value == 0) return 0;
  int exponent = 0;
  const float fraction = std::frexp(std::fabs(value), &exponent);  // in [0.5, 1)
  const uint32_t mantissa = static_cast<uint32_t>(fraction * 2048.0f) & 0x3FFu;
  return static_cast<uint16_t>((value < 0 ? 0x8000u : 0u) |
                               (static_cast<uint32_t>(exponent + 14) << 10) | mantissa);
}

template <typename T>
void AppendRaw(T value, std::string* out) {
  out->append(reinterpret_cast<const char*>(&value), sizeof(T));
}

}  // namespace

TempFolder::TempFolder() {
  std::string name = (std::filesystem::temp_directory_path() / "firesteel-test-XXXXXX").string();
  if (mkdtemp(name.data()) == nullptr) std::abort();
  path_ = name;
}

TempFolder::~TempFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

void TempFolder::Write(const std::string& name, const std::string& content) const {
  // A new file each time: some file systems sync one that is cut to nothing and written again.
  std::filesystem::remove(File(name));
  std::ofstream out(File(name), std::ios::binary | std::ios::trunc);
  out.write(content.data(), static_cast<std::streamsize>(content.size()));
  if (!out.flush()) std::abort();
}

float TinyValue(const std::string& name, size_t index) {
  const uint32_t hash = (Hash(name) + static_cast<uint32_t>(index)) * 2654435761u;
  return (static_cast<float>(hash >> 24) - 128.0f) / 64.0f;
}

std::string Encode(const std::string& dtype, const std::vector<float>& values) {
  std::string bytes;
  for (const float value : values) {
    if (dtype == "F32") {
      AppendRaw(value, &bytes);
    } else if (dtype == "BF16") {
      AppendRaw(kernels::ToBF16(value).bits, &bytes);
    } else {
      AppendRaw(HalfBits(value), &bytes);
    }
  }
  return bytes;
}

nlohmann::json TinyConfig(bool spark) {
  nlohmann::json config = {{"model_type", spark ? "spark_gemma2" : "gemma2"},
                           {"vocab_size", 11},
                           {"hidden_size", 8},
                           {"intermediate_size", 6},
                           {"num_hidden_layers", 2},
                           {"num_attention_heads", 4},
                           {"num_key_value_heads", 2},
                           {"head_dim", 6},
                           {"sliding_window", 4},
                           {"max_position_embeddings", 16},
                           {"attn_logit_softcapping", 50.0},
                           {"final_logit_softcapping", 30.0}};
  if (spark) {
    config["ffn_predictor_dim"] = 3;
    config["ffn_top_k"] = 2;
    config["attention_predictor_dim"] = 2;
    config["attention_top_k"] = 3;
  }
  return config;
}

TestTensors TinyTensors(const nlohmann::json& config, const std::string& dtype) {
  TestTensors tensors;
  const auto add = [&](const std::string& name, std::vector<size_t> shape) {
    size_t count = 1;
    for (const size_t dim : shape) count *= dim;
    std::vector<float> values;
    for (size_t i = 0; i < count; ++i) values.push_back(TinyValue(name, i));
    tensors[name] = {dtype, std::move(shape), Encode(dtype, values)};
  };
  const size_t d = config["hidden_size"], f = config["intermediate_size"];
  const size_t head = config["head_dim"];
  const size_t q = config["num_attention_heads"].get<size_t>() * head;
  const size_t kv = config["num_key_value_heads"].get<size_t>() * head;
  const bool spark = config["model_type"] == "spark_gemma2";
  const size_t r = spark ? config["ffn_predictor_dim"].get<size_t>() : d;
  add("model.embed_tokens.weight", {config["vocab_size"], d});
  add("model.norm.weight", {d});
  for (size_t i = 0; i < config["num_hidden_layers"]; ++i) {
    const std::string layer = "model.layers." + std::to_string(i) + ".";
    for (const char* norm : {"input_layernorm", "post_attention_layernorm",
                             "pre_feedforward_layernorm", "post_feedforward_layernorm"}) {
      add(layer + norm + ".weight", {d});
    }
    add(layer + "self_attn.q_proj.weight", {q, d});
    add(layer + "self_attn.k_proj.weight", {kv, d});
    add(layer + "self_attn.v_proj.weight", {kv, d});
    add(layer + "self_attn.o_proj.weight", {d, q});
    add(layer + "mlp.gate_proj.weight", {f, r});
    add(layer + "mlp.up_proj.weight", {f, spark ? d - r : d});
    add(layer + "mlp.down_proj.weight", {d, f});
  }
  return tensors;
}

std::string SafetensorsFromParts(const std::string& header, const std::string& data) {
  std::string file;
  AppendRaw(static_cast<uint64_t>(header.size()), &file);
  return file + header + data;
}

std::string SafetensorsBytes(const TestTensors& tensors, size_t padding) {
  nlohmann::json header = {{"__metadata__", {{"format", "pt"}}}};
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    header[name] = {{"dtype", tensor.dtype},
                    {"shape", tensor.shape},
                    {"data_offsets", {data.size(), data.size() + tensor.bytes.size()}}};
    data += tensor.bytes;
  }
  return SafetensorsFromParts(header.dump() + std::string(padding, ' '), data);
}

void WriteCheckpoint(const TempFolder& folder, const nlohmann::json& config,
                     const TestTensors& tensors) {
  folder.Write("config.json", config.dump());
  folder.Write("model.safetensors", SafetensorsBytes(tensors));
}

std::string ShardName(size_t shard) { return "part-" + std::to_string(shard) + ".safetensors"; }

nlohmann::json WriteSharded(const TempFolder& folder, const nlohmann::json& config,
                            const TestTensors& tensors, size_t shards) {
  std::vector<TestTensors> parts(shards);
  nlohmann::json index = {{"metadata", {{"total_size", 0}}}};
  size_t next = 0;
  for (const auto& [name, tensor] : tensors) {
    parts[next % shards][name] = tensor;
    index["weight_map"][name] = ShardName(next % shards);
    ++next;
  }
  for (size_t i = 0; i < shards; ++i) folder.Write(ShardName(i), SafetensorsBytes(parts[i]));
  folder.Write("model.safetensors.index.json", index.dump());
  folder.Write("config.json", config.dump());
  return index;
}

}  // namespace firesteel
