#!/bin/bash
# Runs firesteel-server out of the root file system of an image: read-only, as the image's user, with the image's
# libraries. Of this machine it sees /tmp and this clone, at the same paths, so that tests which start servers by
# themselves can be pointed at it:
#
#   FIRESTEEL_IMAGE_ROOT=ROOT FIRESTEEL_SERVER_PROGRAM=deploy/image/server.sh server/foreign/run.sh node SCRATCH_DIR
#
# FIRESTEEL_IMAGE_PROGRAM names another program of the image (client.sh: the client).
#
# usage: FIRESTEEL_IMAGE_ROOT=ROOT deploy/image/server.sh OPTION…     (as root; adds empty folders to ROOT)
set -euo pipefail
readonly root=${FIRESTEEL_IMAGE_ROOT:?usage: FIRESTEEL_IMAGE_ROOT=ROOT $0 OPTION...}
readonly clone=$(readlink -f "$(dirname "$0")/../..")
readonly user=10001

# All of it by exec: who started this sends its signals to the server.
if [[ ${FIRESTEEL_IMAGE_SERVER:-} != inside ]]; then
  FIRESTEEL_IMAGE_SERVER=inside exec unshare --mount "$0" "$@"
fi
mkdir -p "$root$clone"
mount --bind "$root" "$root"
for folder in /proc /sys /dev /tmp "$clone"; do
  [[ $folder != /tmp/* ]] || continue # is there with /tmp
  mount --rbind "$folder" "$root$folder"
done
mount -o remount,bind,ro "$root"
# Tests write certificates and tokens that nobody but their user may read: hence the one right.
readonly rights=-all,+dac_read_search,+sys_chroot
exec setpriv --reuid $user --regid $user --clear-groups --no-new-privs --bounding-set $rights --inh-caps $rights \
  --ambient-caps $rights "$(PATH=$PATH:/usr/sbin command -v chroot)" "$root" \
  "/usr/bin/${FIRESTEEL_IMAGE_PROGRAM:-firesteel-server}" "$@"
