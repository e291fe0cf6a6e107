#!/bin/bash
# Builds, serves the bundled model, streams one generation through gRPC, says what to call next and
# serves on until Ctrl-C. `make run` calls it.
#
# Environment: PRESET (release), JOBS (all cores), and the server's own FIRESTEEL_* variables. Where
# FIRESTEEL_ADDRESS or FIRESTEEL_METRICS_ADDRESS is not set, the usual port is taken, or a free one
# if that is in use.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly preset=${PRESET:-release}
readonly bin=build/$preset/bin
readonly prompt="Once upon a time, there was a little robot"

say() { echo "== $*"; }

# Something listens on this port of the loopback address. Asked beforehand, because gRPC lets two
# servers share one port and would not complain.
taken() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# Prints "127.0.0.1:PORT" with port 0 (any free one) where the usual port is taken.
pick_address() {
  if taken "$1"; then
    say "port $1 is in use already: taking a free one for $2" >&2
    echo 127.0.0.1:0
  else
    echo "127.0.0.1:$1"
  fi
}

say "building the server and the client ($preset)"
make --no-print-directory build PRESET="$preset" JOBS="${JOBS:-$(nproc)}" \
  TARGETS="bin/firesteel-server bin/firesteel"

FIRESTEEL_ADDRESS=${FIRESTEEL_ADDRESS:-$(pick_address 50051 gRPC)}
FIRESTEEL_METRICS_ADDRESS=${FIRESTEEL_METRICS_ADDRESS:-$(pick_address 9464 metrics)}
export FIRESTEEL_ADDRESS FIRESTEEL_METRICS_ADDRESS

say "starting $bin/firesteel-server with models/spark-stories"
folder=$(mktemp -d)
mkfifo "$folder/stdout"
server=
stop() { [[ -z $server ]] || kill -TERM "$server" 2>/dev/null || true; }
trap 'rm -rf "$folder"' EXIT
trap 'echo; say "stopping: the server drains"; stop' INT TERM HUP

# Job control gives the server a process group of its own, so that the terminal's Ctrl-C reaches
# this script alone and the server hears of it once, through the trap. Should this script be killed,
# the kernel tells the server in its place.
set -m
setpriv --pdeathsig TERM "$bin/firesteel-server" --model models/spark-stories \
  </dev/null >"$folder/stdout" &
server=$!
set +m
exec {output}<"$folder/stdout"

# Waits for the server's end, also when a signal interrupts the wait; then ends with its status.
finish() {
  local status
  while :; do
    status=0
    wait "$server" || status=$?
    kill -0 "$server" 2>/dev/null || break
  done
  say "the server has ended (status $status)"
  exit "$status"
}

line=
until [[ $line == "listening on "* ]]; do
  status=0
  IFS= read -r -t 1 line <&"$output" || status=$?
  if [[ $status -eq 0 ]]; then
    echo "$line"
  elif [[ $status -le 128 ]]; then # end of file, not time-out
    finish
  fi
done
[[ $line =~ ^listening\ on\ ([^,]+),\ metrics\ on\ (.+)$ ]] || { stop; finish; }
readonly address=${BASH_REMATCH[1]} metrics=${BASH_REMATCH[2]}
cat <&"$output" & # whatever else the server says there

say "streaming one generation from $address through gRPC; the prompt: $prompt"
"$bin/firesteel" generate --address "$address" --max-tokens 120 --temperature 0.8 --top-p 0.95 \
  "$prompt" || say "the generation failed"

cat <<EOT
== serving on until Ctrl-C. To call next, from another terminal:
   $bin/firesteel generate --address $address "The dragon and the mouse"
   $bin/firesteel info --address $address
   $bin/firesteel health --address $address
   curl -s http://$metrics/metrics
   curl -s http://$metrics/metrics | grep -E 'firesteel_(ffn|attention|flops|weight_bytes)'
   any gRPC client: proto/firesteel/v1/*.proto, server reflection, grpc.health.v1.Health
EOT
finish
