#!/bin/bash
# Assembles the root file system of an image: programs, the shared libraries and the loader that
# they need, and what the C library wants to find. Every library comes with its package's licence
# and record, the latter where scanners look for it in images without a package manager.
#
# usage: deploy/image/assemble.sh ROOT PROGRAM…      (on Debian; ROOT must not exist)
set -euo pipefail
[[ $# -ge 2 ]] || { echo "usage: $0 ROOT PROGRAM..." >&2; exit 2; }
readonly root=$1
shift
readonly user=10001 # the number that the Dockerfile's USER names

mkdir "$root"
mkdir -p "$root"/{etc,models,proc,dev,sys,tmp} "$root"/usr/{bin,share/doc/firesteel} \
  "$root"/var/lib/dpkg/status.d
chmod 1777 "$root/tmp"
for name in lib lib64; do # merged, as in Debian; a symbolic link only where Debian has one
  if [[ -L /$name ]]; then
    mkdir -p "$root/usr/$name"
    ln -s "usr/$name" "$root/$name"
  fi
done

# install(1) takes the mode from here, and not from whoever built the programs.
install -m 755 -t "$root/usr/bin" "$@"
! command -v strip >/dev/null || strip --strip-unneeded "$root"/usr/bin/*

echo "firesteel:x:$user:$user::/:/usr/sbin/nologin" >"$root/etc/passwd"
echo "firesteel:x:$user:" >"$root/etc/group"
echo "hosts: files dns" >"$root/etc/nsswitch.conf"
cp /etc/os-release "$root/etc/os-release" # says which Debian the libraries are of

libraries=$(ldd "$@")
if grep -F 'not found' <<<"$libraries" >&2; then exit 1; fi
# "name => /path (address)", or "/path (address)" for the loader.
mapfile -t paths < <(awk '$2 == "=>" { print $3 } $1 ~ "^/" && $2 ~ "^\\(" { print $1 }' \
  <<<"$libraries" | sort -u)

# The licence of a package. Some have none of their own but a link to that of a sibling from the same
# source, and slim images leave out such links.
licence_of() {
  local source sibling
  source=$(dpkg-query -W -f '${source:Package}' "$1")
  for sibling in "${1%%:*}" $(dpkg-query -W -f '${source:Package} ${Package}\n' |
    awk -v s="$source" '$1 == s { print $2 }'); do
    [[ ! -e /usr/share/doc/$sibling/copyright ]] || { echo "/usr/share/doc/$sibling/copyright"; return; }
  done
  echo "$0: no licence of $1 below /usr/share/doc" >&2
  return 1
}

packages=
for path in "${paths[@]}"; do
  # The name that the loader looks for may be a link to the file.
  link=$(realpath "$(dirname "$path")")/$(basename "$path")
  file=$(readlink -f "$path")
  for one in "$link" "$file"; do
    mkdir -p "$root$(dirname "$one")"
    [[ -e $root$one || -L $root$one ]] || cp -P --preserve=mode,timestamps "$one" "$root$one"
  done
  # A package may own its file under / or under /usr.
  owner=$(dpkg-query -S "$file" 2>/dev/null || dpkg-query -S "${file#/usr}")
  packages+="${owner%%: *}"$'\n'
done

# The loader is where the programs were linked to look for it.
loader=$(awk '$1 ~ "^/" && $2 ~ "^\\(" { print $1; exit }' <<<"$libraries")
[[ -e $root$loader ]] || { echo "$0: no loader at $loader in the image" >&2; exit 1; }

sort -u <<<"$packages" | grep . | while read -r package; do
  name=${package%%:*}
  dpkg-query -s "$package" >"$root/var/lib/dpkg/status.d/$name"
  mkdir -p "$root/usr/share/doc/$name"
  cp -L "$(licence_of "$package")" "$root/usr/share/doc/$name/"
  dpkg-query -W -f '${Package} ${Version} ${Architecture}\n' "$package"
done >"$root/usr/share/doc/firesteel/packages"
