#!/bin/bash
# Installs the Debian packages that Firesteel needs, and nothing when none is missing.
#
# usage: tools/setup.sh [--lint] [--test] [--check | --print]
#   --lint   also what `make lint` and `make format` call (clang-format, clang-tidy)
#   --test   also what the tests of deploy/ run (Prometheus, HAProxy and small tools; their services are
#            not started) and those of foreign clients (Node and npm)
#   --check  install nothing; name what is missing and exit 1 if anything is
#   --print  install nothing; list the packages
#
# Debian 13 (trixie) has all of them. Debian 12 (bookworm) lacks one in a recent enough version:
# Highway, which is taken from trixie, from the mirror that the machine uses already, under a pin
# that lets nothing else of trixie in.
set -euo pipefail

readonly HIGHWAY_MIN=1.2

# The oldest versions in use are bookworm's: every package here is in both releases.
BUILD_PACKAGES=(
  clang-19 libclang-rt-19-dev lld-19 # the compiler, its sanitizers, the linker
  make cmake ninja-build ccache pkg-config
  libhwy-dev                                                         # SIMD kernels
  libprotobuf-dev protobuf-compiler libgrpc++-dev protobuf-compiler-grpc libabsl-dev zlib1g-dev libssl-dev libcivetweb-dev
  libsentencepiece-dev nlohmann-json3-dev                            # model folders
  libxxhash-dev                                                      # packed files: checksums
  libspdlog-dev libyaml-cpp-dev libcli11-dev prometheus-cpp-dev      # server
  libgtest-dev libgmock-dev libbenchmark-dev                         # tests and benchmarks
  python3-grpcio python3-protobuf openssl                            # tests: a foreign client, certificates
)
LINT_PACKAGES=(clang-format-19 clang-tidy-19)
TEST_PACKAGES=(curl jq yq socat jsonnet haproxy prometheus)
# Of server/foreign/. Other builds of Node bring their own npm, which Debian's would have to replace.
command -v npm >/dev/null || TEST_PACKAGES+=(nodejs npm)

say() { echo "setup: $*" >&2; }
fail() {
  say "$*"
  exit 1
}

packages=("${BUILD_PACKAGES[@]}")
mode=install
for argument in "$@"; do
  case "$argument" in
    --lint) packages+=("${LINT_PACKAGES[@]}") ;;
    --test) packages+=("${TEST_PACKAGES[@]}") ;;
    --check) mode=check ;;
    --print) mode=print ;;
    -h | --help)
      sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
      exit 0
      ;;
    *)
      say "unknown option '$argument' (see --help)"
      exit 2
      ;;
  esac
done

if [[ $mode == print ]]; then
  printf '%s\n' "${packages[@]}"
  exit 0
fi

debian_release() { # 12, 13, …; 0 where this is no Debian
  [[ -r /etc/os-release ]] || { echo 0; return; }
  # shellcheck disable=SC1091
  (. /etc/os-release && [[ ${ID:-} == debian ]] && echo "${VERSION_ID:-13}" || echo 0)
}

# Prints the packages of the list that are absent or too old.
missing_packages() {
  local installed name version
  installed=$(dpkg-query -W -f '${binary:Package} ${db:Status-Status} ${Version}\n' \
    "${packages[@]}" 2>/dev/null || true)
  for name in "${packages[@]}"; do
    version=$(awk -v n="$name" '{ sub(/:.*/, "", $1) } $1 == n && $2 == "installed" { print $3 }' \
      <<<"$installed" | head -n 1)
    if [[ -z $version ]]; then
      echo "$name"
    elif [[ $name == libhwy-dev ]] && dpkg --compare-versions "$version" lt "$HIGHWAY_MIN"; then
      echo "$name"
    fi
  done
}

release=$(debian_release)
if [[ $release != 12 && $release != 13 ]]; then
  say "this script knows Debian 12 and 13, and this system is neither."
  say "Firesteel builds wherever these packages, or their like, are installed (Highway >= $HIGHWAY_MIN):"
  say "  ${packages[*]}"
  say "Then call cmake directly: cmake --preset release && cmake --build --preset release"
  exit 1
fi

mapfile -t missing < <(missing_packages)
[[ ${#missing[@]} -eq 0 ]] && exit 0
if [[ $mode == check ]]; then
  say "missing: ${missing[*]}"
  exit 1
fi

as_root=()
if [[ $(id -u) -ne 0 ]]; then
  command -v sudo >/dev/null ||
    fail "missing: ${missing[*]} - run this script as root (there is no sudo here)"
  as_root=(sudo)
fi

apt_get() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -y "$@"; }
write_root_file() { "${as_root[@]}" tee "$1" >/dev/null; }

# The first bookworm source of one of the files given, as one deb822 stanza for trixie: the same
# address, keys and options, main only.
trixie_stanza() {
  awk -v RS= '
    function flush() { if (ok && debian) { printf "%s", out; found = 1; exit } }
    {
      n = split($0, lines, "\n"); out = ""; ok = 1; debian = 0; types = 0
      for (i = 1; i <= n; i++) {
        line = lines[i]
        if (line ~ /^#/) continue
        key = tolower(line); sub(/:.*/, "", key)
        if (line ~ /^[ \t]/) key = previous
        previous = key
        if (key == "enabled" && tolower(line) ~ /: *(no|false|0)/) ok = 0
        if (key == "suites") {
          if (line ~ /[ :\t](bookworm|oldstable)([ \t]|$)/) debian = 1
          if (line !~ /^[ \t]/) out = out "Suites: trixie\n"
        } else if (key == "components") {
          if (line !~ /^[ \t]/) out = out "Components: main\n"
        } else if (key == "types") {
          if (line !~ /^[ \t]/) out = out "Types: deb\n"
        } else {
          out = out line "\n"
        }
      }
      flush()
    }
    END { exit !found }' "$1"
}

# The same for the one-line format: "deb [options] address suite components…".
trixie_line() {
  awk '
    $1 == "deb" {
      options = ""; rest = $0
      sub(/^[ \t]*deb[ \t]+/, "", rest)
      if (match(rest, /^\[[^]]*\][ \t]*/)) {
        options = substr(rest, 1, RLENGTH); rest = substr(rest, RLENGTH + 1)
      }
      split(rest, field, /[ \t]+/)
      if (field[2] == "bookworm" || field[2] == "oldstable") {
        print "deb " options field[1] " trixie main"; found = 1; exit
      }
    }
    END { exit !found }' "$1"
}

highway_candidate_is_recent() {
  local candidate
  candidate=$(apt-cache policy libhwy-dev | awk '$1 == "Candidate:" { print $2 }')
  [[ -n $candidate && $candidate != "(none)" ]] &&
    dpkg --compare-versions "$candidate" ge "$HIGHWAY_MIN"
}

# Bookworm only: lets apt see trixie's Highway, and only that.
add_trixie_for_highway() {
  local file text
  # The pin comes first: there must be no moment at which apt sees all of trixie unpinned.
  write_root_file /etc/apt/preferences.d/firesteel-trixie <<'PIN'
# Written by Firesteel's tools/setup.sh: from trixie, Highway and nothing else.
Package: *
Pin: release n=trixie
Pin-Priority: -1

Package: libhwy-dev libhwy1t64
Pin: release n=trixie
Pin-Priority: 990
PIN
  for file in /etc/apt/sources.list.d/*.sources; do
    if [[ -r $file ]] && text=$(trixie_stanza "$file"); then
      write_root_file /etc/apt/sources.list.d/firesteel-trixie.sources <<<"$text"
      return
    fi
  done
  for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
    if [[ -r $file ]] && text=$(trixie_line "$file"); then
      write_root_file /etc/apt/sources.list.d/firesteel-trixie.list <<<"$text"
      return
    fi
  done
  fail "no source of bookworm found below /etc/apt to take the mirror from; install libhwy-dev >= $HIGHWAY_MIN by hand"
}

say "installing: ${missing[*]}"
apt_get update
if [[ $release == 12 ]] && ! highway_candidate_is_recent; then
  add_trixie_for_highway
  apt_get update
  highway_candidate_is_recent || fail "apt offers no libhwy-dev >= $HIGHWAY_MIN: $(apt-cache policy libhwy-dev)"
fi
# Debian starts a service as soon as it is installed, unless this says no: a test's Prometheus is its own.
readonly policy=/usr/sbin/policy-rc.d
if [[ " ${missing[*]} " =~ \ (haproxy|prometheus)\  && ! -e $policy ]]; then
  write_root_file $policy <<<$'#!/bin/sh\nexit 101'
  "${as_root[@]}" chmod +x $policy
  trap '"${as_root[@]}" rm -f $policy' EXIT
fi
apt_get install --no-install-recommends "${missing[@]}"
mapfile -t missing < <(missing_packages)
[[ ${#missing[@]} -eq 0 ]] || fail "apt-get succeeded and yet these are missing or too old: ${missing[*]}"
say "done"
