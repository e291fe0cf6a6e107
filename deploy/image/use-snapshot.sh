#!/bin/sh
# Points apt at one moment of Debian's archive (snapshot.debian.org), or leaves it as it is.
#
# usage: deploy/image/use-snapshot.sh [YYYYMMDDTHHMMSSZ]
set -eu
moment=${1:-}
[ -n "$moment" ] || exit 0

case $moment in
[0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9]T[0-9][0-9][0-9][0-9][0-9][0-9]Z) ;;
*)
  echo "DEBIAN_SNAPSHOT: '$moment' is not like 20250908T000000Z" >&2
  exit 2
  ;;
esac
# Signatures of a past archive have run out by design.
echo 'Acquire::Check-Valid-Until "false";' >/etc/apt/apt.conf.d/90snapshot
rm -f /etc/apt/sources.list /etc/apt/sources.list.d/*
. /etc/os-release
cat >/etc/apt/sources.list.d/snapshot.sources <<SOURCES
Types: deb
URIs: http://snapshot.debian.org/archive/debian/$moment
Suites: $VERSION_CODENAME $VERSION_CODENAME-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://snapshot.debian.org/archive/debian-security/$moment
Suites: $VERSION_CODENAME-security
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
SOURCES
