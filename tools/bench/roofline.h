// A roofline (Williams et al., CACM 2009) of a report, as a picture.

#ifndef FIRESTEEL_TOOLS_BENCH_ROOFLINE_H_
#define FIRESTEEL_TOOLS_BENCH_ROOFLINE_H_

#include <string>

#include "tools/bench/report.h"

namespace firesteel::bench {

/// An SVG: GFLOP/s over FLOP for each byte of weights and KV cache, both logarithmic. The roofs are
/// the speeds of memory and arithmetic measured in the report's own run, the dots its settings.
std::string ToRoofline(const Report& report);

}  // namespace firesteel::bench

#endif  // FIRESTEEL_TOOLS_BENCH_ROOFLINE_H_
