// Checks Kubernetes objects against the published schemas (npm's kubernetes-models), strictly: a field that the
// schema does not know is an error, too, as it is for the API server with --validate=strict.
//
// usage: node validate.js        with lines of {"name": …, "object": …} on standard input; NODE_PATH has the packages

'use strict';

const fs = require('node:fs');

const KINDS = {
  'apps/v1 Deployment': 'kubernetes-models/apps/v1',
  'autoscaling/v2 HorizontalPodAutoscaler': 'kubernetes-models/autoscaling/v2',
  'monitoring.coreos.com/v1 ServiceMonitor': '@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1',
  'networking.k8s.io/v1 NetworkPolicy': 'kubernetes-models/networking.k8s.io/v1',
  'policy/v1 PodDisruptionBudget': 'kubernetes-models/policy/v1',
  'v1 Service': 'kubernetes-models/v1',
};

/**
 * The same value, which notes in `seen` what is looked at: a validator looks at every field that its schema knows, and
 * only at those.
 */
function watched(value, path, seen) {
  if (value === null || typeof value !== 'object') return value;
  return new Proxy(value, {
    get(target, key) {
      if (typeof key === 'symbol' || !Object.hasOwn(target, key)) return target[key];
      seen.add(`${path}/${key}`);
      return watched(target[key], `${path}/${key}`, seen);
    },
  });
}

/** Paths of all fields below a value. */
function* fields(value, path) {
  if (value === null || typeof value !== 'object') return;
  for (const [key, below] of Object.entries(value)) {
    yield `${path}/${key}`;
    yield* fields(below, `${path}/${key}`);
  }
}

function errorsOf(object) {
  const kind = `${object.apiVersion} ${object.kind}`;
  if (!KINDS[kind]) return [`no schema for ${kind}`];
  const Model = require(KINDS[kind])[object.kind];
  const seen = new Set();
  try {
    Model.prototype.validate.call(watched(object, '', seen)); // a Model would look at every field by itself
  } catch (error) {
    return [error.message];
  }
  return [...fields(object, '')].filter((path) => !seen.has(path)).map((path) => `unknown field ${path}`);
}

let failed = 0;
const lines = fs.readFileSync(0, 'utf8').split('\n').filter((line) => line);
for (const line of lines) {
  const {name, object} = JSON.parse(line);
  for (const error of errorsOf(object)) {
    console.error(`${name}: ${error}`);
    ++failed;
  }
}
if (lines.length === 0) throw new Error('nothing to check');
console.log(`${lines.length} objects checked, ${failed} errors`);
process.exit(failed ? 1 : 0);
