# Shared by the tests of this folder: programs that they need, processes that they start, questions
# to Prometheus. Sourced, not run.
set -euo pipefail

readonly source_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
scratch=$(mktemp -d)
started=() # process ids of ours, and of nobody else

say() { echo "test: $*"; }
fail() {
  echo "test: FAILED: $*" >&2
  exit 1
}

# Debian keeps some of the programs where users don't look.
PATH=$PATH:/usr/sbin:/sbin

# Skips the test (ctest's SKIP_RETURN_CODE) where one of these is missing.
need() {
  local program
  for program in "$@"; do
    command -v "$program" >/dev/null || { echo "skipped: needs $program"; exit 77; }
  done
}

clean_up() {
  local status=$? pid
  for pid in "${started[@]}"; do kill -KILL "$pid" 2>/dev/null || true; done
  wait 2>/dev/null || true
  if [[ $status -ne 0 && $status -ne 77 ]]; then
    for file in "$scratch"/*.log; do
      [[ -s $file ]] && { echo "--- ${file##*/}"; tail -n 15 "$file"; } >&2
    done
  fi
  rm -rf "$scratch"
}
trap clean_up EXIT

# yaml FILE: as JSON; a file of one document. Debian's yq is jq for YAML, the other one converts.
yaml() {
  yq . "$1" 2>/dev/null | jq -e . 2>/dev/null || yq -o=json . "$1"
}

# wait_until SECONDS WHAT COMMAND…: polls; the time is for a test that has gone wrong.
wait_until() {
  local end=$((SECONDS + $1)) what=$2
  shift 2
  until "$@"; do
    ((SECONDS < end)) || fail "$what: not within its time"
    sleep 0.1
  done
}

# start NAME PROGRAM ARGUMENT…: in the background; its process id in $pid, its output in NAME.log. $on_machine
# names the network namespace, where it is to run in one.
start() {
  local name=$1
  shift
  : >"$scratch/$name.out" # there before anybody looks for it
  ${on_machine:+ip netns exec "$on_machine"} "$@" >"$scratch/$name.out" 2>"$scratch/$name.log" &
  pid=$!
  started+=("$pid")
}

# start_server NAME OPTION…: sets $pid, and ${address[NAME]} and ${metrics[NAME]} once it serves.
declare -A address metrics server_pid
start_server() {
  local name=$1
  shift
  [[ " $* " == *" --metrics-address "* ]] || set -- --metrics-address 127.0.0.1:0 "$@"
  start "$name" "$bin/firesteel-server" --model "$source_dir/models/spark-stories" --threads 1 --log-level warn "$@"
  server_pid[$name]=$pid
  wait_until 300 "server $name" grep -q '^listening on' "$scratch/$name.out"
  local line
  line=$(grep -m 1 '^listening on' "$scratch/$name.out")
  [[ $line =~ ^listening\ on\ ([^,]+),\ metrics\ on\ (.+)$ ]]
  address[$name]=${BASH_REMATCH[1]}
  metrics[$name]=${BASH_REMATCH[2]}
}

# A port of the loopback address that nobody listens on now.
free_port() {
  local port
  while :; do
    port=$((20000 + RANDOM % 12000))
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  echo "$port"
}

# start_prometheus CONFIG: sets $prometheus, its URL.
start_prometheus() {
  local port
  port=$(free_port)
  start prometheus prometheus --config.file="$1" --storage.tsdb.path="$scratch/tsdb" \
    --web.listen-address="127.0.0.1:$port" --log.level=warn
  prometheus=http://127.0.0.1:$port
  wait_until 120 Prometheus curl -fs -o "$scratch/ready" "$prometheus/-/ready"
}

# ask PROMQL: the answer's "result", as JSON.
ask() {
  curl -fsG "$prometheus/api/v1/query" --data-urlencode "query=$1" | jq -c .data.result
}

# ask_range PROMQL FROM TO STEP
ask_range() {
  curl -fsG "$prometheus/api/v1/query_range" --data-urlencode "query=$1" -d "start=$2" -d "end=$3" \
    -d "step=$4" | jq -c .data.result
}

# A dashboard's expression for a replica set of all models, with this window for rates.
expand() {
  local expression=$1
  expression=${expression//\$__rate_interval/$2}
  expression=${expression//\$model/.+}
  echo "${expression//\$instance/.+}"
}
