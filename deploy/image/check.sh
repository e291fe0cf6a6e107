#!/bin/bash
# Starts the root file system of an image the way a container engine would - read-only, without
# root's rights, in namespaces of its own, with the Dockerfile's environment - and asks it for what an image must do:
# turn SERVING in the eyes of its own health check, with TLS and client certificates too, answer, drain on SIGTERM.
# Prints its size and start time.
#
# usage: deploy/image/check.sh ROOT [MODEL_DIR]   (as root; MODEL_DIR is mounted where ROOT has no model)
set -euo pipefail
[[ $# -ge 1 && $# -le 2 ]] || { echo "usage: $0 ROOT [MODEL_DIR]" >&2; exit 2; }

if [[ ${FIRESTEEL_IMAGE_CHECK:-} != inside ]]; then
  # Own mounts end with it, own network has free ports, own processes die with their first one.
  FIRESTEEL_IMAGE_CHECK=inside exec unshare --mount --net --pid --mount-proc --fork --kill-child "$0" "$@"
fi

readonly root=$(readlink -f "$1")
readonly clone=$(readlink -f "$(dirname "$0")/../..")
readonly user=10001
readonly chroot=$(PATH=$PATH:/usr/sbin command -v chroot)
say() { echo "image: $*"; }
fail() {
  say "FAILED: $*" >&2
  exit 1
}

# What the Dockerfile says, so that it is what is tried.
mapfile -t environment < <(sed -n '/^ENV /,/[^\\]$/{s/^ENV //;s/^ *//;s/ *\\$//;p}' "$clone/Dockerfile")
mapfile -t health < <(sed -n 's/^HEALTHCHECK .* CMD \[\(.*\)\]$/\1/p' "$clone/Dockerfile" | tr -d '" ' | tr , '\n')
[[ ${#environment[@]} -ge 2 && ${#health[@]} -ge 2 ]] || fail "no ENV or HEALTHCHECK in the Dockerfile"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
ip link set lo up
mount --rbind "$root" "$root"
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/tmp" # for certificates
if [[ $# -eq 2 ]]; then
  mount -t tmpfs tmpfs "$root/models"
  mkdir "$root/models/spark-stories"
  mount --bind "$2" "$root/models/spark-stories"
fi
mount -o remount,bind,ro "$root"
! touch "$root/probe" 2>/dev/null || fail "the root is not read-only"
[[ ! -e $root/bin/sh && ! -e $root/usr/bin/sh ]] || fail "there is a shell inside"

inside() { # PROGRAM ARGUMENT…: as the image's user, with the image's environment; never returns
  exec setpriv --no-new-privs env -i "${environment[@]}" "$chroot" --userspec=$user:$user --groups= "$root" "$@"
}

milliseconds() { echo $(($(date +%s%N) / 1000000)); }

# Sets $server, and $took, the milliseconds until the health check is content.
serve() { # OPTION…
  local begin
  begin=$(milliseconds)
  inside firesteel-server "$@" >"$scratch/out" 2>"$scratch/err" &
  server=$!
  until (inside "${health[@]}") >/dev/null 2>&1; do
    kill -0 $server 2>/dev/null || { cat "$scratch/err" >&2; fail "the server ended"; }
    (($(milliseconds) - begin < 120000)) || { cat "$scratch/err" >&2; fail "not SERVING in 120 s"; }
  done
  took=$(($(milliseconds) - begin))
}

serve
say "$(du -sm --apparent-size -x "$root" | cut -f1) MiB, SERVING after $took ms"
grep -q "^Uid:.$user" /proc/$server/status || fail "the server does not run as $user"
grep -q "^CapEff:.0*$" /proc/$server/status || fail "the server has capabilities"

(inside firesteel generate --max-tokens 12 --seed 1 "Once upon a time") >"$scratch/text" \
  2>"$scratch/summary" || { cat "$scratch/summary" >&2; fail "no answer"; }
say "answered: $(tr '\n' ' ' <"$scratch/text")"

# A generation that runs when SIGTERM comes is finished.
inside firesteel generate --max-tokens 300 --ignore-eos "The dragon" \
  >"$scratch/long" 2>"$scratch/long.summary" &
client=$!
until [[ -s $scratch/long ]] || ! kill -0 $client 2>/dev/null; do sleep 0.01; done
kill -TERM $server
wait $client || { cat "$scratch/long.summary" >&2; fail "the drain cut a generation off"; }
wait $server || fail "the server ended with status $?"
grep -q '300 tokens\|length' "$scratch/long.summary" || fail "cut: $(cat "$scratch/long.summary")"
say "drained on SIGTERM: $(cat "$scratch/long.summary")"

# Where clients need certificates, the health check, which has none, is content all the same.
if command -v openssl >/dev/null; then
  "$clone/server/foreign/make_certificates.sh" "$root/tmp/tls"
  chmod -R a+rX "$root/tmp/tls"
  serve --tls-cert /tmp/tls/server.pem --tls-key /tmp/tls/server.key --tls-client-ca /tmp/tls/ca.pem
  ! (inside firesteel generate x) >/dev/null 2>&1 || fail "a client without a certificate was served"
  (inside firesteel generate --tls-ca /tmp/tls/ca.pem --tls-cert /tmp/tls/client.pem --tls-key /tmp/tls/client.key \
    --max-tokens 4 x) >/dev/null 2>"$scratch/summary" || { cat "$scratch/summary" >&2; fail "no answer with TLS"; }
  kill -TERM $server
  wait $server || fail "the server ended with status $?"
  say "healthy with TLS and client certificates, too"
fi
