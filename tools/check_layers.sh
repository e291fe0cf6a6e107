#!/bin/bash
# Checks that includes follow the layers (CONTRIBUTING.md): no folder includes what lies above it,
# and no folder but its own includes a library that one folder is there to hide.
#
# usage: tools/check_layers.sh [ROOT]           checks the sources of ROOT (default: this project)
#        tools/check_layers.sh --self-test      checks that each rule finds what it forbids
set -euo pipefail

# folders | an include (extended regular expression, after the quote or bracket) they may not have
readonly RULES='
kernels                  | (runtime|server|tools|firesteel)/
kernels                  | (absl|grpcpp?|google|prometheus|spdlog|nlohmann)/
runtime                  | (server|tools|firesteel)/
runtime                  | (grpcpp?|google|prometheus|spdlog|CLI)/
server                   | tools/
tools                    | server/
tools/client             | (runtime|kernels)/
runtime server tools     | hwy/
'

violations() { # ROOT: prints FILE:LINE:INCLUDE for each; fails if there is any
  local root=$1 folders forbidden folder found=0
  while IFS='|' read -r folders forbidden; do
    for folder in $folders; do
      [[ -d $root/$folder ]] || continue
      if grep -rnE --include='*.h' --include='*.cc' \
        "^[[:space:]]*#[[:space:]]*include[[:space:]]*[<\"]${forbidden// /}" "$root/$folder"; then
        found=1
      fi
    done
  done < <(grep . <<<"$RULES")
  return $found
}

self_test() {
  local scratch case
  scratch=$(mktemp -d)
  # shellcheck disable=SC2064
  trap "rm -rf '$scratch'" EXIT
  for case in kernels:runtime/x.h kernels:absl/x.h runtime:server/x.h runtime:grpcpp/x.h \
    runtime:google/protobuf/x.h runtime:prometheus/x.h server:tools/x.h tools:server/x.h \
    tools/client:runtime/x.h server:hwy/highway.h runtime/model:hwy/highway.h; do
    mkdir -p "$scratch/${case%%:*}"
    echo "# include <${case#*:}>" >"$scratch/${case%%:*}/a.cc"
    if violations "$scratch" >/dev/null; then
      echo "not found: ${case%%:*} includes ${case#*:}" >&2
      return 1
    fi
    echo '#include "kernels/hwy.h"  // server/' >"$scratch/${case%%:*}/a.cc"
    [[ $case != tools/client:* ]] || rm "$scratch/${case%%:*}/a.cc"
    if ! violations "$scratch" >&2; then
      echo "found though allowed, in ${case%%:*}" >&2
      return 1
    fi
  done
}

if [[ ${1:-} == --self-test ]]; then
  self_test
elif ! violations "${1:-$(dirname "$0")/..}"; then
  echo "the includes above go against the layers" >&2
  exit 1
fi
