#!/bin/bash
# Three replicas behind HAProxy with the configuration of deploy/compose, under open-loop load. One is killed:
# only requests that were in flight on it fail. One is drained and restarted: none fails. After
# each, the load is even again.
#
# usage: deploy/testing/fleet_test.sh BIN_DIR
readonly bin=${1:?usage: $0 BIN_DIR}
# shellcheck source=deploy/testing/common.sh
source "$(dirname "$0")/common.sh"
need haproxy jq curl socat

for name in one two three; do start_server $name --address 127.0.0.1:0; done

readonly socket=$scratch/haproxy.sock
balancer=127.0.0.1:$(free_port)
{
  sed -e "s|stats socket .*|stats socket $socket mode 600 level admin|" \
    -e "s|bind :50051 proto h2.*|bind $balancer proto h2|" \
    -e "s|bind :8404.*|bind unix@$scratch/stats.sock|" -e '/server-template/d' \
    -e '/^resolvers/,$d' "$source_dir/deploy/compose/haproxy.cfg"
  # The lines marked (*), with the addresses of this test.
  for name in one two three; do echo "    server $name ${address[$name]}"; done
} >"$scratch/haproxy.cfg"
# The servers stand in the last section of the file, which must be the replicas' own.
grep -q '^backend replicas' "$scratch/haproxy.cfg" || fail "haproxy.cfg has no backend named replicas"
start haproxy haproxy -db -f "$scratch/haproxy.cfg"
wait_until 30 HAProxy test -S "$socket"

admin() { socat - "UNIX-CONNECT:$socket" <<<"$1"; }
stat_of() { # SERVER FIELD, as `show stat` names it
  admin "show stat" | awk -F, -v server="$1" -v field="$2" \
    'NR == 1 { for (i = 1; i <= NF; ++i) column[$i] = i } $1 == "replicas" && $2 == server { print $column[field] }'
}
is() { [[ $(stat_of "$1" status) == "$2"* ]]; }
requests_of() { # NAME: generations that have ended there
  curl -fs "http://${metrics[$1]}/metrics" | awk '/^firesteel_requests_total/ { n += $2 } END { print n + 0 }'
}
for name in one two three; do wait_until 60 "$name behind the balancer" is $name UP; done

load() { # NAME REQUESTS A_SECOND SECONDS TOKENS
  "$bin/firesteel" load --address "$balancer" --rate "$2" --duration "$3s" --max-tokens "$4" --ignore-eos \
    --json >"$scratch/$1.json" 2>"$scratch/$1.log"
}
failed() { jq .requests.failed "$scratch/$1.json"; }
codes() { jq -c '.errors | map_values(.count)' "$scratch/$1.json"; }

# --- Killed ---
load kill 4 12 100 &
loading=$!
busy() { (($(stat_of two scur) > 0)); }
wait_until 60 "requests on replica two" busy
# Stopped first, so that what it has in flight can be counted before it dies.
kill -STOP "${server_pid[two]}"
in_flight=$(stat_of two scur)
kill -KILL "${server_pid[two]}"
wait_until 20 "the balancer to notice" is two DOWN
wait $loading || fail "load while a replica is killed"
say "killed with $in_flight in flight: $(failed kill) of $(jq .requests.measured "$scratch/kill.json") requests failed $(codes kill)"
# A request may have been on its way to it between the count and the kill.
(($(failed kill) <= in_flight + 1)) || fail "more requests failed than were in flight on it"

start_server two --address "${address[two]}"
wait_until 10 "the balancer to take it back" is two UP

# --- Drained and restarted ---
load drain 4 12 100 &
loading=$!
busy_three() { (($(stat_of three scur) > 0)); }
wait_until 60 "requests on replica three" busy_three
admin "set server replicas/three state drain" >/dev/null
kill -TERM "${server_pid[three]}"
wait "${server_pid[three]}" || fail "the drained server ended with status $?"
start_server three --address "${address[three]}"
admin "set server replicas/three state ready" >/dev/null
wait_until 10 "the balancer to take it back" is three UP
wait $loading || fail "load while a replica is drained"
say "drained and restarted: $(failed drain) of $(jq .requests.measured "$scratch/drain.json") requests failed $(codes drain)"
(($(failed drain) == 0)) || fail "a drained replica lost requests"

# --- Even again ---
declare -A before
for name in one two three; do before[$name]=$(requests_of $name); done
load even 8 12 16
shares=()
for name in one two three; do shares+=($(($(requests_of $name) - before[$name]))); done
mapfile -t sorted < <(printf '%s\n' "${shares[@]}" | sort -n)
say "even again: ${shares[*]} requests; slowest first token $(jq .time_to_first_token_seconds.max "$scratch/even.json") s"
((sorted[2] * 10 <= sorted[0] * 13)) || fail "max/min of ${shares[*]} is above 1.3"
(($(failed even) == 0)) || fail "requests failed: $(codes even)"
