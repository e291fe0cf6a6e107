#!/bin/bash
# Every Kubernetes object of this clone, alone and with each component's patches, against the schemas that Kubernetes
# publishes. They come from npm, once for each build folder.
#
# usage: deploy/testing/kubernetes_test.sh BUILD_DIR
readonly build=${1:?usage: $0 BUILD_DIR}
# shellcheck source=deploy/testing/common.sh
source "$(dirname "$0")/common.sh"
need jq yq node npm flock
readonly here=$source_dir/deploy/testing/kubernetes packages=$build/kubernetes-schemas

mkdir -p "$packages"
(
  flock 9
  cmp -s "$here/package-lock.json" "$packages/package-lock.json" && [[ -f $packages/installed ]] && exit
  rm -f "$packages/installed"
  cp "$here"/package*.json "$packages"
  cd "$packages" && npm ci --no-audit --no-fund --fetch-retries 1 >npm.log 2>&1 && touch installed
) 9>"$packages/lock" || { echo "skipped: npm can't install the schemas (see $packages/npm.log)"; exit 77; }

cd "$source_dir/deploy/kubernetes"
objects=()
add() { # NAME, the object on standard input
  objects+=("$(jq -c --arg name "$1" '{name: $name, object: .}')")
}
for file in base/*.yaml monitoring/*.yaml; do
  [[ $file == */kustomization.yaml ]] || add "$file" < <(yaml "$file")
done
# A component's operations are all of JSON Patch's "add", with "-" for the end of a list.
for component in model-volume model-init; do
  yaml $component/kustomization.yaml | jq -r '.patches[].patch' >"$scratch/patch.yaml"
  operations=$(yaml "$scratch/patch.yaml")
  [[ $(jq -r 'map(.op) | unique[]' <<<"$operations") == add ]] || fail "$component: patches other than add"
  add $component < <(yaml base/deployment.yaml | jq --argjson operations "$operations" '
    reduce $operations[] as $operation (.;
      ($operation.path | split("/")[1:] | map(if test("^[0-9]+$") then tonumber else . end)) as $path
      | if $path[-1] == "-" then setpath($path[:-1]; getpath($path[:-1]) + [$operation.value])
        else setpath($path; $operation.value) end)')
done
NODE_PATH=$packages/node_modules node "$here/validate.js" < <(printf '%s\n' "${objects[@]}") || fail "objects break the schemas"
