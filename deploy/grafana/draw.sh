#!/bin/bash
# Draws a dashboard to a picture without Grafana: asks Prometheus what the panels ask, and lets
# headless Chromium draw the answers.
#
# usage: deploy/grafana/draw.sh PROMETHEUS_URL DASHBOARD.json OUT.png [FROM TO]
#   FROM TO   Unix seconds; without them the last two minutes
set -euo pipefail
[[ $# -eq 3 || $# -eq 5 ]] || { echo "usage: $0 PROMETHEUS_URL DASHBOARD.json OUT.png [FROM TO]" >&2; exit 2; }
readonly url=$1 dashboard=$2 out=$3 to=${5:-$(date +%s)}
readonly from=${4:-$((to - 120))}
readonly width=1400
for program in curl jq chromium; do
  command -v $program >/dev/null || { echo "$0: needs $program" >&2; exit 1; }
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

step=$(((to - from) / 240 + 1))
rate=$((step * 4 > 10 ? step * 4 : 10))s
jq -c '.panels[] | .id as $id | .targets[] | [$id, .refId, .legendFormat, .expr]' "$dashboard" |
  while IFS= read -r target; do
    expression=$(jq -r '.[3]' <<<"$target")
    expression=${expression//\$__rate_interval/$rate}
    expression=${expression//\$model/.+}
    expression=${expression//\$instance/.+}
    curl -fsG "$url/api/v1/query_range" --data-urlencode "query=$expression" -d "start=$from" -d "end=$to" \
      -d "step=$step" | jq -c --argjson target "$target" \
      '{panel: $target[0], legend: $target[2], result: .data.result}'
  done | jq -cs . >"$folder/answers.json"

{
  cat "$(dirname "$0")/draw.html"
  echo '<script>draw('
  jq -c . "$dashboard" | sed 's/</\\u003c/g'
  echo ','
  sed 's/</\\u003c/g' "$folder/answers.json"
  echo ", $from, $to);</script>"
} >"$folder/page.html"
height=$(jq '[.panels[].gridPos | .y + .h] | max * 34 + 70' "$dashboard")
# Chromium's sandbox needs rights that a container has not; the page is our own.
chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --force-device-scale-factor=1 \
  --user-data-dir="$folder/profile" --window-size="$width,$height" --screenshot="$folder/shot.png" \
  "file://$folder/page.html" >"$folder/log" 2>&1 || { cat "$folder/log" >&2; exit 1; }
mkdir -p "$(dirname "$out")"
mv "$folder/shot.png" "$out"
