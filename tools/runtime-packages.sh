#!/bin/bash
# Prints the Debian packages of the shared libraries that the given programs load, one a line: what
# an image needs to run them without the build's -dev packages.
#
# usage: tools/runtime-packages.sh PROGRAM…
set -euo pipefail
[[ $# -gt 0 ]] || { echo "usage: $0 PROGRAM..." >&2; exit 2; }

libraries=$(ldd "$@")
if grep -F 'not found' <<<"$libraries" >&2; then exit 1; fi
awk '$2 == "=>" { print $3 }' <<<"$libraries" | sort -u | while read -r library; do
  # /lib is a link to /usr/lib, and a package may own its file under either name.
  path=$(readlink -f "$library")
  dpkg-query -S "$path" 2>/dev/null || dpkg-query -S "${path#/usr}"
done | sed 's/:.*//' | sort -u
