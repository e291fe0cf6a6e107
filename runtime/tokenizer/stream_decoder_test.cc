#include "runtime/tokenizer/stream_decoder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

namespace firesteel {
namespace {

using ::testing::ElementsAre;

constexpr char kReplacement[] = "\xEF\xBF\xBD";

std::vector<std::string> AppendAll(StreamDecoder* decoder, const std::vector<std::string>& parts) {
  std::vector<std::string> shown;
  for (const std::string& part : parts) shown.push_back(decoder->Append(part));
  shown.push_back(decoder->Finish());
  return shown;
}

std::vector<std::string> Decode(std::vector<std::string> stops,
                                const std::vector<std::string>& parts) {
  StreamDecoder decoder(std::move(stops));
  return AppendAll(&decoder, parts);
}

TEST(StreamDecoderTest, PlainTextPassesAtOnce) {
  EXPECT_THAT(Decode({}, {"Once", " upon", "", " a time"}),
              ElementsAre("Once", " upon", "", " a time", ""));
}

TEST(StreamDecoderTest, CodePointsComeWhole) {
  // é, 你, 🦊: two, three and four bytes.
  EXPECT_THAT(Decode({}, {"\xC3", "\xA9x", "\xE4\xBD", "\xA0", "\xF0\x9F", "\xA6", "\x8A!"}),
              ElementsAre("", "\xC3\xA9x", "", "\xE4\xBD\xA0", "", "", "\xF0\x9F\xA6\x8A!", ""));
}

TEST(StreamDecoderTest, BytesThatCannotBeUtf8AreReplaced) {
  const std::string r = kReplacement;
  EXPECT_THAT(Decode({}, {"a\xFFz"}), ElementsAre("a" + r + "z", ""));
  EXPECT_THAT(Decode({}, {"\x80\xBF"}), ElementsAre(r + r, ""));
  EXPECT_THAT(Decode({}, {"\xC3", "z"}), ElementsAre("", r + "z", ""));
  EXPECT_THAT(Decode({}, {"\xE4\xBD", "\xC3\xA9"}), ElementsAre("", r + "\xC3\xA9", ""));
  EXPECT_THAT(Decode({}, {"\xC0\x80"}), ElementsAre(r + r, ""));                  // overlong
  EXPECT_THAT(Decode({}, {"\xED\xA0\x80"}), ElementsAre(r + r + r, ""));          // surrogate
  EXPECT_THAT(Decode({}, {"\xF4\x90\x80\x80"}), ElementsAre(r + r + r + r, ""));  // past U+10FFFF
  EXPECT_THAT(Decode({}, {"\xF0\x9F\xA6"}), ElementsAre("", r));  // the text ends in it
}

TEST(StreamDecoderTest, NulIsText) {
  const std::string nul(1, '\0');
  EXPECT_THAT(Decode({"b" + nul}, {nul, "a", "b", nul + "c"}), ElementsAre(nul, "a", "", "", ""));
}

TEST(StreamDecoderTest, StopEndsTheText) {
  StreamDecoder decoder({"END"});
  EXPECT_THAT(AppendAll(&decoder, {"the E", "N", "D of", " it"}),
              ElementsAre("the ", "", "", "", ""));
  EXPECT_EQ(decoder.matched_stop(), "END");
}

TEST(StreamDecoderTest, HoldsBackOnlyWhatMayBecomeAStop) {
  StreamDecoder decoder({"\n\nThe"});
  EXPECT_THAT(AppendAll(&decoder, {"a\n", "b\n\nT", "ho", "\n\n\n", "The"}),
              ElementsAre("a", "\nb", "\n\nTho", "\n", "", ""));
  EXPECT_EQ(decoder.matched_stop(), "\n\nThe");
}

TEST(StreamDecoderTest, FinishShowsWhatWasHeld) {
  StreamDecoder decoder({"abcd"});
  EXPECT_THAT(AppendAll(&decoder, {"xabc"}), ElementsAre("x", "abc"));
  EXPECT_EQ(decoder.matched_stop(), "");
}

TEST(StreamDecoderTest, EarliestThenLongestWins) {
  StreamDecoder one({"y", "xyz", "xy"});
  EXPECT_EQ(one.Append("wxyz"), "w");
  EXPECT_EQ(one.matched_stop(), "xyz");
  // Byte by byte the first that is complete ends the text: no later token is computed.
  StreamDecoder two({"xyz", "xy"});
  EXPECT_THAT(AppendAll(&two, {"w", "x", "y", "z"}), ElementsAre("w", "", "", "", ""));
  EXPECT_EQ(two.matched_stop(), "xy");
}

TEST(StreamDecoderTest, SelfOverlappingStopIsFound) {
  StreamDecoder decoder({"aab"});
  EXPECT_THAT(AppendAll(&decoder, {"a", "a", "a", "ab!"}), ElementsAre("", "", "a", "a", ""));
  EXPECT_EQ(decoder.matched_stop(), "aab");
}

TEST(StreamDecoderTest, StopSplitInsideACodePoint) {
  StreamDecoder decoder({"\xC3\xA9"});
  EXPECT_THAT(AppendAll(&decoder, {"caf\xC3", "\xA9 au lait"}), ElementsAre("caf", "", ""));
  EXPECT_EQ(decoder.matched_stop(), "\xC3\xA9");
  // The same first byte, another letter.
  EXPECT_THAT(Decode({"\xC3\xA9"}, {"\xC3", "\xA8"}), ElementsAre("", "\xC3\xA8", ""));
}

TEST(StreamDecoderTest, StopCompletedTooEarlyDoesNotCount) {
  StreamDecoder decoder({"ab"});
  EXPECT_EQ(decoder.Append("xab", false), "xab");
  EXPECT_EQ(decoder.Append("a", false), "");  // may still become one that counts
  EXPECT_EQ(decoder.Append("bc", true), "");
  EXPECT_EQ(decoder.matched_stop(), "ab");

  StreamDecoder overlap({"aa"});
  EXPECT_EQ(overlap.Append("aa", false), "a");
  EXPECT_EQ(overlap.Append("a", true), "");
  EXPECT_EQ(overlap.matched_stop(), "aa");
}

TEST(StreamDecoderTest, EmptyStopIsIgnored) {
  EXPECT_THAT(Decode({"", "z"}, {"ab"}), ElementsAre("ab", ""));
}

// ---- The same by its definition, from the whole text each time ----

/// Length of the code point at `at`; 0 where there is none, and *needed the bytes that belong to
/// U+FFFD there.
size_t CodePointLength(const std::string& bytes, size_t at, size_t* replaced, bool* unfinished) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(bytes[at + i]); };
  // Every well-formed sequence, row by row of the Unicode standard's table 3-7.
  struct Row {
    int first_low, first_high, low, high;
    size_t length;
  };
  static constexpr Row kRows[] = {
      {0x00, 0x7F, 0, 0, 1},       {0xC2, 0xDF, 0x80, 0xBF, 2}, {0xE0, 0xE0, 0xA0, 0xBF, 3},
      {0xE1, 0xEC, 0x80, 0xBF, 3}, {0xED, 0xED, 0x80, 0x9F, 3}, {0xEE, 0xEF, 0x80, 0xBF, 3},
      {0xF0, 0xF0, 0x90, 0xBF, 4}, {0xF1, 0xF3, 0x80, 0xBF, 4}, {0xF4, 0xF4, 0x80, 0x8F, 4}};
  *replaced = 1;
  *unfinished = false;
  for (const Row& row : kRows) {
    if (byte(0) < row.first_low || byte(0) > row.first_high) continue;
    for (size_t i = 1; i < row.length; ++i) {
      *replaced = i;
      if (at + i >= bytes.size()) {
        *unfinished = true;
        return 0;
      }
      const int low = i == 1 ? row.low : 0x80, high = i == 1 ? row.high : 0xBF;
      if (byte(i) < low || byte(i) > high) return 0;
    }
    return row.length;
  }
  return 0;
}

std::string Repaired(const std::string& bytes, bool end) {
  std::string text;
  for (size_t at = 0; at < bytes.size();) {
    size_t replaced = 0;
    bool unfinished = false;
    const size_t length = CodePointLength(bytes, at, &replaced, &unfinished);
    if (length == 0 && unfinished && !end) break;
    text += length > 0 ? bytes.substr(at, length) : std::string(kReplacement);
    at += length > 0 ? length : replaced;
  }
  return text;
}

class NaiveDecoder {
 public:
  explicit NaiveDecoder(std::vector<std::string> stops) : stops_(std::move(stops)) {}

  void Append(const std::string& bytes, bool match_stops) {
    if (!matched.empty()) return;
    const size_t before = Repaired(bytes_, false).size();
    bytes_ += bytes;
    const std::string text = Repaired(bytes_, false);
    size_t begin = std::string::npos;
    for (const std::string& stop : stops_) {
      for (size_t at = 0; match_stops && at + stop.size() <= text.size(); ++at) {
        if (text.compare(at, stop.size(), stop) != 0 || at + stop.size() <= before) continue;
        if (at < begin || (at == begin && stop.size() > matched.size())) {
          begin = at;
          matched = stop;
        }
      }
    }
    size_t held = 0;
    for (const std::string& stop : stops_) {
      for (size_t n = 1; n < stop.size() && n <= text.size(); ++n) {
        if (text.compare(text.size() - n, n, stop, 0, n) == 0) held = std::max(held, n);
      }
    }
    shown = matched.empty() ? text.substr(0, text.size() - held) : text.substr(0, begin);
  }

  void Finish() {
    if (matched.empty()) shown = Repaired(bytes_, true);
  }

  std::string shown;  // all of it
  std::string matched;

 private:
  const std::vector<std::string> stops_;
  std::string bytes_;
};

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t Below(uint64_t n) {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return (state_ >> 33) % n;
  }

 private:
  uint64_t state_;
};

/// Few letters, so that stops happen; whole code points, and bytes that are none.
std::string RandomPiece(Random* random, bool valid_only) {
  static const std::vector<std::string> kLetters = {
      "a", "b", "a", "b", "\n", "\xC3\xA9", "\xE4\xBD\xA0", "\xF0\x9F\xA6\x8A"};
  static constexpr unsigned char kBytes[] = {0x80, 0xBF, 0xA0, 0x9F, 0xC3, 0xE0, 0xE4, 0xED,
                                             0xEF, 0xF0, 0xF4, 0xF5, 0xC0, 0xFF, 0x00};
  if (valid_only || random->Below(4) > 0) return kLetters[random->Below(kLetters.size())];
  return std::string(1, static_cast<char>(kBytes[random->Below(sizeof(kBytes))]));
}

std::string RandomText(Random* random, size_t pieces, bool valid_only) {
  std::string text;
  for (size_t i = 0; i < pieces; ++i) text += RandomPiece(random, valid_only);
  return text;
}

TEST(StreamDecoderTest, AgreesWithItsDefinitionWhereverTheTextIsCut) {
  Random random(2506);
  int matches = 0, misses = 0;
  for (int round = 0; round < 4000; ++round) {
    std::vector<std::string> stops;
    for (uint64_t i = random.Below(4); i > 0; --i) {
      stops.push_back(RandomText(&random, 1 + random.Below(5), true));
    }
    if (random.Below(8) == 0) stops.push_back(std::string("a") + kReplacement);
    const std::string bytes = RandomText(&random, random.Below(40), false);
    StreamDecoder decoder(stops);
    NaiveDecoder naive(stops);
    std::string shown;
    const uint64_t longest_cut = 1 + random.Below(6);
    for (size_t at = 0; at < bytes.size();) {
      const size_t length = std::min<size_t>(random.Below(longest_cut + 1), bytes.size() - at);
      const bool match_stops = random.Below(4) > 0;
      shown += decoder.Append(bytes.substr(at, length), match_stops);
      naive.Append(bytes.substr(at, length), match_stops);
      at += length;
      ASSERT_EQ(shown, naive.shown) << "round " << round << ", byte " << at;
      ASSERT_EQ(decoder.matched_stop(), naive.matched) << "round " << round << ", byte " << at;
    }
    shown += decoder.Finish();
    naive.Finish();
    ASSERT_EQ(shown, naive.shown) << "round " << round;
    ++(naive.matched.empty() ? misses : matches);
  }
  EXPECT_GT(matches, 500);
  EXPECT_GT(misses, 500);
}

// A stop that the text almost is, again and again: quadratic work would take minutes here.
TEST(StreamDecoderTest, RepetitiveTextStaysLinear) {
  StreamDecoder decoder({std::string(255, 'a') + "b"});
  size_t shown = 0;
  for (int i = 0; i < 1'000'000; ++i) shown += decoder.Append("a").size();
  EXPECT_EQ(shown, 1'000'000u - 255u);
  EXPECT_EQ(decoder.Append("b"), "");
  EXPECT_EQ(decoder.matched_stop().size(), 256u);
}

}  // namespace
}  // namespace firesteel
