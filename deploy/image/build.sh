#!/bin/bash
# Builds the image `firesteel:VERSION` (and `firesteel:latest`) from ../../Dockerfile with docker, podman or buildah,
# whichever is there, then starts the result once (check.sh) and runs the tests of foreign clients against it, where that
# can be done without a daemon. `make image` calls it.
#
# Where the base image can be neither found nor pulled (no registry in reach), podman and buildah
# get one that debootstrap makes from Debian's packages, under the same name.
#
# Environment: ENGINE (docker|podman|buildah), IMAGE (firesteel), JOBS (of the compiler),
# DEBIAN_SNAPSHOT (e.g. 20250908T000000Z: that moment of Debian's archive), BASE
# (debian:trixie-slim), MIRROR (of debootstrap; unset: the one that the machine's own sources name).
set -euo pipefail
cd "$(dirname "$0")/../.."

readonly base=${BASE:-docker.io/library/debian:trixie-slim}
readonly image=${IMAGE:-firesteel}
say() { echo "image: $*"; }
fail() {
  say "$*" >&2
  exit 1
}

pick_engine() {
  local engine
  for engine in docker podman buildah; do
    command -v "$engine" >/dev/null || continue
    # A docker client alone builds nothing.
    [[ $engine != docker ]] || docker info >/dev/null 2>&1 || continue
    echo "$engine"
    return
  done
  fail "needs docker, podman or buildah (on Debian: apt-get install buildah)"
}
engine=${ENGINE:-$(pick_engine)}

# The first Debian archive below /etc/apt, with its security archive left out.
own_mirror() {
  cat /etc/apt/sources.list /etc/apt/sources.list.d/*.{list,sources} 2>/dev/null |
    grep -E '^(deb |URIs:)' | grep -oE 'https?://[^ ]+' | grep -v security | head -n 1
}

# A base image from Debian's packages, for podman or buildah's storage.
make_base() {
  command -v debootstrap >/dev/null || fail "$base can't be pulled, and there is no debootstrap to make it"
  [[ $(id -u) -eq 0 ]] || fail "$base can't be pulled, and debootstrap needs root to make it"
  local folder container
  folder=$(mktemp -d)
  # shellcheck disable=SC2064
  trap "rm -rf --one-file-system '$folder'" EXIT
  say "$base is not to be had: making it by debootstrap"
  local mirror=${MIRROR:-$(own_mirror)}
  [[ -n $mirror ]] || fail "no Debian mirror found below /etc/apt; set MIRROR"
  debootstrap --variant=minbase --include=ca-certificates trixie "$folder/root" \
    "$mirror" >"$folder/log" 2>&1 ||
    { tail -n 20 "$folder/log" >&2; fail "debootstrap failed"; }
  # What Debian's slim images leave out; licences stay.
  rm -rf "$folder"/root/var/cache/apt/archives/*.deb "$folder"/root/usr/share/{man,locale}/*
  find "$folder/root/usr/share/doc" ! -type d ! -name copyright -delete
  if [[ $engine == podman ]]; then
    tar -C "$folder/root" -c . | podman import - "$base" >/dev/null
  else
    container=$(buildah from scratch)
    buildah add -q "$container" "$folder/root" / >/dev/null
    buildah config --cmd bash "$container"
    buildah commit -q --rm "$container" "$base" >/dev/null
  fi
  rm -rf --one-file-system "$folder"
  trap - EXIT
}

case $engine in
  docker) build=(docker build) ;;
  podman) build=(podman build --format docker) ;; # the health check is no part of OCI's format
  buildah)
    build=(buildah bud --format docker --layers)
    # In a sandbox, and without a daemon, there is nothing to isolate a build step by but chroot.
    export BUILDAH_ISOLATION=${BUILDAH_ISOLATION:-chroot}
    ;;
  *) fail "ENGINE: '$engine' is none of docker, podman, buildah" ;;
esac
if [[ $engine != docker ]]; then
  "$engine" inspect --type image "$base" >/dev/null 2>&1 || "$engine" pull -q "$base" >/dev/null 2>&1 ||
    make_base
fi

version=$(sed -n 's/^project(firesteel VERSION \([0-9.]*\).*/\1/p' CMakeLists.txt)
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
"${build[@]}" --build-arg BASE="$base" --build-arg VERSION="$version" --build-arg REVISION="$revision" \
  --build-arg DEBIAN_SNAPSHOT="${DEBIAN_SNAPSHOT:-}" --build-arg JOBS="${JOBS:-}" \
  -t "$image:$version" -t "$image:latest" .
say "built $image:$version with $engine"

if [[ $engine == buildah && $(id -u) -eq 0 ]]; then
  container=$(buildah from --pull-never "$image:$version")
  log=$(mktemp)
  trap 'rm -f "$log"; buildah rm "$container" >/dev/null' EXIT
  root=$(buildah mount "$container")
  deploy/image/check.sh "$root"
  # Other people's clients, where this machine has them.
  for client in node python; do
    FIRESTEEL_IMAGE_ROOT=$root FIRESTEEL_SERVER_PROGRAM=$PWD/deploy/image/server.sh \
      FIRESTEEL_CLIENT_PROGRAM=$PWD/deploy/image/client.sh \
      server/foreign/run.sh $client "$PWD/build/image" >"$log" 2>&1 && say "passes the tests of the $client client" ||
      { [[ $? -eq 77 ]] && say "$client: $(tail -n 1 "$log")"; } ||
      { tail -n 60 "$log" >&2; fail "the tests of the $client client"; }
  done
fi
