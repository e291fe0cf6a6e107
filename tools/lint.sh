#!/bin/bash
# Checks the format of every tracked C++ file, then runs clang-tidy (.clang-tidy) over our own
# sources, never over generated ones.
#
# usage: tools/lint.sh BUILD_DIR [JOBS]     (BUILD_DIR: a configured build, for its compile commands)
set -euo pipefail

readonly build=${1:?usage: tools/lint.sh BUILD_DIR [JOBS]}
readonly jobs=${2:-$(nproc)}

git ls-files -z '*.h' '*.cc' | xargs -0 clang-format-19 --dry-run -Werror
echo "lint: the format is right"

# Our sources include the headers that protoc generates.
cmake --build "$build" -j "$jobs" --target firesteel_proto >/dev/null
run-clang-tidy-19 -quiet -j "$jobs" -p "$build" -warnings-as-errors='*' \
  "^$PWD/(kernels|runtime|server|tools)/" 2>&1 >"$build/clang-tidy.log" |
  grep -v -E '^[0-9]+ warnings? |^Suppressed |^Use -header-filter' || true
