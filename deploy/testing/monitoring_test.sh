#!/bin/bash
# Two servers under load, scraped by a real Prometheus that has our rules: every panel of every
# dashboard and every recording rule returns data that moves with the load, every alert looks at series that
# exist, and what the servers expose is clean to promtool.
#
# usage: deploy/testing/monitoring_test.sh BIN_DIR [PICTURES_DIR]
#   PICTURES_DIR  also draw the dashboards there (draw.sh; needs chromium); the load is then longer
readonly bin=${1:?usage: $0 BIN_DIR [PICTURES_DIR]}
readonly pictures=${2:-}
# shellcheck source=deploy/testing/common.sh
source "$(dirname "$0")/common.sh"
need prometheus promtool jq curl

readonly window=10s # of rates: shorter than Grafana's, so that the test is

# The queue of the second one is so short that it has to refuse.
start_server first --address 127.0.0.1:0 --max-batch-size 8
start_server second --address 127.0.0.1:0 --max-batch-size 4 --max-queue-requests 4

cp "$source_dir/deploy/prometheus/rules.yaml" "$scratch/"
cat >"$scratch/prometheus.yaml" <<YAML
global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files: [rules.yaml]
scrape_configs:
  - job_name: firesteel
    static_configs: [{targets: ["${metrics[first]}", "${metrics[second]}"]}]
YAML
start_prometheus "$scratch/prometheus.yaml"
readonly begin=$(date +%s)

scraped() { [[ $(ask 'count(firesteel_build_info)' | jq -r '.[0].value[1] // 0') == 2 ]]; }
wait_until 60 "two replicas scraped" scraped

# A load of three parts, so that it rises and falls; the second server's is more than it takes.
load() { # NAME CONCURRENCY SECONDS
  "$bin/firesteel" load --address "${address[$1]}" --concurrency "$2" --duration "$3s" --max-tokens 80 \
    --temperature 0.8 --json >"$scratch/load-$1-$2.json" || fail "load on $1"
}
length=12
[[ -z $pictures ]] || length=30
{
  load first 2 $length
  load first 6 $length
} &
loads=$!
{
  load second 2 $length
  load second 12 $length
  # Something that the caller got wrong is no failure of the server's.
  ! "$bin/firesteel" generate --address "${address[second]}" --model nobody x 2>/dev/null
} &
wait $loads && wait $!
readonly finish=$(date +%s)

for name in first second; do
  curl -fs "http://${metrics[$name]}/metrics" >"$scratch/$name.metrics"
  # Only a summary of what is wrong goes to standard error.
  promtool check metrics <"$scratch/$name.metrics" >"$scratch/check" 2>&1 ||
    { cat "$scratch/check" >&2; fail "promtool check metrics: $name"; }
done
say "promtool finds nothing wrong with /metrics"

# Has at least one number, and not always the same one.
has_data() { jq -e '[.[].values[]? | .[1] | select(. != "NaN" and . != "+Inf")] | length > 0' <<<"$1" >/dev/null; }
moves() { jq -e 'any(.[]; [.values[] | .[1] | select(. != "NaN")] | unique | length > 1)' <<<"$1" >/dev/null; }
constant='What runs|Replicas up'

panels=0
for dashboard in "$source_dir"/deploy/grafana/dashboards/*.json; do
  while IFS= read -r panel; do
    title=$(jq -r .title <<<"$panel")
    moving=0
    while IFS= read -r expression; do
      answer=$(ask_range "$(expand "$expression" $window)" "$begin" "$finish" 1) ||
        fail "$(basename "$dashboard"), $title: Prometheus refuses $expression"
      has_data "$answer" || fail "$(basename "$dashboard"), $title: no data from $expression"
      ! moves "$answer" || moving=1
    done < <(jq -r '.targets[].expr' <<<"$panel")
    [[ $moving == 1 || $title =~ ^($constant)$ ]] ||
      fail "$(basename "$dashboard"), $title: does not move with the load"
    panels=$((panels + 1))
  done < <(jq -c '.panels[]' "$dashboard")
done
say "$panels panels return data that moves with the load"

rules=$(curl -fs "$prometheus/api/v1/rules" | jq -c '[.data.groups[].rules[]]')
bad=$(jq -r '.[] | select(.health != "ok") | "\(.name): \(.lastError)"' <<<"$rules")
[[ -z $bad ]] || fail "rules: $bad"
# Shares of what is slow: zero all the time on a machine that is fast enough.
zero_when_fast='_slow:'
while IFS= read -r name; do
  answer=$(ask_range "$name" "$begin" "$finish" 1)
  has_data "$answer" || fail "rule $name has no data"
  moves "$answer" || [[ $name =~ $zero_when_fast ]] || fail "rule $name does not move with the load"
done < <(jq -r '.[] | select(.type == "recording") | .name' <<<"$rules")
# An alert's expression has no result while all is well; the series that it looks at must be there.
while IFS= read -r name; do
  [[ $(ask "count($name)") != "[]" ]] || fail "an alert looks at $name, which does not exist"
done < <(jq -r '.[] | select(.type == "alerting") | .query' <<<"$rules" |
  grep -oE '\b(firesteel|grpc|up|job:|model_name:)[A-Za-z0-9_:]*' | grep -vx firesteel | sort -u)
say "$(jq length <<<"$rules") rules evaluate, over series that exist"

# The load itself was one: refusals were counted, and the alert for them is on its way.
pending() { [[ $(ask "ALERTS{alertname=\"$1\"}") != "[]" ]]; }
pending FiresteelQueueSaturated || wait_until 30 FiresteelQueueSaturated pending FiresteelQueueSaturated
kill -KILL "${server_pid[second]}"
wait_until 60 FiresteelReplicaDown pending FiresteelReplicaDown
say "alerts see a full queue and a replica that died"

if [[ -n $pictures ]]; then
  for dashboard in service sparsity fleet; do
    "$source_dir/deploy/grafana/draw.sh" "$prometheus" "$source_dir/deploy/grafana/dashboards/$dashboard.json" \
      "$pictures/$dashboard.png" "$begin" "$finish"
  done
  say "pictures are in $pictures"
fi
