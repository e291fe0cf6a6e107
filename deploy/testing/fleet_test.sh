#!/bin/bash
# Three replicas, each in a network namespace of its own as if on three machines, behind HAProxy with the configuration
# of deploy/compose, under open-loop load. One is killed: only requests that were in flight on it fail. One gets
# SIGTERM, drains and is started again: none fails. Each time the load is even within ten seconds after the replica is
# back.
#
# usage: deploy/testing/fleet_test.sh BIN_DIR
readonly bin=${1:?usage: $0 BIN_DIR}

if [[ ${FIRESTEEL_FLEET:-} != inside ]]; then
  # A network, mounts and processes of our own, which all end with the test; without root in a namespace of users, too.
  own=(unshare --net --mount --pid --fork --kill-child --mount-proc)
  [[ $(id -u) -eq 0 ]] || own+=(--map-root-user)
  PATH=$PATH:/usr/sbin:/sbin
  "${own[@]}" bash -c 'mount -t tmpfs tmpfs /run && ip netns add x && ip link add x type bridge &&
    ip link add y type veth peer name z netns x' 2>/dev/null ||
    { echo "skipped: network namespaces are not permitted here"; exit 77; }
  FIRESTEEL_FLEET=inside exec "${own[@]}" "$0" "$@"
fi
mount -t tmpfs tmpfs /run # where ip keeps its namespaces

# shellcheck source=deploy/testing/common.sh
source "$(dirname "$0")/common.sh"
need haproxy jq curl socat ip

# --- Machines: the balancer's, three for replicas, one for clients ---
ip link add fleet type bridge
ip link set fleet up
ip link set lo up
declare -A host
machine() { # NAME NUMBER
  ip netns add "$1"
  ip link add "to-$1" type veth peer name eth0 netns "$1"
  ip link set "to-$1" master fleet up
  ip -n "$1" link set lo up
  ip -n "$1" link set eth0 up
  ip -n "$1" address add "10.77.0.$2/24" dev eth0
  host[$1]=10.77.0.$2
}
machine balancer 1
machine clients 2
readonly replicas=(one two three)
for i in 0 1 2; do machine "${replicas[i]}" $((11 + i)); done

on() { # MACHINE COMMAND…
  ip netns exec "$@"
}
serve() { # REPLICA
  on_machine=$1 start_server "$1" --address "${host[$1]}:50051" --metrics-address "${host[$1]}:9464" \
    --withdraw-seconds 3 --drain-seconds 300
}
for name in "${replicas[@]}"; do serve "$name"; done

# --- The balancer: the file of deploy/compose, but for the lines marked (*) ---
readonly socket=$scratch/haproxy.sock
{
  sed -e "s|stats socket .*|stats socket $socket mode 600 level admin|" \
    -e "s|bind :50051 proto h2.*|bind ${host[balancer]}:50051 proto h2|" \
    -e "s|bind :8404.*|bind unix@$scratch/stats.sock|" -e '/server-template/d' \
    -e '/^resolvers/,$d' "$source_dir/deploy/compose/haproxy.cfg"
  for name in "${replicas[@]}"; do echo "    server $name ${host[$name]}:50051"; done
} >"$scratch/haproxy.cfg"
# The servers stand in the last section of the file, which must be the replicas' own.
grep -q '^backend replicas' "$scratch/haproxy.cfg" || fail "haproxy.cfg has no backend named replicas"
on_machine=balancer start haproxy haproxy -db -f "$scratch/haproxy.cfg"
wait_until 30 HAProxy test -S "$socket"

stat_of() { # REPLICA FIELD, as `show stat` names it
  socat - "UNIX-CONNECT:$socket" <<<"show stat" | awk -F, -v server="$1" -v field="$2" \
    'NR == 1 { for (i = 1; i <= NF; ++i) column[$i] = i } $1 == "replicas" && $2 == server { print $column[field] }'
}
is() { [[ $(stat_of "$1" status) == "$2"* ]]; }
has() { (($(stat_of "$1" scur) >= $2)); } # so many streams
for name in "${replicas[@]}"; do wait_until 60 "$name behind the balancer" is "$name" UP; done

# --- Load ---
begin_load() { # NAME SECONDS: sets $loading
  on clients "$bin/firesteel" load --address "${host[balancer]}:50051" --rate 12 --duration "$2s" --max-tokens 24 \
    --ignore-eos --json >"$scratch/$1.json" 2>"$scratch/$1.log" &
  loading=$!
}
failed() { jq .requests.failed "$scratch/$1.json"; }
outcome() { # NAME
  echo "$(failed "$1") of $(jq .requests.measured "$scratch/$1.json") requests failed" \
    "$(jq -c '.errors | map_values(.count)' "$scratch/$1.json")"
}

# Ten seconds from now at the latest, ten seconds bring each replica its share. Sooner if it can be: looked at from
# every fifth second on.
expect_even() { # AFTER_WHAT
  local counts=() start name shares ratio said=()
  for start in 0 5 10 15 20; do
    ((start == 0)) || sleep 5 # between two looks at the counters
    counts+=("$(for name in "${replicas[@]}"; do stat_of "$name" stot; done | xargs)")
    ((${#counts[@]} >= 3)) || continue
    shares=$(jq -cn "[[${counts[-1]// /,}], [${counts[-3]// /,}]] | transpose | map(.[0] - .[1])")
    ratio=$(jq 'max / (min | if . == 0 then 0.001 else . end) * 100 | round / 100' <<<"$shares")
    said+=("from second $((start - 10)) on $shares, max/min $ratio")
    if jq -en "$ratio <= 1.3" >/dev/null; then
      say "$1: requests in ten seconds: ${said[*]}"
      return
    fi
  done
  fail "$1: uneven: ${said[*]}"
}

# --- Killed ---
begin_load kill 40
wait_until 60 "requests on replica two" has two 1
# Stopped first, so that what it has in flight can be counted before it dies.
kill -STOP "${server_pid[two]}"
in_flight=$(stat_of two scur)
kill -KILL "${server_pid[two]}"
wait_until 20 "the balancer to notice" is two DOWN
serve two
wait_until 10 "the balancer to take it back" is two UP
expect_even "killed, started again"
wait $loading || fail "load while a replica is killed"
say "killed with $in_flight in flight: $(outcome kill)"
# A request may have been on its way to it between the count and the kill.
(($(failed kill) <= in_flight + 1)) || fail "more requests failed than were in flight on it"

# --- Drained and started again ---
begin_load drain 60
# A long one, so that the drain takes its time; past the balancer, which would not say where it runs.
on clients "$bin/firesteel" generate --address "${host[three]}:50051" --max-tokens 300 --ignore-eos "The dragon" \
  >"$scratch/long.out" 2>"$scratch/long.log" &
long=$!
wait_until 60 "the long generation" test -s "$scratch/long.out"
wait_until 60 "requests on replica three" has three 1
kill -TERM "${server_pid[three]}"
wait $long || fail "the drain cut a generation off"
wait "${server_pid[three]}" || fail "the drained server ended with status $?"
serve three
wait_until 10 "the balancer to take it back" is three UP
expect_even "drained, started again"
wait $loading || fail "load while a replica is drained"
say "drained: $(outcome drain)"
(($(failed drain) == 0)) || fail "a drained replica lost requests"
