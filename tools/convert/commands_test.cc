// firesteel-convert as its users call it, in this process.

#include "tools/convert/commands.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "nlohmann/json.hpp"
#include "runtime/checkpoint/packed_file.h"
#include "runtime/checkpoint/test_checkpoint.h"
#include "runtime/tokenizer/tokenizer.h"

namespace firesteel::convert {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;

const std::string kModel = std::string(FIRESTEEL_SOURCE_DIR) + "/models/spark-stories";

struct Result {
  int status = 0;
  std::string out;
  std::string err;
};

Result RunWith(const std::vector<std::string>& arguments) {
  std::ostringstream out, err;
  Result result;
  result.status = Run(arguments, out, err);
  result.out = out.str();
  result.err = err.str();
  return result;
}

class ConvertTest : public ::testing::Test {
 protected:
  const TempFolder folder_;
  const std::string output_ = folder_.File("model.firesteel");
};

TEST_F(ConvertTest, ConvertsInspectsAndVerifiesAFolder) {
  const Result made =
      RunWith({"--model", kModel, "--weights", "int8", "--output", output_, "--threads", "2"});
  EXPECT_EQ(made.status, 0) << made.err;
  EXPECT_THAT(made.out, AllOf(HasSubstr(output_), HasSubstr("31.7 M"), HasSubstr("int8")));
  EXPECT_EQ(made.err, "");

  const Result table = RunWith({"--inspect", output_});
  EXPECT_EQ(table.status, 0) << table.err;
  EXPECT_THAT(table.out, AllOf(HasSubstr("spark_gemma2"), HasSubstr("tokenizer.model"),
                               HasSubstr("layers.6.down_proj"), HasSubstr("[3072, 512]")));

  const Result text = RunWith({"--inspect", output_, "--json"});
  EXPECT_EQ(text.status, 0) << text.err;
  const auto json = nlohmann::json::parse(text.out);
  EXPECT_EQ(json["format_version"], 1);
  EXPECT_EQ(json["weights"], "int8");
  EXPECT_EQ(json["parameters"], 31'734'272);
  EXPECT_EQ(json["config"]["num_hidden_layers"], 7);
  EXPECT_EQ(json["bytes"], std::filesystem::file_size(output_));
  EXPECT_EQ(json["tokenizer_bytes"], std::filesystem::file_size(kModel + "/tokenizer.model"));
  EXPECT_EQ(json["parts"].size(), 3u + 2u + 7u * 9u);
  EXPECT_EQ(json["parts"][3]["name"], "embedding");
  EXPECT_EQ(json["parts"][3]["scales"]["bytes"], 4 * 8192);

  const Result verified = RunWith({"--verify", output_});
  EXPECT_EQ(verified.status, 0) << verified.err;
  EXPECT_THAT(verified.out, StartsWith("ok: "));
  EXPECT_TRUE(Tokenizer::Load(output_, 8192, 2).ok());
}

TEST_F(ConvertTest, SyntheticModelsComeWithOrWithoutATokenizer) {
  EXPECT_EQ(RunWith({"--synthetic", "dense-stories", "--weights", "int4", "--output", output_,
                     "--seed", "5"})
                .status,
            0);
  auto file = PackedFile::Open(output_);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_FALSE((*file)->config().spark());
  EXPECT_EQ((*file)->ReadTokenizer().status().code(), absl::StatusCode::kNotFound);
  const auto bytes = (*file)->parts().back().data.checksum;

  EXPECT_EQ(RunWith({"--synthetic", "dense-stories", "--weights", "int4", "--output", output_,
                     "--seed", "6", "--tokenizer", kModel + "/tokenizer.model"})
                .status,
            0);
  EXPECT_TRUE(Tokenizer::Load(output_, 8192, 2).ok());
  file = PackedFile::Open(output_);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_NE((*file)->parts().back().data.checksum, bytes) << "another seed, other weights";
}

TEST_F(ConvertTest, DamageIsFound) {
  ASSERT_EQ(RunWith({"--model", kModel, "--output", output_}).status, 0);
  {
    std::fstream file(output_, std::ios::binary | std::ios::in | std::ios::out);
    file.seekp(20'000'000);
    file.put('\x55').put('\xAA').put('\x55');
  }
  EXPECT_EQ(RunWith({"--inspect", output_}).status, 0) << "it reads no weights";
  const Result verified = RunWith({"--verify", output_});
  EXPECT_EQ(verified.status, 2);
  EXPECT_EQ(verified.out, "");
  EXPECT_THAT(verified.err, AllOf(HasSubstr(output_), HasSubstr("tensor"), HasSubstr("checksum")));
}

TEST_F(ConvertTest, ErrorsAreOneLineAndStatusTwo) {
  const std::string source = FIRESTEEL_SOURCE_DIR;
  struct Case {
    std::vector<std::string> arguments;
    std::string says;
  };
  const std::vector<Case> cases = {
      {{}, "--model, --synthetic, --inspect and --verify"},
      {{"--frobnicate"}, "--frobnicate"},
      {{"--model"}, "--model"},
      {{"--model", kModel}, "--output"},
      {{"--model", kModel, "--inspect", output_}, "give one of"},
      {{"--model", kModel, "--synthetic", "spark-stories", "--output", output_}, "give one of"},
      {{"--model", kModel, "--output", output_, "--weights", "int3"}, "int3"},
      {{"--model", kModel, "--output", output_, "--threads", "0"}, "--threads"},
      {{"--model", kModel, "--output", output_, "--tokenizer", "x"}, "--tokenizer"},
      {{"--model", kModel, "--output", output_, "--json"}, "--json"},
      {{"--inspect", output_, "--output", "x"}, "--output"},
      {{"--model", "/no/such/folder", "--output", output_}, "/no/such/folder"},
      {{"--model", source + "/README.md", "--output", output_}, "README.md is no folder"},
      {{"--model", kModel, "--output", "/no/such/folder/x"}, "/no/such/folder/x"},
      {{"--model", kModel, "--output", folder_.path()}, folder_.path()},
      {{"--synthetic", "spark-9000", "--output", output_}, "spark-9000"},
      {{"--synthetic", "spark-stories", "--seed", "-1", "--output", output_}, "--seed"},
      {{"--synthetic", "spark-stories", "--tokenizer", source + "/README.md", "--output", output_},
       "tokenizer.model"},
      {{"--inspect", "/no/such/file"}, "/no/such/file"},
      {{"--inspect", source + "/README.md"}, "not a packed file"},
      {{"--verify", source + "/models"}, "not a regular file"},
  };
  for (const Case& one : cases) {
    const Result result = RunWith(one.arguments);
    EXPECT_EQ(result.status, 2) << one.says;
    EXPECT_EQ(result.out, "");
    EXPECT_THAT(result.err, AllOf(StartsWith("firesteel-convert: "), HasSubstr(one.says)));
    EXPECT_EQ(result.err.find('\n'), result.err.size() - 1) << result.err;
    EXPECT_TRUE(std::filesystem::is_empty(folder_.path())) << one.says;
  }
}

TEST_F(ConvertTest, HelpAndVersionGoToStandardOutput) {
  const Result help = RunWith({"--help"});
  EXPECT_EQ(help.status, 0);
  EXPECT_THAT(help.out, AllOf(HasSubstr("--synthetic"), HasSubstr("--inspect")));
  const Result version = RunWith({"--version"});
  EXPECT_EQ(version.status, 0);
  EXPECT_THAT(version.out, StartsWith("firesteel-convert "));
}

}  // namespace
}  // namespace firesteel::convert
