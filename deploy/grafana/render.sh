#!/bin/bash
# Writes dashboards/*.json from dashboards.jsonnet; with --check only says whether they agree.
#
# usage: deploy/grafana/render.sh [--check]     (needs jsonnet: apt-get install jsonnet)
set -euo pipefail
cd "$(dirname "$0")"
if [[ ${1:-} == --check ]]; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  jsonnet -m "$scratch" dashboards.jsonnet >/dev/null
  diff -r "$scratch" dashboards || { echo "dashboards/ is not what dashboards.jsonnet makes: run $0" >&2; exit 1; }
else
  mkdir -p dashboards
  jsonnet -m dashboards dashboards.jsonnet
fi
