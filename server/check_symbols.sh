#!/bin/sh
# Fails where a program shares protobuf's symbols with its shared libraries (why: proto/CMakeLists.txt).
# usage: check_symbols.sh PROGRAM
set -eu
found=$(nm -DC "$1" | grep 'google::protobuf' || true)
if [ -n "$found" ]; then
  echo "$1 exports or imports protobuf's symbols:" >&2
  echo "$found" | head >&2
  exit 1
fi
