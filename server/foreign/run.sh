#!/bin/bash
# Runs the tests of foreign clients against the server program, and the lint rules of the protos.
#
# usage: run.sh node|python|buf|examples BUILD_DIR
# FIRESTEEL_SERVER_PROGRAM and FIRESTEEL_CLIENT_PROGRAM name others than those that were built (deploy/image/server.sh and
# client.sh: an image's).
# Exits with 77, which ctest counts as skipped, where the machine lacks what a client needs: node and npm
# (with a registry in reach), or Debian's python3-grpcio.
set -euo pipefail

readonly what=$1 build=$2
here=$(cd "$(dirname "$0")" && pwd)
readonly here root=$here/../..
readonly scratch=$build/foreign BUF_VERSION=1.50.0
export FIRESTEEL_SERVER_PROGRAM=${FIRESTEEL_SERVER_PROGRAM:-$build/bin/firesteel-server}
export FIRESTEEL_CLIENT_PROGRAM=${FIRESTEEL_CLIENT_PROGRAM:-$build/bin/firesteel}
export FIRESTEEL_PROTOSET=$build/firesteel.protoset
mkdir -p "$scratch"

skip() {
  echo "skipped: $*" >&2
  exit 77
}

# Debian's own Python, where python3-grpcio is.
readonly python=/usr/bin/python3
need_python() {
  "$python" -c 'import grpc, google.protobuf' 2>/dev/null ||
    skip "no python3-grpcio and python3-protobuf (Debian packages)"
  command -v grpc_python_plugin >/dev/null || skip "no grpc_python_plugin (Debian's protobuf-compiler-grpc)"
}

need_npm() {
  command -v node >/dev/null && command -v npm >/dev/null || skip "no node and npm"
}

# Installs what package-lock.json names into the build folder, once.
need_node() {
  need_npm
  node -e 'process.exit(parseInt(process.versions.node) >= 18 ? 0 : 1)' || skip "node is older than 18"
  (
    flock 9
    cd "$scratch"
    if ! cmp -s "$here/package-lock.json" package-lock.json || [[ ! -f installed ]]; then
      rm -f installed
      cp "$here/package.json" "$here/package-lock.json" .
      npm ci --no-audit --no-fund --fetch-retries 1 >npm.log 2>&1 || exit 1
      touch installed
    fi
  ) 9>"$scratch/lock" || skip "npm can't install the packages (see $scratch/npm.log)"
  export NODE_PATH=$scratch/node_modules
}

serve() { # starts a server; sets address
  exec {output}< <(exec "$FIRESTEEL_SERVER_PROGRAM" --model "$root/models/spark-stories" \
    --address 127.0.0.1:0 --metrics-address 127.0.0.1:0 --log-level off)
  server=$!
  trap 'kill "$server"' EXIT
  IFS= read -r line <&"$output"
  [[ $line =~ ^listening\ on\ ([^,]+), ]]
  address=${BASH_REMATCH[1]}
}

# Runs an example, and one that is refused.
try_example() {
  local out
  out=$("$@" "$address" "Once upon a time" 2>"$scratch/example.err")
  [[ ${#out} -gt 20 ]] || { echo "$* said only: $out" >&2; exit 1; }
  grep -q 'FLOPs skipped' "$scratch/example.err"
  if "$@" "$address" "$(printf 'x %.0s' {1..3000})" >/dev/null 2>"$scratch/example.err"; then
    echo "$*: a prompt that is too long went through" >&2
    exit 1
  fi
  grep -qE 'error (3|INVALID_ARGUMENT): prompt: has ' "$scratch/example.err"
  echo "ok: $*"
}

case $what in
  python)
    need_python
    # The build has made it, but for an image of somebody else's build.
    [[ -f $FIRESTEEL_PROTOSET ]] || (cd "$root/proto" && protoc -I. --include_imports --descriptor_set_out="$FIRESTEEL_PROTOSET" \
      $(find . -name '*.proto' -printf '%P '))
    "$python" -W ignore::ResourceWarning "$here/python_test.py" "$scratch/stubs"
    ;;
  node)
    need_node
    node --test "$here/node_test.js"
    ;;
  buf)
    need_npm
    # By itself: it brings a program of some 80 MB.
    [[ -x $scratch/buf/node_modules/.bin/buf ]] ||
      npm install --no-save --no-audit --no-fund --fetch-retries 1 --prefix "$scratch/buf" \
        "@bufbuild/buf@$BUF_VERSION" >"$scratch/buf.log" 2>&1 ||
      skip "npm can't install @bufbuild/buf (see $scratch/buf.log)"
    "$scratch/buf/node_modules/.bin/buf" lint "$root/proto"
    echo "the protos keep the rules of proto/buf.yaml"
    ;;
  examples)
    need_python
    need_node
    serve
    try_example "$build/bin/example_stream"
    mkdir -p "$scratch/example-stubs"
    (cd "$root/proto" && protoc -I. --plugin=protoc-gen-grpc="$(command -v grpc_python_plugin)" \
      --python_out="$scratch/example-stubs" --grpc_out="$scratch/example-stubs" \
      firesteel/v1/*.proto google/api/*.proto google/rpc/*.proto)
    PYTHONPATH=$scratch/example-stubs try_example "$python" "$root/docs/examples/stream.py"
    try_example node "$root/docs/examples/stream.js"
    ;;
esac
