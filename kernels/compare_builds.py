#!/usr/bin/env python3
"""Compares the kernel benchmarks of builds (of two compilers, say) in alternating runs.

  kernels/compare_builds.py [--rounds 5] [--filter REGEX] NAME=BUILD_DIR NAME=BUILD_DIR …

Prints a Markdown table of median CPU times, and how much longer than the first build's each takes. Runs
alternate because the clock and the neighbours of a machine change from minute to minute; CPU time, as
other processes may take the core away.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys

TOPICS = ("machine", "matmul", "sparse_ffn", "attention", "statistical_topk", "elementwise")


def run(program, pattern):
    """CPU time in nanoseconds and the rates of every benchmark of a program."""
    command = [program, "--benchmark_format=json", "--benchmark_min_time=0.1",
               f"--benchmark_filter={pattern}"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    if not result.stdout.strip():  # nothing matched the filter
        return {}
    return {b["name"]: (b["cpu_time"], b) for b in json.loads(result.stdout)["benchmarks"]}


def rate(bench, median):
    """The benchmark's own rate at the median time."""
    for counter, unit in (("FLOP/s", "GFLOP/s"), ("B/s", "GB/s")):
        # Benchmarks of few tokens are bound by the bytes of weights that they read.
        if counter == "FLOP/s" and "tokens:1/" in bench["name"]:
            continue
        if counter in bench:
            return f"{bench[counter] * bench['cpu_time'] / median / 1e9:.1f} {unit}"
    return ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("builds", nargs="+", metavar="NAME=BUILD_DIR")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--filter", default=".")
    arguments = parser.parse_args()
    builds = [b.partition("=")[::2] for b in arguments.builds]
    if any(not os.path.isdir(os.path.join(path, "bin")) for _, path in builds):
        sys.exit("every argument is NAME=BUILD_DIR, where BUILD_DIR/bin has the benchmarks")

    times = {name: {} for name, _ in builds}
    last = {}
    for turn in range(arguments.rounds):
        for topic in TOPICS:
            for name, path in builds if turn % 2 == 0 else builds[::-1]:
                program = os.path.join(path, "bin", f"kernels_{topic}_bench")
                for benchmark, (nanoseconds, bench) in run(program, arguments.filter).items():
                    times[name].setdefault(benchmark, []).append(nanoseconds)
                    last[benchmark] = bench

    names = [name for name, _ in builds]
    print("| benchmark | " + " | ".join(f"{n}, µs | rate" for n in names) + " | "
          + " | ".join(f"{n} / {names[0]}" for n in names[1:]) + " |")
    print("|---|" + "--:|" * (3 * len(names) - 1))
    logs = {name: [] for name in names[1:]}
    for benchmark in last:
        medians = [statistics.median(times[name][benchmark]) for name in names]
        cells = []
        for median in medians:
            cells += [f"{median / 1e3:.3g}" if median < 1e6 else f"{median / 1e3:.0f}",
                      rate(last[benchmark], median)]
        for name, median in zip(names[1:], medians[1:]):
            cells.append(f"{median / medians[0]:.2f}")
            if not benchmark.startswith(("FmaPeak", "ReadBandwidth")):
                logs[name].append(math.log(median / medians[0]))
        print(f"| {benchmark} | " + " | ".join(cells) + " |")
    for name, values in logs.items():
        mean = math.exp(statistics.fmean(values)) if values else float("nan")
        print(f"\nGeometric mean of {name} / {names[0]} over {len(values)} kernels: {mean:.3f}")


if __name__ == "__main__":
    main()
