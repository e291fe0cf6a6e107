#!/bin/bash
# Starts the root file system of an image the way a container engine would - read-only, without
# root's rights, in namespaces of its own - and asks it for what an image must do: turn SERVING,
# answer, drain on SIGTERM. Prints its size and start time.
#
# usage: deploy/image/check.sh ROOT [MODEL_DIR]   (as root; MODEL_DIR is mounted where ROOT has no model)
set -euo pipefail
[[ $# -ge 1 && $# -le 2 ]] || { echo "usage: $0 ROOT [MODEL_DIR]" >&2; exit 2; }

if [[ ${FIRESTEEL_IMAGE_CHECK:-} != inside ]]; then
  # Own mounts end with it, own network has free ports, own processes die with their first one.
  FIRESTEEL_IMAGE_CHECK=inside exec unshare --mount --net --pid --mount-proc --fork --kill-child "$0" "$@"
fi

readonly root=$(readlink -f "$1")
readonly user=10001
say() { echo "image: $*"; }
fail() {
  say "FAILED: $*" >&2
  exit 1
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
ip link set lo up
mount --rbind "$root" "$root"
mount -t proc proc "$root/proc"
if [[ $# -eq 2 ]]; then
  mount -t tmpfs tmpfs "$root/models"
  mkdir "$root/models/spark-stories"
  mount --bind "$2" "$root/models/spark-stories"
fi
mount -o remount,bind,ro "$root"
! touch "$root/probe" 2>/dev/null || fail "the root is not read-only"
[[ ! -e $root/bin/sh && ! -e $root/usr/bin/sh ]] || fail "there is a shell inside"

inside() { # PROGRAM ARGUMENT…: as the image's user, with the image's environment; never returns
  exec setpriv --no-new-privs \
    env -i PATH=/usr/sbin:/usr/bin FIRESTEEL_ADDRESS=0.0.0.0:50051 \
    FIRESTEEL_METRICS_ADDRESS=0.0.0.0:9464 FIRESTEEL_MODEL=/models/spark-stories \
    chroot --userspec=$user:$user --groups= "$root" "$@"
}

milliseconds() { echo $(($(date +%s%N) / 1000000)); }
begin=$(milliseconds)
inside /usr/bin/firesteel-server >"$scratch/out" 2>"$scratch/err" &
server=$!
until (inside /usr/bin/firesteel health) >/dev/null 2>&1; do
  kill -0 $server 2>/dev/null || { cat "$scratch/err" >&2; fail "the server ended"; }
  (($(milliseconds) - begin < 120000)) || { cat "$scratch/err" >&2; fail "not SERVING in 120 s"; }
done
say "$(du -sm --apparent-size -x "$root" | cut -f1) MiB, SERVING after $(($(milliseconds) - begin)) ms"
grep -q "^Uid:.$user" /proc/$server/status || fail "the server does not run as $user"

(inside /usr/bin/firesteel generate --max-tokens 12 --seed 1 "Once upon a time") >"$scratch/text" \
  2>"$scratch/summary" || { cat "$scratch/summary" >&2; fail "no answer"; }
say "answered: $(tr '\n' ' ' <"$scratch/text")"

# A generation that runs when SIGTERM comes is finished.
inside /usr/bin/firesteel generate --max-tokens 300 --ignore-eos "The dragon" \
  >"$scratch/long" 2>"$scratch/long.summary" &
client=$!
until [[ -s $scratch/long ]] || ! kill -0 $client 2>/dev/null; do sleep 0.01; done
kill -TERM $server
wait $client || { cat "$scratch/long.summary" >&2; fail "the drain cut a generation off"; }
wait $server || fail "the server ended with status $?"
grep -q '300 tokens\|length' "$scratch/long.summary" || fail "cut: $(cat "$scratch/long.summary")"
say "drained on SIGTERM: $(cat "$scratch/long.summary")"
