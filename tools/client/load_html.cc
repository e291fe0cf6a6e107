// The page of a load run: the JSON report, and a script that draws it as inline SVG.

#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "tools/client/load_report.h"

namespace firesteel::client {
namespace {

constexpr char kHead[] = R"html(<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>firesteel load</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; --line: #8884; --muted: #888; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1000px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: 0; }
h2 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
p { margin: .3rem 0; color: var(--muted); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .5rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
svg { width: 100%; height: auto; }
svg text { fill: currentColor; font-size: 12px; }
svg .grid { stroke: var(--line); }
svg path { fill: none; stroke-width: 2; }
</style></head><body>
<h1>firesteel load</h1><p id="setup"></p>
<h2>Requests</h2><table id="figures"></table>
<h2>Latency</h2><table id="latency"></table>
<h2>Latency by quantile</h2><div id="quantiles"></div>
<h2>Each second</h2><p>The warm-up included; tokens count where their request ends.</p><div id="timeline"></div>
<h2>Failures</h2><table id="errors"></table>
<script type="application/json" id="report">)html";

constexpr char kTail[] = R"html(</script>
<script>
"use strict";
const report = JSON.parse(document.getElementById("report").textContent);
const colours = ["#3b82f6", "#e8590c", "#2f9e44", "#9c36b5"];
const seconds = s => s === 0 ? "0" : s < 1e-3 ? (s * 1e6).toPrecision(3) + " µs" :
    s < 1 ? (s * 1e3).toPrecision(3) + " ms" : s.toPrecision(3) + " s";
const plain = x => x >= 1000 ? x.toFixed(0) : String(+x.toPrecision(3));
const percent = x => (100 * x).toFixed(1) + "%";

function fill(id, head, rows) {
  const table = document.getElementById(id);
  for (const [cells, tag] of [...(head ? [[head, "th"]] : []), ...rows.map(row => [row, "td"])]) {
    const line = table.insertRow();
    for (const cell of cells) {
      const element = document.createElement(tag);
      element.textContent = cell;
      line.append(element);
    }
  }
}

// Lines over one x axis. `series`: {name, points: [[x, y], …]}; a logarithmic y axis where `log`.
function chart(id, series, {log = false, xLabel, y = plain}) {
  const ns = "http://www.w3.org/2000/svg", width = 1000, height = 300;
  const left = 80, right = 20, top = 30, bottom = 40;
  const svg = document.createElementNS(ns, "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const add = (name, attributes, text) => {
    const element = document.createElementNS(ns, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    svg.append(element);
  };
  const points = series.flatMap(s => s.points);
  if (points.length === 0) return;
  const xMax = Math.max(...points.map(p => p[0]), 1e-9), positive = points.map(p => p[1]).filter(v => v > 0);
  const scale = log ? Math.log10 : v => v;
  let low = log ? Math.floor(Math.log10(Math.min(...positive, 1))) : 0;
  let high = log ? Math.ceil(Math.log10(Math.max(...positive, 1e-6))) : Math.max(...positive, 1) * 1.05;
  if (high <= low) high = low + 1;
  const px = x => left + (width - left - right) * x / xMax;
  const py = v => height - bottom - (height - top - bottom) * (scale(v) - low) / (high - low);
  const ticks = log ? Array.from({length: high - low + 1}, (_, i) => 10 ** (low + i)) :
      [0, .25, .5, .75, 1].map(f => f * high);
  for (const tick of ticks) {
    add("line", {x1: left, x2: width - right, y1: py(tick), y2: py(tick), class: "grid"});
    add("text", {x: left - 8, y: py(tick) + 4, "text-anchor": "end"}, y(tick));
  }
  for (const f of [0, .25, .5, .75, 1]) {
    add("text", {x: px(f * xMax), y: height - bottom + 18, "text-anchor": "middle"}, plain(f * xMax));
  }
  add("text", {x: width - right, y: height - 6, "text-anchor": "end"}, xLabel);
  series.forEach((s, i) => {
    const drawn = s.points.filter(p => !log || p[1] > 0);
    add("path", {stroke: colours[i], d: drawn.map((p, k) => `${k ? "L" : "M"}${px(p[0])},${py(p[1])}`).join("")});
    add("rect", {x: left + 220 * i, y: 6, width: 12, height: 12, fill: colours[i]});
    add("text", {x: left + 220 * i + 18, y: 16}, s.name);
  });
  document.getElementById(id).append(svg);
}

const {setup, requests, goodput, tokens, sparsity} = report;
document.getElementById("setup").textContent = [setup.target, setup.model, setup.arrivals,
    `up to ${setup.max_tokens} tokens each`].filter(Boolean).join(", ");
const objectives = Object.entries(setup.objectives).map(([k, v]) => `${k.replace("_seconds", "")} ≤ ${seconds(v)}`);
fill("figures", null, [
  ["measured", `${requests.measured} in ${seconds(report.seconds)}, after ${requests.warm_up} of warm-up`],
  ["succeeded", `${requests.succeeded}, ${plain(requests.per_second)} a second`],
  ["failed", requests.failed],
  ...(objectives.length ? [[`within ${objectives.join(", ")}`,
      `${goodput.within_objectives}, ${plain(goodput.per_second)} a second`]] : []),
  ["generated tokens", `${tokens.generated}, ${plain(tokens.generated_per_second)} a second`],
  ["prompt tokens", tokens.prompt],
  ["FFN neurons active", percent(sparsity.ffn_active_fraction)],
  ["positions attended to", `${plain(sparsity.attention_attended_positions)}, ${percent(sparsity.attention_attended_fraction)}`],
  ["FLOPs skipped", percent(sparsity.flops_skipped_fraction)],
]);
const latencies = [["time to first token", report.time_to_first_token_seconds],
  ["inter-token latency", report.inter_token_latency_seconds],
  ["end to end", report.e2e_request_latency_seconds],
  ["queue, by the server", report.request_queue_time_seconds]].filter(([, d]) => d.count > 0);
const columns = ["mean", "min", "p50", "p90", "p95", "p99", "max"];
fill("latency", ["", ...columns], latencies.map(([name, d]) => [name, ...columns.map(c => seconds(d[c]))]));
chart("quantiles", latencies.map(([name, d]) => ({name, points: d.quantiles.map((v, i) => [i, v])})),
    {log: true, xLabel: "% of all", y: seconds});
const line = key => report.timeline.map((second, i) => [i, second[key]]);
chart("timeline", [["requests due", "due"], ["succeeded", "succeeded"], ["failed", "failed"]]
    .map(([name, key]) => ({name, points: line(key)})), {xLabel: "seconds"});
chart("timeline", [{name: "tokens", points: line("tokens")}], {xLabel: "seconds"});
const errors = Object.entries(report.errors);
fill("errors", ["code", "requests", "p50", "p99", "max", "for example"], errors.length ?
    errors.map(([code, e]) => [code, e.count,
        ...["p50", "p99", "max"].map(c => e.latency_seconds.count ? seconds(e.latency_seconds[c]) : ""), e.example]) :
    [["none", "", "", "", "", ""]]);
</script></body></html>
)html";

}  // namespace

std::string LoadHtml(const LoadSetup& setup, const LoadSummary& summary) {
  // Inside a script element "</" and "<!--" would end or change it: no "<" of the report stands for
  // itself.
  const std::string json = absl::StrReplaceAll(LoadJson(setup, summary), {{"<", "\\u003c"}});
  return absl::StrCat(kHead, json, kTail);
}

}  // namespace firesteel::client
