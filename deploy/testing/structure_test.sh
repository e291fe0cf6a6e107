#!/bin/bash
# The files of this folder agree with each other, with the server's options and with its metrics; every
# configuration is read by the program that it is for, where Debian has it.
#
# usage: deploy/testing/structure_test.sh SERVER_PROGRAM
readonly server=${1:?usage: $0 SERVER_PROGRAM}
readonly bin=$(dirname "$server")
# shellcheck source=deploy/testing/common.sh
source "$(dirname "$0")/common.sh"
need jq yq jsonnet promtool haproxy
cd "$source_dir/deploy"

# --- Dashboards ---
grafana/render.sh --check
families=$(grep -oE '^\| `[a-z0-9_]+`' "$source_dir/docs/metrics.md" | tr -d '|` ')
known() { # NAME: a family, or a histogram's series of one
  grep -qx "$1" <<<"$families" || grep -qx "${1%_@(bucket|sum|count)}" <<<"$families"
}
shopt -s extglob
check_metrics() { # FILE, with expressions on standard input
  local name
  while read -r name; do
    known "$name" || fail "$1: docs/metrics.md has no family $name"
  done < <(grep -oE '\b(firesteel|grpc_server|process)_[a-z0-9_]+' | sort -u)
}
for file in grafana/dashboards/*.json; do
  jq -e '.uid and .title and .description and (.templating.list | map(.name) == ["datasource", "model", "instance"])' \
    "$file" >/dev/null || fail "$file: title, description or variables are missing"
  bad=$(jq -r '.panels[] | select((.title and .description and .fieldConfig.defaults.unit and
    (.fieldConfig.defaults.thresholds.steps | length > 0) and (.targets | length > 0)) | not) | .title' "$file")
  [[ -z $bad ]] || fail "$file: panels without title, description, unit, thresholds or query: $bad"
  jq -e '[.panels[].gridPos | [range(.x; .x + .w)] as $xs | [range(.y; .y + .h)] as $ys | $xs[] as $x | $ys[] as $y
    | [$x, $y]] | (length == (unique | length)) and all(.[]; .[0] < 24)' "$file" >/dev/null || fail "$file: panels overlap"
  # Labels of a metric and of a variable look alike: only what is outside of braces is a name.
  jq -r '.panels[].targets[].expr | gsub("\\{[^}]*\\}"; "")' "$file" | check_metrics "$file"
done
say "dashboards are what dashboards.jsonnet makes, and ask for families that exist"

# --- Rules ---
for file in prometheus local; do
  promtool check config prometheus/$file.yaml >"$scratch/promtool.log" 2>&1 || fail "$file.yaml"
done
promtool test rules prometheus/rules_test.yaml >"$scratch/promtool.log" 2>&1 || fail "rules_test.yaml"
yaml prometheus/rules.yaml >"$scratch/rules.json"
jq -r '.groups[].rules[].expr | gsub("\\{[^}]*\\}"; "") | gsub("(job|model_name|model_name_layer):[a-z0-9_:]+"; "")
  | gsub("\\([a-z_, ]*\\)"; "")' "$scratch/rules.json" | check_metrics prometheus/rules.yaml
while IFS=$'\t' read -r alert runbook; do
  heading=${runbook#*#}
  grep -qi "^#\+ $heading\$" "$source_dir/${runbook%#*}" || fail "$alert: $runbook has no such heading"
  grep -q "alertname: $alert\$" prometheus/rules_test.yaml || fail "$alert has no test"
done < <(jq -r '.groups[].rules[] | select(.alert) | [.alert, .annotations.runbook] | @tsv' "$scratch/rules.json")
say "rules pass their tests, every alert has one and a place in the runbook"

# --- Options: what is set anywhere is an option of the server ---
options=$("$server" --model x --print-config | grep -oE '^#? ?[a-z-]+:' | tr -d '#: ')
readonly more="model health-address tls-cert tls-key tls-client-ca auth-token-file"
while read -r variable; do
  option=$(tr 'A-Z_' 'a-z-' <<<"${variable#FIRESTEEL_}")
  [[ $variable == FIRESTEEL_IMAGE ]] || grep -qx "$option" <<<"$options" || [[ " $more " == *" $option "* ]] ||
    fail "$variable is no option of firesteel-server"
done < <(grep -rhoE '\bFIRESTEEL_[A-Z_]+' compose kubernetes "$source_dir/Dockerfile" | sort -u)

# --- Compose ---
haproxy -c -f compose/haproxy.cfg >"$scratch/haproxy.log" 2>&1 || fail "haproxy.cfg"
yaml compose/compose.yaml >"$scratch/compose.json"
yaml compose/compose.haproxy.yaml >"$scratch/overlay.json"
yaml compose/envoy.yaml >"$scratch/envoy.json"
jq -e '.services.firesteel | .deploy.replicas >= 2 and .read_only and .cap_drop == ["ALL"]
  and .environment.FIRESTEEL_THREADS == .deploy.resources.limits.cpus
  and (.stop_grace_period | rtrimstr("s") | tonumber) >
    (.environment.FIRESTEEL_WITHDRAW_SECONDS | tonumber) + (.environment.FIRESTEEL_DRAIN_SECONDS | tonumber) + 2' \
  "$scratch/compose.json" >/dev/null || fail "compose.yaml: replicas, rights, threads or drain time"
# Every mounted file is there.
while read -r path; do
  [[ -e compose/$path ]] || fail "compose: $path does not exist"
done < <(jq -r '.services[].volumes[]? | split(":")[0]' "$scratch/compose.json" "$scratch/overlay.json")
jq -e '.static_resources.clusters[0] | .lb_policy == "LEAST_REQUEST" and .health_checks[0].grpc_health_check
  and .outlier_detection' "$scratch/envoy.json" >/dev/null || fail "envoy.yaml: balancing or health"
jq -e '[.. | .stream_idle_timeout? // empty] == ["0s"] and ([.. | .route? // empty | .timeout? // empty] == ["0s"])' \
  "$scratch/envoy.json" >/dev/null || fail "envoy.yaml: a time limit would cut streams"
say "compose files agree with the server and with each other"

# --- Kubernetes ---
yaml kubernetes/base/deployment.yaml >"$scratch/deployment.json"
jq -e '.spec as $d | $d.template.spec as $pod | $pod.containers[0] as $c
  | ($c.env | map({(.name): .value}) | add) as $env
  | $c.resources.requests == $c.resources.limits and $c.resources.requests.cpu == $env.FIRESTEEL_THREADS
  and $pod.terminationGracePeriodSeconds >
    ($env.FIRESTEEL_WITHDRAW_SECONDS | tonumber) + ($env.FIRESTEEL_DRAIN_SECONDS | tonumber) + 2
  and $pod.securityContext.runAsNonRoot and $c.securityContext.readOnlyRootFilesystem
  and $c.securityContext.allowPrivilegeEscalation == false and $c.securityContext.capabilities.drop == ["ALL"]
  and ([$c.startupProbe, $c.readinessProbe, $c.livenessProbe]
    | all(.grpc.port == ($env.FIRESTEEL_HEALTH_ADDRESS | split(":")[1] | tonumber)))
  and $d.selector.matchLabels == $d.template.metadata.labels' \
  "$scratch/deployment.json" >/dev/null || fail "deployment.yaml: resources, rights, probes or labels"
labels=$(jq -c .spec.selector.matchLabels "$scratch/deployment.json")
selects() { # FILE PATH: selects the deployment's pods
  yaml "kubernetes/$1" | jq -e --argjson labels "$labels" "$2 == \$labels" >/dev/null || fail "$1 selects other pods"
}
selects base/service.yaml .spec.selector
selects base/disruption-budget.yaml .spec.selector.matchLabels
selects base/network-policy.yaml .spec.podSelector.matchLabels
selects monitoring/service-monitor.yaml .spec.selector.matchLabels
yaml kubernetes/base/service.yaml | jq -e '.spec.clusterIP == "None"' >/dev/null || fail "service.yaml is not headless"
# Ports go by names, from the container to the Service, the NetworkPolicy and the ServiceMonitor.
ports() { # FILE PATH
  yaml "kubernetes/$1" | jq -r "$2" | sort -u
}
comm -13 <(ports base/deployment.yaml '.spec.template.spec.containers[0].ports[].name') \
  <({ ports base/service.yaml '.spec.ports[].targetPort'
    ports base/network-policy.yaml '.spec.ingress[].ports[].port'; } | sort -u) |
  grep . && fail "a port is none of the container's"
comm -13 <(ports base/service.yaml '.spec.ports[].name') <(ports monitoring/service-monitor.yaml '.spec.endpoints[].port') |
  grep . && fail "service-monitor.yaml: the port is none of the Service's"
yaml kubernetes/base/autoscaler.yaml | jq -r '.spec.metrics[].pods.metric.name' | check_metrics autoscaler.yaml
for folder in base monitoring model-volume model-init; do
  yaml kubernetes/$folder/kustomization.yaml >"$scratch/kustomization.json"
  while read -r file; do
    [[ -s kubernetes/$folder/$file ]] || fail "kubernetes/$folder: no $file"
  done < <(jq -r '.resources[]?' "$scratch/kustomization.json")
  if kubectl kustomize --help >/dev/null 2>&1 && [[ $folder == base ]]; then
    kubectl kustomize kubernetes/base >"$scratch/kustomize.log" 2>&1 || fail "kubectl kustomize"
  fi
done
say "Kubernetes files agree with the server and with each other"

# --- systemd ---
if command -v systemd-analyze >/dev/null; then
  # The program is not installed here: that line is expected.
  complaints=$(systemd-analyze verify systemd/firesteel.service 2>&1 | grep -v 'is not executable' || true)
  [[ -z $complaints ]] || fail "firesteel.service: $complaints"
fi
stop=$(sed -n 's/^TimeoutStopSec=//p' systemd/firesteel.service)
drain=$("$server" --model x --print-config | sed -n 's/^drain-seconds: *//p')
awk -v stop="$stop" -v drain="$drain" 'BEGIN { exit !(drain != "" && stop > drain + 0) }' || fail "TimeoutStopSec is not above drain-seconds"

# --- The image ---
version=$(sed -n 's/^project(firesteel VERSION \([0-9.]*\).*/\1/p' "$source_dir/CMakeLists.txt")
yaml kubernetes/base/kustomization.yaml | jq -e --arg v "$version" '.images[0].newTag == $v' >/dev/null ||
  fail "kustomization.yaml names another version than CMakeLists.txt"
grep -q '^USER 10001:10001$' "$source_dir/Dockerfile" && grep -q '^readonly user=10001' image/assemble.sh image/check.sh ||
  fail "the image's user is not the same everywhere"
say "systemd unit and image agree with the server"
