#!/bin/bash
# The image's root file system, assembled from this build's programs and this Debian's libraries,
# started read-only and without rights. (`make image` does the same with the image itself.)
#
# usage: deploy/testing/image_root_test.sh BIN_DIR
readonly bin=${1:?usage: $0 BIN_DIR}
# shellcheck source=deploy/testing/common.sh
source "$(dirname "$0")/common.sh"
need dpkg-query ldd setpriv unshare chroot ip
[[ $(id -u) -eq 0 ]] || { echo "skipped: needs root, to change the root directory"; exit 77; }
unshare --mount --net --pid --fork true 2>/dev/null || { echo "skipped: needs namespaces"; exit 77; }

"$source_dir/deploy/image/assemble.sh" "$scratch/root" "$bin/firesteel-server" "$bin/firesteel" \
  "$bin/firesteel-convert"
"$source_dir/deploy/image/check.sh" "$scratch/root" "$source_dir/models/spark-stories"

readonly packages=$scratch/root/usr/share/doc/firesteel/packages
grep -q '^libc6 [0-9]' "$packages" || fail "libc6 is not in the list of packages"
while read -r name _; do
  [[ -s $scratch/root/var/lib/dpkg/status.d/$name && -s $scratch/root/usr/share/doc/$name/copyright ]] ||
    fail "$name comes without its record or its licence"
done <"$packages"
say "$(wc -l <"$packages") packages, each with its record and licence"
