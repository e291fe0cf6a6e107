#include "tools/bench/roofline.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"

namespace firesteel::bench {
namespace {

// The picture's size and where its axes are, in pixels.
constexpr double kWidth = 860, kHeight = 520;
constexpr double kLeft = 70, kRight = 600, kTop = 40, kBottom = 460;

// A logarithmic axis from `low` to `high`, at pixels `from` to `to`.
struct Axis {
  double low, high, from, to;
  double At(double value) const {
    const double part = std::log(value / low) / std::log(high / low);
    return from + std::clamp(part, 0.0, 1.0) * (to - from);
  }
};

struct Dot {
  std::string label;
  double intensity;  // FLOP/byte
  double gflops;
  bool spark;
};

std::string Label(const Series& series) {
  const Setting& s = series.setting;
  const std::string what = s.prefill()
                               ? absl::StrCat("prefill ", s.prompt)
                               : absl::StrCat("decode, batch ", s.batch, ", context ", s.context);
  return absl::StrCat(series.spark ? "Spark " : "dense ", series.weights, ", ", what, ", ",
                      s.threads, s.threads == 1 ? " thread" : " threads");
}

std::vector<Dot> Dots(const Report& report) {
  std::vector<Dot> dots;
  for (const Series& series : report.series) {
    std::vector<double> speeds, flops, bytes;
    for (const Sample& run : series.runs) {
      speeds.push_back(run.tokens_per_second);
      flops.push_back(run.flops_per_token);
      bytes.push_back(run.bytes_per_token);
    }
    const double flops_per_token = Median(std::move(flops));
    dots.push_back({Label(series), flops_per_token / Median(std::move(bytes)),
                    flops_per_token * Median(std::move(speeds)) * 1e-9, series.spark});
  }
  return dots;
}

void Line(std::string* svg, double x1, double y1, double x2, double y2, const char* style) {
  absl::StrAppendFormat(svg, "<line x1='%.1f' y1='%.1f' x2='%.1f' y2='%.1f' %s/>\n", x1, y1, x2, y2,
                        style);
}

void Text(std::string* svg, double x, double y, const std::string& text, const char* style = "") {
  const std::string safe = absl::StrReplaceAll(text, {{"&", "&amp;"}, {"<", "&lt;"}});
  absl::StrAppendFormat(svg, "<text x='%.1f' y='%.1f' %s>%s</text>\n", x, y, style, safe);
}

// Lines at the powers of ten, with their values.
void DrawGrid(std::string* svg, const Axis& x, const Axis& y) {
  constexpr char kGrid[] = "stroke='#ddd'";
  for (double v = x.low; v <= x.high * 1.01; v *= 10) {
    Line(svg, x.At(v), kTop, x.At(v), kBottom, kGrid);
    Text(svg, x.At(v), kBottom + 18, absl::StrCat(v), "text-anchor='middle'");
  }
  for (double v = y.low; v <= y.high * 1.01; v *= 10) {
    Line(svg, kLeft, y.At(v), kRight, y.At(v), kGrid);
    Text(svg, kLeft - 8, y.At(v) + 4, absl::StrCat(v), "text-anchor='end'");
  }
  Text(svg, (kLeft + kRight) / 2, kBottom + 40, "FLOP for each byte of weights and KV cache",
       "text-anchor='middle'");
  Text(svg, 18, (kTop + kBottom) / 2, "GFLOP/s",
       "text-anchor='middle' transform='rotate(-90 18 250)'");
}

// The slope of memory and a flat roof above it.
void DrawRoof(std::string* svg, const Axis& x, const Axis& y, double gbps, double gflops,
              const std::string& name) {
  constexpr char kRoof[] = "stroke='#333' stroke-width='1.5'";
  const double ridge = gflops / gbps;
  const double start = std::max(x.low, y.low / gbps);
  Line(svg, x.At(start), y.At(start * gbps), x.At(ridge), y.At(gflops), kRoof);
  Line(svg, x.At(ridge), y.At(gflops), x.At(x.high), y.At(gflops), kRoof);
  Text(svg, kRight - 4, y.At(gflops) - 6, absl::StrFormat("%s, %.0f GFLOP/s", name, gflops),
       "text-anchor='end'");
}

}  // namespace

std::string ToRoofline(const Report& report) {
  const std::vector<Dot> dots = Dots(report);
  const MemorySpeed memory = MedianMemory(report);
  double highest = std::max(report.compute_speed.f32, report.compute_speed.bf16);
  double lowest = highest;
  double densest = 100;
  for (const Dot& dot : dots) {
    highest = std::max(highest, dot.gflops);
    lowest = std::min(lowest, dot.gflops);
    densest = std::max(densest, dot.intensity);
  }
  const auto power = [](double v, bool up) {
    const double exponent = std::log10(v);
    return std::pow(10.0, up ? std::ceil(exponent) : std::floor(exponent));
  };
  const Axis x{0.1, power(densest, true), kLeft, kRight};
  const Axis y{power(lowest, false), power(highest, true), kBottom, kTop};

  std::string svg = absl::StrFormat(
      "<svg xmlns='http://www.w3.org/2000/svg' width='%.0f' height='%.0f' viewBox='0 0 %.0f %.0f' "
      "font-family='sans-serif' font-size='12' fill='#222'>\n"
      "<rect width='100%%' height='100%%' fill='white'/>\n",
      kWidth, kHeight, kWidth, kHeight);
  Text(&svg, kLeft, 22,
       absl::StrFormat("%s, %d thread(s), %.1f GB/s", report.cpu, report.threads,
                       memory.sequential));
  DrawGrid(&svg, x, y);
  DrawRoof(&svg, x, y, memory.sequential, report.compute_speed.f32, "f32 vectors");
  if (report.compute_speed.bf16 > 0) {
    DrawRoof(&svg, x, y, memory.sequential, report.compute_speed.bf16,
             "bf16 matrix units, a product from the caches");
  }
  for (size_t i = 0; i < dots.size(); ++i) {
    const Dot& dot = dots[i];
    const double row = kTop + 16 * static_cast<double>(i);
    const std::string number = absl::StrCat(i + 1);
    absl::StrAppendFormat(&svg, "<circle cx='%.1f' cy='%.1f' r='4' fill='%s'/>\n",
                          x.At(dot.intensity), y.At(dot.gflops), dot.spark ? "#d9480f" : "#1971c2");
    Text(&svg, x.At(dot.intensity) + 6, y.At(dot.gflops) - 5, number);
    Text(&svg, kRight + 12, row, absl::StrCat(number, "  ", dot.label), "font-size='10'");
  }
  absl::StrAppend(&svg, "</svg>\n");
  return svg;
}

}  // namespace firesteel::bench
