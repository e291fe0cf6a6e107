#!/bin/bash
# Runs the client, firesteel, out of the root file system of an image: see server.sh.
#
# usage: FIRESTEEL_IMAGE_ROOT=ROOT deploy/image/client.sh ARGUMENT…     (as root; adds empty folders to ROOT)
set -euo pipefail
FIRESTEEL_IMAGE_PROGRAM=firesteel exec "$(dirname "$0")/server.sh" "$@"
