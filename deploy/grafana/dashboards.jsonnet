// The dashboards: what each panel asks of Prometheus, written once. render.sh makes the files in
// dashboards/ from it, which Grafana's provisioning loads and the tests query.

local source = { type: 'prometheus', uid: '${datasource}' };

// Every query is of the chosen models and instances.
local selector = 'model_name=~"$model",instance=~"$instance"';
local replica = 'instance=~"$instance"';

local target(expr, legend='', format='time_series') = {
  datasource: source,
  expr: expr,
  legendFormat: legend,
  format: format,
};

local steps(green_below, yellow_below) = {
  mode: 'absolute',
  steps: [
    { color: 'green', value: null },
    { color: 'yellow', value: green_below },
    { color: 'red', value: yellow_below },
  ],
};
local plain = { mode: 'absolute', steps: [{ color: 'green', value: null }] };

local panel(type, title, description, targets, unit, thresholds=plain, width=12, height=8) = {
  type: type,
  title: title,
  description: description,
  datasource: source,
  targets: [targets[i] { refId: std.char(65 + i) } for i in std.range(0, std.length(targets) - 1)],
  fieldConfig: {
    defaults: {
      unit: unit,
      thresholds: thresholds,
      min: if unit == 'percentunit' || unit == 's' || unit == 'reqps' then 0 else null,
      custom: if type == 'timeseries' then {
        lineWidth: 1,
        fillOpacity: 8,
        showPoints: 'never',
        thresholdsStyle: { mode: if thresholds == plain then 'off' else 'line' },
      } else {},
    },
    overrides: [],
  },
  options: {
    timeseries: { legend: { displayMode: 'list', placement: 'bottom' }, tooltip: { mode: 'multi', sort: 'desc' } },
    stat: { reduceOptions: { calcs: ['lastNotNull'] }, graphMode: 'area', colorMode: 'value' },
    bargauge: { reduceOptions: { calcs: ['lastNotNull'] }, displayMode: 'gradient', orientation: 'horizontal' },
    heatmap: { calculate: false, cellGap: 1, color: { scheme: 'Oranges', mode: 'scheme' }, yAxis: { unit: unit }, tooltip: { mode: 'single' } },
    table: { showHeader: true },
  }[type],
  size:: { w: width, h: height },
};
local graph(title, description, targets, unit, thresholds=plain, width=12) =
  panel('timeseries', title, description, targets, unit, thresholds, width);
local stat(title, description, expr, unit, thresholds=plain) =
  panel('stat', title, description, [target(expr)], unit, thresholds, 4, 4);

// Panels from left to right in rows of 24 columns.
local place(panels) = std.foldl(
  function(state, p)
    local wraps = state.x + p.size.w > 24;
    local x = if wraps then 0 else state.x;
    local y = if wraps then state.y + state.rowHeight else state.y;
    {
      x: x + p.size.w,
      y: y,
      rowHeight: if wraps then p.size.h else std.max(state.rowHeight, p.size.h),
      panels: state.panels + [p { id: std.length(state.panels) + 1, gridPos: { x: x, y: y } + p.size }],
    },
  panels,
  { x: 0, y: 0, rowHeight: 0, panels: [] }
).panels;

local variable(name, label, query) = {
  name: name,
  label: label,
  type: 'query',
  datasource: source,
  query: { query: query, refId: name },
  definition: query,
  refresh: 2,
  sort: 1,
  multi: true,
  includeAll: true,
  allValue: '.+',
  current: { text: ['All'], value: ['$__all'] },
};

local dashboard(uid, title, description, panels) = {
  uid: uid,
  title: title,
  description: description,
  tags: ['firesteel'],
  editable: false,
  graphTooltip: 1,
  refresh: '10s',
  schemaVersion: 39,
  version: 1,
  time: { from: 'now-30m', to: 'now' },
  timezone: '',
  links: [{ type: 'dashboards', tags: ['firesteel'], title: 'Firesteel', asDropdown: false, includeVars: true, keepTime: true }],
  annotations: { list: [] },
  templating: {
    list: [
      { name: 'datasource', label: 'Data source', type: 'datasource', query: 'prometheus', current: {}, hide: 0 },
      variable('model', 'Model', 'label_values(firesteel_build_info, model_name)'),
      variable('instance', 'Instance', 'label_values(firesteel_build_info{model_name=~"$model"}, instance)'),
    ],
  },
  panels: place(panels),
};

local quantiles(family, by='') = [
  target('histogram_quantile(%s, sum by (le%s) (rate(firesteel_%s_bucket{%s}[$__rate_interval])))' % [q, by, family, selector], 'p%d' % (q * 100))
  for q in [0.5, 0.9, 0.99]
];
local mean(family, by) =
  'sum by (%s) (rate(firesteel_%s_sum{%s}[$__rate_interval])) / sum by (%s) (rate(firesteel_%s_count{%s}[$__rate_interval]))' %
  [by, family, selector, by, family, selector];
local share(family, part) =
  'sum(rate(firesteel_%s{kind="%s",%s}[$__rate_interval])) / sum(rate(firesteel_%s{%s}[$__rate_interval]))' %
  [family, part, selector, family, selector];

local service = dashboard(
  'firesteel-service',
  'Firesteel: service',
  'Rate, errors and latency as clients see them, and what saturates first.',
  [
    stat('Requests a second', 'Generations that ended.', 'sum(rate(firesteel_requests_total{%s}[$__rate_interval]))' % selector, 'reqps'),
    stat('Tokens a second', 'Generated tokens.', 'sum(rate(firesteel_generation_tokens_total{%s}[$__rate_interval]))' % selector, 'short'),
    stat('Failed', 'Part of all calls that ended with a code of the server\'s: neither OK nor the caller\'s own cancellation, deadline or mistake.',
         '(sum(rate(grpc_server_handled_total{grpc_code=~"Unknown|Internal|Unavailable|ResourceExhausted|DataLoss|Unimplemented",%s}[$__rate_interval])) or vector(0)) / sum(rate(grpc_server_handled_total{%s}[$__rate_interval]))' % [replica, replica],
         'percentunit',
         steps(0.001, 0.01)),
    stat('First token, p99', 'From arrival to the first token.', 'histogram_quantile(0.99, sum by (le) (rate(firesteel_time_to_first_token_seconds_bucket{%s}[$__rate_interval])))' % selector, 's', steps(1, 5)),
    stat('Waiting', 'Requests in the queues.', 'sum(firesteel_requests_waiting{%s})' % selector, 'short', steps(8, 64)),
    stat('KV cache', 'The fullest replica\'s.', 'max(firesteel_kv_cache_usage_ratio{%s})' % selector, 'percentunit', steps(0.8, 0.95)),
    graph('Calls by code', 'Calls of all gRPC methods that ended.', [target('sum by (grpc_code) (rate(grpc_server_handled_total{%s}[$__rate_interval]))' % replica, '{{grpc_code}}')], 'reqps'),
    graph('Endings and refusals', 'How generations ended, and why others were refused before any work.', [
      target('sum by (finish_reason) (rate(firesteel_requests_total{%s}[$__rate_interval]))' % selector, '{{finish_reason}}'),
      target('sum by (reason) (rate(firesteel_admission_rejections_total{%s}[$__rate_interval]))' % selector, 'refused: {{reason}}'),
    ], 'reqps'),
    graph('Time to first token', 'From a request\'s arrival to its first token: queue and prefill.', quantiles('time_to_first_token_seconds'), 's', steps(1, 5)),
    graph('Inter-token latency', 'From one token of a sequence to its next.', quantiles('inter_token_latency_seconds'), 's', steps(0.1, 0.5)),
    graph('Where a request\'s time goes', 'Mean times in the queue, in prefill and in decode.', [
      target(mean('request_queue_time_seconds', 'model_name'), '{{model_name}}: queue'),
      target(mean('request_prefill_time_seconds', 'model_name'), '{{model_name}}: prefill'),
      target(mean('request_decode_time_seconds', 'model_name'), '{{model_name}}: decode'),
    ], 's'),
    graph('End to end', 'From a request\'s arrival to its end.', quantiles('e2e_request_latency_seconds'), 's'),
    graph('Running and waiting', 'Requests in the batches, and in the queues before them.', [
      target('sum by (model_name) (firesteel_requests_running{%s})' % selector, '{{model_name}}: running'),
      target('sum by (model_name) (firesteel_requests_waiting{%s})' % selector, '{{model_name}}: waiting'),
    ], 'short'),
    graph('Batch', 'Sequences in a step, and tokens computed in it.', [
      target(mean('batch_size', 'model_name'), '{{model_name}}: sequences'),
      target(mean('iteration_tokens', 'model_name'), '{{model_name}}: tokens'),
    ], 'short'),
    graph('Tokens', 'Prompt tokens computed and taken from the prefix cache, and tokens generated, each second.', [
      target('sum(rate(firesteel_prompt_tokens_total{%s}[$__rate_interval]))' % selector, 'prompt, computed'),
      target('sum(rate(firesteel_prompt_tokens_cached_total{%s}[$__rate_interval]))' % selector, 'prompt, cached'),
      target('sum(rate(firesteel_generation_tokens_total{%s}[$__rate_interval]))' % selector, 'generated'),
    ], 'short'),
    graph('KV cache', 'Used part of each replica\'s cache, and running requests that lost their place for want of room.', [
      target('firesteel_kv_cache_usage_ratio{%s}' % selector, '{{instance}} {{model_name}}'),
      target('sum(rate(firesteel_preemptions_total{%s}[$__rate_interval]))' % selector, 'preemptions a second'),
    ], 'percentunit', steps(0.8, 0.95)),
    graph('Step duration by phase', 'Mean duration of a step: prefill only, decode only, or both.', [target(mean('step_duration_seconds', 'phase'), '{{phase}}')], 's'),
    graph('CPU and memory', 'Cores in use, and memory of the process in GiB.', [
      target('sum by (instance) (rate(process_cpu_seconds_total{%s}[$__rate_interval]))' % replica, '{{instance}}: cores'),
      target('sum by (instance) (process_resident_memory_bytes{%s}) / 2^30' % replica, '{{instance}}: GiB'),
    ], 'short'),
  ]
);

local byLayer(family) =
  'sort_desc(sum by (layer) (rate(firesteel_%s_sum{%s}[$__rate_interval])) / sum by (layer) (rate(firesteel_%s_count{%s}[$__rate_interval])))' % [family, selector, family, selector];

local sparsity = dashboard(
  'firesteel-sparsity',
  'Firesteel: sparsity',
  'How much of the model is computed, layer by layer, and what that saves.',
  [
    stat('FFN active', 'Mean over layers and tokens. A Spark model aims at 8%.', 'sum(rate(firesteel_ffn_active_fraction_sum{%s}[$__rate_interval])) / sum(rate(firesteel_ffn_active_fraction_count{%s}[$__rate_interval]))' % [selector, selector], 'percentunit', steps(0.1, 0.15)),
    stat('FLOPs skipped', 'Of those of the same model with every neuron and position computed.', share('flops_total', 'skipped'), 'percentunit'),
    stat('Weight bytes skipped', 'Bytes that no step had to read.', share('weight_bytes_total', 'skipped'), 'percentunit'),
    stat('Worst top-k drift', 'The layer whose realised k is farthest from its target, as a fraction of it.', 'max(abs(firesteel_ffn_topk_ratio{%s} - 1))' % selector, 'percentunit', steps(0.25, 0.5)),
    stat('Positions attended', 'Mean of a head, over layers and tokens.', 'sum(rate(firesteel_attention_attended_positions_sum{%s}[$__rate_interval])) / sum(rate(firesteel_attention_attended_positions_count{%s}[$__rate_interval]))' % [selector, selector], 'short'),
    stat('Tokens a second', 'Generated tokens.', 'sum(rate(firesteel_generation_tokens_total{%s}[$__rate_interval]))' % selector, 'short'),
    panel('heatmap', 'FFN active fraction, all layers', 'How many (token, layer) pairs had which part of their neurons active.', [target('sum by (le) (increase(firesteel_ffn_active_fraction_bucket{%s}[$__rate_interval]))' % selector, '{{le}}', 'heatmap')], 'percentunit'),
    panel('heatmap', 'FFN active fraction by layer', 'Mean of each layer over time: one that stands out has scores far from a Gaussian.', [target(mean('ffn_active_fraction', 'layer'), '{{layer}}')], 'percentunit'),
    graph('Realised over target k, by layer', 'Drift of the Gaussian assumption behind statistical top-k: 1 is what the model was trained for.', [target('avg by (layer) (firesteel_ffn_topk_ratio{%s})' % selector, 'layer {{layer}}')], 'short'),
    graph('Batch-union density', 'Neurons that at least one token of a step needed: what a batch really reads. It grows with the batch, and with it the bytes of a step.', [
      target(mean('ffn_batch_union_fraction', 'layer'), 'layer {{layer}}'),
    ], 'percentunit'),
    panel('heatmap', 'Attended positions', 'How many (token, layer) pairs attended to how many positions.', [target('sum by (le) (increase(firesteel_attention_attended_positions_bucket{%s}[$__rate_interval]))' % selector, '{{le}}', 'heatmap')], 'short'),
    panel('bargauge', 'Attended fraction by layer', 'Positions attended to, of those that a head could see. Short prompts attend to nearly all.', [target(byLayer('attention_attended_fraction'), 'layer {{layer}}') { instant: true }], 'percentunit'),
    graph('FLOPs', 'Performed and skipped, each second.', [target('sum by (kind) (rate(firesteel_flops_total{%s}[$__rate_interval]))' % selector, '{{kind}}')], 'flops'),
    graph('Bytes of weights', 'Read and skipped, each second.', [target('sum by (kind) (rate(firesteel_weight_bytes_total{%s}[$__rate_interval]))' % selector, '{{kind}}')], 'Bps'),
    graph('Tokens beside sparsity', 'Generated tokens a second, beside the sequences in a step: sparsity pays most in small batches.', [
      target('sum(rate(firesteel_generation_tokens_total{%s}[$__rate_interval]))' % selector, 'tokens a second'),
      target(mean('batch_size', 'model_name'), '{{model_name}}: sequences in a step'),
    ], 'short'),
    graph('FLOPs of a generated token', 'Performed FLOPs over generated tokens, prompts included.', [target('sum(rate(firesteel_flops_total{kind="performed",%s}[$__rate_interval])) / sum(rate(firesteel_generation_tokens_total{%s}[$__rate_interval]))' % [selector, selector], 'FLOPs')], 'short'),
  ]
);

local each(expr) = target(expr, '{{instance}}');
local fleet = dashboard(
  'firesteel-fleet',
  'Firesteel: fleet',
  'Replicas side by side: does the balancer spread the load, and does one of them stand out?',
  [
    stat('Replicas up', 'Those that answer Prometheus.', 'count(firesteel_build_info{%s})' % selector, 'short'),
    stat('Imbalance', 'Most over fewest tokens a second of a replica.', 'max(sum by (instance) (rate(firesteel_generation_tokens_total{%s}[$__rate_interval]))) / min(sum by (instance) (rate(firesteel_generation_tokens_total{%s}[$__rate_interval])))' % [selector, selector], 'short', steps(1.3, 2)),
    stat('Requests a second', 'Of all replicas.', 'sum(rate(firesteel_requests_total{%s}[$__rate_interval]))' % selector, 'reqps'),
    stat('Waiting', 'Requests in all queues.', 'sum(firesteel_requests_waiting{%s})' % selector, 'short', steps(8, 64)),
    stat('Cores', 'In use by all replicas.', 'sum(rate(process_cpu_seconds_total{%s}[$__rate_interval]))' % replica, 'short'),
    stat('Refused', 'Requests refused before any work, each second.', 'sum(rate(firesteel_admission_rejections_total{%s}[$__rate_interval]))' % selector, 'reqps', steps(0.1, 1)),
    panel('table', 'What runs', 'Version, SIMD target and weights of each replica: they should agree, or bits may differ.', [target('sum by (instance, model_name, version, simd_target, weights) (firesteel_build_info{%s})' % selector, '', 'table') { instant: true }], 'short', width=24, height=6),
    graph('Requests', 'Generations that ended, each second.', [each('sum by (instance) (rate(firesteel_requests_total{%s}[$__rate_interval]))' % selector)], 'reqps'),
    graph('Tokens', 'Generated tokens a second.', [each('sum by (instance) (rate(firesteel_generation_tokens_total{%s}[$__rate_interval]))' % selector)], 'short'),
    graph('Running', 'Requests in the batch.', [each('sum by (instance) (firesteel_requests_running{%s})' % selector)], 'short'),
    graph('Waiting', 'Requests in the queue.', [each('sum by (instance) (firesteel_requests_waiting{%s})' % selector)], 'short', steps(8, 64)),
    graph('Time to first token, p90', 'From arrival to the first token.', [each('histogram_quantile(0.9, sum by (le, instance) (rate(firesteel_time_to_first_token_seconds_bucket{%s}[$__rate_interval])))' % selector)], 's', steps(1, 5)),
    graph('Inter-token latency, p90', 'From one token to the next.', [each('histogram_quantile(0.9, sum by (le, instance) (rate(firesteel_inter_token_latency_seconds_bucket{%s}[$__rate_interval])))' % selector)], 's', steps(0.1, 0.5)),
    graph('KV cache', 'Used part.', [each('max by (instance) (firesteel_kv_cache_usage_ratio{%s})' % selector)], 'percentunit', steps(0.8, 0.95)),
    graph('CPU', 'Cores in use.', [each('sum by (instance) (rate(process_cpu_seconds_total{%s}[$__rate_interval]))' % replica)], 'short'),
    graph('FFN active', 'Mean over layers and tokens: replicas of one model should agree.', [each(mean('ffn_active_fraction', 'instance'))], 'percentunit'),
    graph('Memory', 'Of the process, in RAM.', [each('sum by (instance) (process_resident_memory_bytes{%s})' % replica)], 'bytes'),
  ]
);

{ 'service.json': service, 'sparsity.json': sparsity, 'fleet.json': fleet }
