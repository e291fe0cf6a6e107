#!/bin/bash
# Checks the format of every tracked C++ file, then runs clang-tidy (.clang-tidy) over our own
# sources: neither over generated ones nor over tests and benchmarks, which would more than double
# the time that it takes.
#
# usage: tools/lint.sh BUILD_DIR [JOBS]     (BUILD_DIR: a configured build, for its compile commands)
set -euo pipefail

readonly build=${1:?usage: tools/lint.sh BUILD_DIR [JOBS]}
readonly jobs=${2:-$(nproc)}
readonly log=$build/clang-tidy.log

git ls-files -z '*.h' '*.cc' | xargs -0 clang-format-19 --dry-run -Werror
echo "lint: every file has the project's format"

# Our sources include the headers that protoc generates.
cmake --build "$build" -j "$jobs" --target firesteel_proto >/dev/null
if ! run-clang-tidy-19 -quiet -j "$jobs" -p "$build" \
  "^$PWD/(kernels|runtime|server|tools)/(?!.*_(test|bench)\.cc$)" >"$log" 2>&1; then
  # Of the log only the findings: the rest is command lines and counts of system warnings.
  grep -v -E '^\[|^clang-tidy|warnings? (generated|treated)|^Suppressed|^Use -' "$log" >&2
  echo "lint: clang-tidy has findings (whole log: $log)" >&2
  exit 1
fi
echo "lint: clang-tidy has no findings"
