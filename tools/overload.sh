#!/bin/bash
# What a server does at 80% and at 150% of the load that it can take. Measures its speed unloaded, and
# its capacity: what it completes of twice as much as a batch that is kept full takes. Then sends
# requests of mixed lengths at both rates, whatever becomes of them (an open loop), and compares
# goodput: requests whose first token came within TTFT and whose mean time between tokens was at most
# 3 times that of a request that had the server to itself.
#
# usage: tools/overload.sh BIN_DIR [SERVER OPTION…]
#   BIN_DIR          holds firesteel-server and firesteel
#   SERVER OPTION…   default: --model models/spark-stories --max-batch-size 3 --max-queue-ms 500
#   from the environment: TTFT (1s), PROMPT (8-128 tokens), ANSWER (16-128 tokens), SECONDS_EACH (20)
set -euo pipefail

readonly bin=${1:?usage: $0 BIN_DIR [SERVER OPTION…]}
shift
(($#)) || set -- --model "$(dirname "$0")/../models/spark-stories" --max-batch-size 3 --max-queue-ms 500
readonly seconds=${SECONDS_EACH:-20}
scratch=$(mktemp -d)
server=
finish() {
  [[ -z $server ]] || { kill "$server" && wait "$server" || true; } 2>/dev/null
  rm -rf "$scratch"
}
trap finish EXIT

"$bin/firesteel-server" --address 127.0.0.1:0 --metrics-address 127.0.0.1:0 --log-level warn "$@" >"$scratch/out" &
server=$!
until grep -q '^listening on ' "$scratch/out"; do
  kill -0 "$server" || exit 1
  sleep 0.1
done
address=$(sed -n 's/^listening on \([^,]*\),.*/\1/p' "$scratch/out")
metrics=$(sed -n 's/.*metrics on \(.*\)/\1/p' "$scratch/out")
places=$("$bin/firesteel-server" --print-config "$@" | sed -n 's/^max-batch-size: //p')

load() { # NAME OPTION…
  local name=$1
  shift
  "$bin/firesteel" load --address "$address" --json --prompt-tokens "${PROMPT:-8-128}" \
    --max-tokens "${ANSWER:-16-128}" --ignore-eos "$@" >"$scratch/$name.json"
}
figure() { jq -r "$2" "$scratch/$1.json"; } # NAME FILTER

load alone --concurrency 1 --duration 6s --warm-up 1s --seed 1
itl=$(figure alone '.inter_token_latency_seconds.mean')
load full --concurrency "$places" --duration 5s --warm-up 2s --seed 2
load flood --rate "$(figure full '2 * .requests.per_second')" --duration 12s --warm-up 2s --seed 4
capacity=$(figure flood '.requests.per_second')
slo=$(jq -rn --argjson itl "$itl" --arg ttft "${TTFT:-1s}" '"ttft=\($ttft),itl=\(3000 * $itl)ms"')
printf 'unloaded: %.2f ms between tokens; capacity: %.2f requests/s, %.1f tokens/s, %.2f ms between tokens, %d at once\n' \
  "$(figure alone '1e3 * .inter_token_latency_seconds.mean')" "$capacity" "$(figure flood .tokens.generated_per_second)" \
  "$(figure flood '1e3 * .inter_token_latency_seconds.mean')" "$places"
printf 'objectives: %s\n' "$slo"

# The longest queue, looked at four times a second.
watch_queue() { # FILE
  while true; do
    curl -fs "http://$metrics/metrics" | sed -n 's/^firesteel_requests_waiting{.*} //p'
    sleep 0.25
  done >"$1"
}
for percent in 80 150; do
  rate=$(jq -n --argjson c "$capacity" --argjson p $percent '$c * $p / 100')
  watch_queue "$scratch/queue" &
  watcher=$!
  load $percent --rate "$rate" --duration "${seconds}s" --warm-up 3s --slo "$slo" --seed 3
  kill $watcher
  wait $watcher 2>/dev/null || true
  printf '%3d%%: %.2f requests/s asked for, goodput %.2f, first token p50 %.0f p99 %.0f ms, between tokens p50 %.1f p99 %.1f ms, queue at most %d\n' \
    $percent "$rate" "$(figure $percent .goodput.per_second)" \
    "$(figure $percent '1e3 * .time_to_first_token_seconds.p50')" "$(figure $percent '1e3 * .time_to_first_token_seconds.p99')" \
    "$(figure $percent '1e3 * .inter_token_latency_seconds.p50')" "$(figure $percent '1e3 * .inter_token_latency_seconds.p99')" \
    "$(sort -n "$scratch/queue" | tail -n 1)"
  figure $percent '.errors | to_entries[] | "      \(.key): \(.value.count), after p50 \(1e5 * .value.latency_seconds.p50 | round / 100) p99 \(1e5 * .value.latency_seconds.p99 | round / 100) max \(1e5 * .value.latency_seconds.max | round / 100) ms"'
done
jq -rn --argjson calm "$(figure 80 .goodput.per_second)" --argjson storm "$(figure 150 .goodput.per_second)" \
  '"goodput at 150% / at 80%: \(1e3 * $storm / $calm | round / 1e3)"'
