#include "runtime/checkpoint/model_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <ostream>
#include <string>

#include "runtime/checkpoint/test_checkpoint.h"

namespace firesteel {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string ErrorOf(const std::string& text) {
  const auto config = ParseModelConfig(text);
  if (config.ok()) return "";
  EXPECT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument);
  return std::string(config.status().message());
}

TEST(ModelConfigTest, ReadsTheBundledModel) {
  const auto config = LoadModelConfig(std::string(FIRESTEEL_SOURCE_DIR) + "/models/spark-stories");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_TRUE(config->spark());
  EXPECT_EQ(config->vocab_size, 8192u);
  EXPECT_EQ(config->hidden_size, 512u);
  EXPECT_EQ(config->intermediate_size, 3072u);
  EXPECT_EQ(config->num_layers, 7u);
  EXPECT_EQ(config->num_heads, 8u);
  EXPECT_EQ(config->num_kv_heads, 4u);
  EXPECT_EQ(config->head_dim, 64u);
  EXPECT_EQ(config->sliding_window, 256u);
  EXPECT_EQ(config->max_position_embeddings, 1024u);
  EXPECT_EQ(config->query_pre_attn_scalar, 64.0);
  EXPECT_EQ(config->attn_logit_softcapping, 50.0);
  EXPECT_EQ(config->final_logit_softcapping, 30.0);
  EXPECT_EQ(config->rms_norm_eps, 1e-6);
  EXPECT_EQ(config->ffn_predictor_dim, 256u);
  EXPECT_EQ(config->ffn_top_k, 246u);
  EXPECT_EQ(config->attention_predictor_dim, 32u);
  EXPECT_EQ(config->attention_top_k, 64u);
  EXPECT_EQ(config->layer_types[0], AttentionKind::kSliding);
  EXPECT_EQ(config->layer_types[1], AttentionKind::kFull);
  EXPECT_EQ(config->NumParameters(), 31'734'272u);
}

TEST(ModelConfigTest, AbsentKeysTakeTheirDefaults) {
  const auto config = ParseModelConfig(TinyConfig(false).dump());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->architecture, Architecture::kGemma2);
  EXPECT_THAT(config->layer_types, ElementsAre(AttentionKind::kSliding, AttentionKind::kFull));
  EXPECT_EQ(config->query_pre_attn_scalar, 6.0);
  EXPECT_EQ(config->rope_theta, 10000.0);
  EXPECT_EQ(config->rms_norm_eps, 1e-6);
  EXPECT_EQ(config->bos_token_id, 2);
  EXPECT_THAT(config->eos_token_ids, ElementsAre(1));
  EXPECT_EQ(config->ffn_top_k, 0u);
}

TEST(ModelConfigTest, ReadsOptionalKeys) {
  json text = TinyConfig(true);
  text["layer_types"] = {"full_attention", "full_attention"};
  text["query_pre_attn_scalar"] = 24.5;
  text["rope_theta"] = 500;
  text["rms_norm_eps"] = 1e-5;
  text["bos_token_id"] = 3;
  text["eos_token_id"] = {1, 10};
  text["attn_logit_softcapping"] = nullptr;
  text["final_logit_softcapping"] = 0;
  text.erase("sliding_window");  // no layer needs it
  text["hidden_activation"] = "gelu_pytorch_tanh";
  text["tie_word_embeddings"] = true;
  text["attention_bias"] = false;
  text["torch_dtype"] = "bfloat16";  // no concern of ours
  const auto config = ParseModelConfig(text.dump());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_THAT(config->layer_types, ElementsAre(AttentionKind::kFull, AttentionKind::kFull));
  EXPECT_EQ(config->query_pre_attn_scalar, 24.5);
  EXPECT_EQ(config->rope_theta, 500.0);
  EXPECT_EQ(config->rms_norm_eps, 1e-5);
  EXPECT_EQ(config->bos_token_id, 3);
  EXPECT_THAT(config->eos_token_ids, ElementsAre(1, 10));
  EXPECT_EQ(config->attn_logit_softcapping, 0.0);
  EXPECT_EQ(config->final_logit_softcapping, 0.0);
  EXPECT_EQ(config->sliding_window, config->max_position_embeddings);
}

TEST(ModelConfigTest, CountsParametersOfBothTypes) {
  // Embedding 88, final norm 8; a layer: q and o 192 each, k and v 96 each, norms 32, and the FFN.
  const size_t outside = 88 + 8, attention = 2 * 192 + 2 * 96 + 32;
  const auto dense = ParseModelConfig(TinyConfig(false).dump());
  const auto spark = ParseModelConfig(TinyConfig(true).dump());
  ASSERT_TRUE(dense.ok() && spark.ok());
  EXPECT_EQ(dense->NumParameters(), outside + 2 * (attention + 3 * 48));
  EXPECT_EQ(spark->NumParameters(), outside + 2 * (attention + 2 * 48));
}

TEST(ModelConfigTest, RequiredKeysAreNamed) {
  for (const char* key :
       {"model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window",
        "max_position_embeddings", "attn_logit_softcapping", "final_logit_softcapping",
        "ffn_predictor_dim", "ffn_top_k", "attention_predictor_dim", "attention_top_k"}) {
    json config = TinyConfig(true);
    config.erase(key);
    EXPECT_THAT(ErrorOf(config.dump()),
                AllOf(HasSubstr("\"" + std::string(key) + "\" is missing"), HasSubstr("required")));
  }
}

TEST(ModelConfigTest, IntegersAreIntegersInBounds) {
  for (const char* key :
       {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window",
        "max_position_embeddings", "ffn_predictor_dim", "ffn_top_k", "attention_predictor_dim",
        "attention_top_k", "bos_token_id", "eos_token_id"}) {
    for (const char* value :
         {"-1", "2.5", "4.0", "1e3", "\"4\"", "true", "{}", "4294967296", "18446744073709551615",
          "18446744073709551616", "-9223372036854775808", "1e300"}) {
      json config = TinyConfig(true);
      config[key] = json::parse(value);
      EXPECT_THAT(ErrorOf(config.dump()), HasSubstr("key \"" + std::string(key) + "\" is "))
          << value;
    }
    if (std::string(key).find("token_id") == std::string::npos) {
      json config = TinyConfig(true);
      config[key] = 0;
      EXPECT_THAT(ErrorOf(config.dump()), HasSubstr("key \"" + std::string(key) + "\" is 0"));
    }
  }
}

TEST(ModelConfigTest, NumbersAreFiniteAndPositive) {
  for (const char* key : {"query_pre_attn_scalar", "rope_theta", "rms_norm_eps",
                          "attn_logit_softcapping", "final_logit_softcapping"}) {
    for (const char* value : {"-1", "-0.5", "1e-300", "1e300", "\"1\"", "[1]", "true"}) {
      json config = TinyConfig(true);
      config[key] = json::parse(value);
      EXPECT_THAT(ErrorOf(config.dump()), HasSubstr("key \"" + std::string(key) + "\" is "))
          << value;
    }
    // What a careless writer makes of a NaN is no JSON at all.
    for (const char* value : {"NaN", "Infinity", "-Infinity", "nan", "1e999", "-1e999"}) {
      std::string text = TinyConfig(true).dump();
      text.insert(1, "\"" + std::string(key) + "_\":" + value + ",");
      EXPECT_THAT(ErrorOf(text), HasSubstr("not valid JSON at byte")) << value;
    }
  }
}

struct ConfigCase {
  const char* name;
  const char* patch;  // merged into a valid Spark config of d = 8, F = 6, A = 6
  const char* error;
};

void PrintTo(const ConfigCase& c, std::ostream* out) { *out << c.patch; }

class ModelConfigPatchTest : public ::testing::TestWithParam<ConfigCase> {};

TEST_P(ModelConfigPatchTest, IsRefusedByName) {
  json config = TinyConfig(true);
  const json patch = json::parse(GetParam().patch);
  for (const auto& [key, value] : patch.items()) config[key] = value;
  EXPECT_THAT(ErrorOf(config.dump()), HasSubstr(GetParam().error));
}

INSTANTIATE_TEST_SUITE_P(
    All, ModelConfigPatchTest,
    ::testing::Values(
        ConfigCase{"UnknownType", R"({"model_type":"llama"})", "key \"model_type\" is"},
        ConfigCase{"TypeNotString", R"({"model_type":2})", "must be a string"},
        ConfigCase{"HeadsNoMultiple", R"({"num_key_value_heads":3})",
                   "multiple of num_key_value_heads, 3"},
        ConfigCase{"MoreKvHeads", R"({"num_key_value_heads":8})",
                   "multiple of num_key_value_heads, 8"},
        ConfigCase{"OddHeadDim", R"({"head_dim":7})", "\"head_dim\" is 7: it must be even"},
        ConfigCase{"OddPredictor", R"({"attention_predictor_dim":3})", "must be even"},
        ConfigCase{"PredictorIsHead", R"({"attention_predictor_dim":6})", "from 1 to 5"},
        ConfigCase{"FfnPredictorIsHidden", R"({"ffn_predictor_dim":8})", "from 1 to 7"},
        ConfigCase{"FfnTopKIsF", R"({"ffn_top_k":6})",
                   "\"ffn_top_k\" is 6: it must be an integer from 1 to 5"},
        ConfigCase{"ShortLayerTypes", R"({"layer_types":["full_attention"]})", "not 1"},
        ConfigCase{"LongLayerTypes",
                   R"({"layer_types":["full_attention","full_attention","full_attention"]})",
                   "not 3"},
        ConfigCase{"UnknownLayerType", R"({"layer_types":["full_attention","chunked_attention"]})",
                   "element 1 is"},
        ConfigCase{"LayerTypeNotString", R"({"layer_types":["full_attention",1]})",
                   "element 1 is 1"},
        ConfigCase{"LayerTypesNotList", R"({"layer_types":"full_attention"})",
                   "\"layer_types\" is"},
        ConfigCase{"NoEos", R"({"eos_token_id":[]})", "\"eos_token_id\""},
        ConfigCase{"EosPastVocabulary", R"({"eos_token_id":[1,11]})", "\"eos_token_id\" is 11"},
        ConfigCase{"EosNegative", R"({"eos_token_id":[-1]})", "\"eos_token_id\" is -1"},
        ConfigCase{"BosPastVocabulary", R"({"bos_token_id":11})", "\"bos_token_id\" is 11"},
        ConfigCase{"DefaultBosPastVocabulary", R"({"vocab_size":2})",
                   "\"bos_token_id\" is missing"},
        ConfigCase{"OtherActivation", R"({"hidden_activation":"relu"})",
                   "\"hidden_activation\" is"},
        ConfigCase{"OtherAct", R"({"hidden_act":"gelu"})", "\"hidden_act\" is"},
        ConfigCase{"Untied", R"({"tie_word_embeddings":false})",
                   "\"tie_word_embeddings\" is false"},
        ConfigCase{"TiedNotBool", R"({"tie_word_embeddings":1})", "true or false"},
        ConfigCase{"Bias", R"({"attention_bias":true})", "\"attention_bias\" is true"},
        ConfigCase{"RopeScaling", R"({"rope_scaling":{"factor":2}})", "\"rope_scaling\" is"},
        ConfigCase{"Quantized", R"({"quantization_config":{"bits":4}})",
                   "\"quantization_config\" is"}),
    [](const auto& test) { return std::string(test.param.name); });

TEST(ModelConfigTest, TextThatIsNoObjectIsRefused) {
  EXPECT_NE(ErrorOf(""), "");
  EXPECT_NE(ErrorOf("[]"), "");
  EXPECT_NE(ErrorOf("nul"), "");
  EXPECT_NE(ErrorOf(TinyConfig(true).dump() + "x"), "");
  EXPECT_THAT(ErrorOf(std::string(1 << 20, '[')), HasSubstr("nested deeper"));
  std::string twice = TinyConfig(true).dump();
  twice.insert(1, R"("head_dim":8,)");
  EXPECT_THAT(ErrorOf(twice), HasSubstr("\"head_dim\" stands there twice"));
}

TEST(ModelConfigTest, ErrorsNameTheFile) {
  const TempFolder folder;
  EXPECT_EQ(LoadModelConfig(folder.path()).status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(LoadModelConfig(folder.path()).status().message()),
              HasSubstr(folder.File("config.json")));
  folder.Write("config.json", "{}");
  EXPECT_THAT(std::string(LoadModelConfig(folder.path()).status().message()),
              HasSubstr(folder.File("config.json")));
  folder.Write("config.json", std::string((1 << 20) + 1, ' '));
  EXPECT_THAT(std::string(LoadModelConfig(folder.path()).status().message()),
              HasSubstr("the limit is 1048576"));
}

TEST(GenerationDefaultsTest, AbsentFileAndKeysLeaveTheDefaults) {
  const TempFolder folder;
  for (const bool file : {false, true}) {
    if (file) folder.Write("generation_config.json", R"({"_from_model_config":true,"top_k":null})");
    const auto defaults = LoadGenerationDefaults(folder.path());
    ASSERT_TRUE(defaults.ok()) << defaults.status();
    EXPECT_EQ(defaults->temperature, 1.0f);
    EXPECT_EQ(defaults->top_k, 0u);
    EXPECT_EQ(defaults->top_p, 1.0f);
    EXPECT_EQ(defaults->min_p, 0.0f);
  }
}

TEST(GenerationDefaultsTest, ReadsWhatIsThere) {
  const TempFolder folder;
  folder.Write("generation_config.json",
               R"({"temperature":0.5,"top_k":64,"top_p":0.95,"min_p":0.1,"do_sample":true})");
  const auto defaults = LoadGenerationDefaults(folder.path());
  ASSERT_TRUE(defaults.ok()) << defaults.status();
  EXPECT_EQ(defaults->temperature, 0.5f);
  EXPECT_EQ(defaults->top_k, 64u);
  EXPECT_EQ(defaults->top_p, 0.95f);
  EXPECT_EQ(defaults->min_p, 0.1f);
}

TEST(GenerationDefaultsTest, NoSamplingIsGreedy) {
  const TempFolder folder;
  folder.Write("generation_config.json", R"({"temperature":0.5,"do_sample":false})");
  const auto defaults = LoadGenerationDefaults(folder.path());
  ASSERT_TRUE(defaults.ok()) << defaults.status();
  EXPECT_EQ(defaults->temperature, 0.0f);
}

TEST(GenerationDefaultsTest, BadValuesAreNamed) {
  const TempFolder folder;
  for (const char* bad : {R"({"temperature":-1})", R"({"temperature":1e9})", R"({"top_k":-1})",
                          R"({"top_k":1.5})", R"({"top_p":0})", R"({"top_p":1.1})",
                          R"({"min_p":-0.1})", R"({"min_p":2})", R"({"do_sample":1})"}) {
    folder.Write("generation_config.json", bad);
    const auto defaults = LoadGenerationDefaults(folder.path());
    EXPECT_THAT(
        std::string(defaults.status().message()),
        AllOf(HasSubstr("generation_config.json"), HasSubstr(json::parse(bad).begin().key())))
        << bad;
  }
  folder.Write("generation_config.json", "{");
  EXPECT_EQ(LoadGenerationDefaults(folder.path()).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace firesteel
