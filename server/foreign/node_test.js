// Firesteel as a Node client meets it: grpc-js from npm, by the .proto files and by reflection.
// FIRESTEEL_SERVER_PROGRAM names the server; NODE_PATH has the packages of package.json.

'use strict';

const {test, after, before, describe} = require('node:test');
const os = require('node:os');
const path = require('node:path');
const {execFileSync} = require('node:child_process');
const {ROOT, OPTIONS, Server, loadProtos, call, collect, detailsOf, loadReportOf, assert, grpc,
       protoLoader, fs} = require('./node_server.js');

const protos = loadProtos();
const v1 = protos.firesteel.v1;
const insecure = grpc.credentials.createInsecure();
const story = {prompt: 'Once upon a time', max_tokens: 12, sampling: {temperature: 0},
               stopping: {ignore_eos: true}};

describe('one server', () => {
  let server, generation, models, health, kserve;
  before(async () => {
    server = await new Server().ready;
    generation = new v1.GenerationService(server.address, insecure);
    models = new v1.ModelService(server.address, insecure);
    health = new protos.grpc.health.v1.Health(server.address, insecure);
    kserve = new protos.inference.GRPCInferenceService(server.address, insecure);
  });
  after(() => server.stop());

  test('Generate and GenerateStream agree', async () => {
    const metadata = new grpc.Metadata();
    metadata.set('x-request-id', 'from-node');
    const {response, metadata: initial, trailers} = await call(generation, 'Generate', story, {metadata});
    assert.equal(response.request_id, 'from-node');
    assert.deepEqual(initial.get('x-request-id'), ['from-node']);
    assert.deepEqual(trailers.get('x-request-id'), ['from-node']);
    assert.equal(response.sequences[0].finish_reason, 'FINISH_REASON_LENGTH');
    const {messages, status} = await collect(generation.GenerateStream(story));
    assert.equal(status.code, grpc.status.OK);
    assert.equal(messages.map((m) => m.sequence.text).join(''), response.sequences[0].text);
    const last = messages.at(-1);
    assert.equal(last.usage.generated_tokens, 12);
    assert.ok(last.sparsity.ffn_active_fraction > 0.02 && last.sparsity.ffn_active_fraction < 0.2);
    assert.ok(messages.slice(0, -1).every((m) => m.usage === null));
  });

  test('several sequences, log-probabilities, echo', async () => {
    const {response} = await call(generation, 'Generate', {
      ...story, n: 3, sampling: {temperature: 0.8, seed: 7},
      output: {logprobs: 4, echo: true, return_token_ids: true}});
    assert.equal(response.sequences.length, 3);
    for (const sequence of response.sequences) {
      assert.ok(sequence.text.startsWith('Once upon a time'));
      assert.equal(sequence.logprobs.length, sequence.token_ids.length);
      assert.ok(!('logprob' in sequence.logprobs[0]) || sequence.logprobs[0]._logprob === undefined);
      const generated = sequence.logprobs.at(-1);
      assert.equal(generated.alternatives.length, 4);
      assert.ok(generated.logprob <= generated.alternatives[0].logprob);
    }
    assert.equal(response.usage.generated_tokens, 36);
  });

  test('Tokenize, Detokenize and Score', async () => {
    const text = 'The dragon and the mouse';
    const {response: tokens} = await call(generation, 'Tokenize', {text});
    const ids = tokens.tokens.map((t) => t.token_id);
    const {response: back} = await call(generation, 'Detokenize', {token_ids: ids});
    assert.equal(back.text.trim(), text);
    const {response: score} = await call(generation, 'Score', {prompt: text});
    assert.deepEqual(score.tokens.map((t) => t.token_id), ids);
    assert.ok(score.tokens.slice(1).every((t) => t.logprob <= 0 && t.logprob > -40));
  });

  test('models and server info', async () => {
    const {response: list} = await call(models, 'ListModels', {});
    assert.equal(list.models[0].name, 'spark-stories');
    const {response: one} = await call(models, 'GetModel', {model: 'spark-stories'});
    assert.equal(one.model.architecture, 'ARCHITECTURE_SPARK_GEMMA2');
    assert.equal(one.model.limits.max_sequences, 16);
    const {response: info} = await call(models, 'GetServerInfo', {});
    assert.deepEqual(info.models, ['spark-stories']);
  });

  test('the end of a generation tells balancers of the load', async () => {
    let report;
    do {  // rates are looked at once a second
      const {trailers} = await call(generation, 'Generate', story);
      report = loadReportOf(trailers);
      assert.ok(report.applicationUtilization >= 0 && report.applicationUtilization <= 1);
      assert.ok(report.namedMetrics['firesteel.requests_running'] >= 0);
      assert.ok(report.utilization['firesteel.kv_cache'] >= 0);
    } while (!(report.rpsFractional > 0 && report.cpuUtilization > 0));
    assert.equal(report.eps, 0);
    const {status} = await collect(generation.GenerateStream(story));
    assert.ok(loadReportOf(status.metadata).rpsFractional > 0);
    const {trailers} = await call(generation, 'Tokenize', {text: 'x'});
    assert.equal(loadReportOf(trailers), null, 'only calls that generate are reported');
    const {response: load} = await call(models, 'GetLoad', {});
    assert.equal(load.models[0].model, 'spark-stories');
    assert.ok(load.models[0].max_batch_size > 0 && load.models[0].kv_cache_capacity_tokens > 0);
    assert.equal(load.draining, false);
  });

  test('a cancelled stream ends, and its work with it', async () => {
    const stream = generation.GenerateStream({...story, max_tokens: 900});
    const {status} = await collect(stream, (_, all) => { if (all.length === 2) stream.cancel(); });
    assert.equal(status.code, grpc.status.CANCELLED);
    for (;;) {
      const text = await (await fetch(`http://${server.metrics}/metrics`)).text();
      if (/^firesteel_requests_running\{.*\} 0$/m.test(text)) break;
    }
  });

  test('a deadline ends a call', async () => {
    await assert.rejects(call(generation, 'Generate', {...story, max_tokens: 900},
                              {deadline: Date.now() + 100}),
                         {code: grpc.status.DEADLINE_EXCEEDED});
  });

  test('errors name the field, the value and the limit', async () => {
    await assert.rejects(
        call(generation, 'Generate', {...story, sampling: {temperature: -1}, n: 17}), (error) => {
          assert.equal(error.code, grpc.status.INVALID_ARGUMENT);
          const details = detailsOf(error);
          assert.equal(details.ErrorInfo.reason, 'INVALID_REQUEST');
          assert.deepEqual(details.BadRequest.field_violations.map((v) => v.field),
                           ['sampling.temperature', 'n']);
          assert.match(details.BadRequest.field_violations[1].description, /17.*16/);
          return true;
        });
    await assert.rejects(call(models, 'GetModel', {model: 'gpt'}), (error) => {
      assert.equal(error.code, grpc.status.NOT_FOUND);
      assert.equal(detailsOf(error).ErrorInfo.reason, 'MODEL_NOT_FOUND');
      return true;
    });
  });

  test('health by name', async () => {
    for (const service of ['', 'spark-stories', 'firesteel.v1.GenerationService',
                           'inference.GRPCInferenceService']) {
      assert.equal((await call(health, 'Check', {service})).response.status, 'SERVING', service);
    }
    await assert.rejects(call(health, 'Check', {service: 'nobody'}), {code: grpc.status.NOT_FOUND});
  });

  test('KServe: readiness and metadata', async () => {
    assert.equal((await call(kserve, 'ServerLive', {})).response.live, true);
    assert.equal((await call(kserve, 'ServerReady', {})).response.ready, true);
    assert.equal((await call(kserve, 'ModelReady', {name: 'spark-stories'})).response.ready, true);
    assert.equal((await call(kserve, 'ModelReady', {name: 'x'})).response.ready, false);
    assert.equal((await call(kserve, 'ServerMetadata', {})).response.name, 'firesteel');
    const {response: model} = await call(kserve, 'ModelMetadata', {name: 'spark-stories'});
    assert.deepEqual(model.inputs, [{name: 'text_input', datatype: 'BYTES', shape: [-1]}]);
  });

  const infer = (texts, more = {}) => ({
    model_name: 'spark-stories', id: 'i1',
    parameters: {max_tokens: {int64_param: 8}, temperature: {double_param: 0},
                 ignore_eos: {bool_param: true}},
    inputs: [{name: 'text_input', datatype: 'BYTES', shape: [texts.length],
              contents: {bytes_contents: texts.map((t) => Buffer.from(t))}}], ...more});

  test('KServe: a batch, typed and raw', async () => {
    const {response} = await call(kserve, 'ModelInfer', infer(['Once upon a time', 'The cat']));
    const texts = response.outputs[0].contents.bytes_contents.map(String);
    assert.equal(texts.length, 2);
    const alone = await call(generation, 'Generate', {...story, max_tokens: 8});
    assert.equal(texts[0], alone.response.sequences[0].text);

    const raw = (text) => {
      const bytes = Buffer.from(text);
      const length = Buffer.alloc(4);
      length.writeUInt32LE(bytes.length);
      return Buffer.concat([length, bytes]);
    };
    const request = infer(['Once upon a time']);
    delete request.inputs[0].contents;
    request.raw_input_contents = [raw('Once upon a time')];
    const {response: answer} = await call(kserve, 'ModelInfer', request);
    assert.equal(answer.raw_output_contents[0].subarray(4).toString(), texts[0]);
  });

  test('KServe: a stream of requests', async () => {
    const stream = kserve.ModelStreamInfer();
    stream.write(infer(['Once upon a time'], {id: 'good'}));
    stream.write(infer(['x'], {id: 'bad', parameters: {temprature: {double_param: 1}}}));
    stream.end();
    const {messages, status} = await collect(stream);
    assert.equal(status.code, grpc.status.OK);
    const of = (id) => messages.filter((m) => m.infer_response.id === id);
    const text = of('good').map((m) => String(m.infer_response.outputs[0].contents.bytes_contents[0]));
    const alone = await call(generation, 'Generate', {...story, max_tokens: 8});
    assert.equal(text.join(''), alone.response.sequences[0].text);
    assert.equal(of('good').at(-1).infer_response.parameters.triton_final_response.bool_param, true);
    assert.match(of('bad')[0].error_message, /temprature/);
  });

  test('reflection is enough to call', async () => {
    const byReflection = await reflect(server.address, 'firesteel.v1.GenerationService');
    const client = new byReflection.firesteel.v1.GenerationService(server.address, insecure);
    const {response} = await call(client, 'Generate', story);
    assert.equal(response.usage.generated_tokens, 12);
    const {messages} = await collect(client.GenerateStream(story));
    assert.equal(messages.map((m) => m.sequence.text).join(''), response.sequences[0].text);
  });

  test('Watch sees the drain, running streams end well, new calls are refused', async () => {
    const seen = [];
    const watch = health.Watch({service: 'firesteel.v1.GenerationService'});
    watch.on('error', () => {});
    const serving = new Promise((resolve) => watch.on('data', (m) => {
      seen.push(m.status);
      if (m.status === 'NOT_SERVING') resolve();
    }));
    const stream = generation.GenerateStream({...story, max_tokens: 700});
    const running = collect(stream, (_, all) => { if (all.length === 1) server.signal('SIGTERM'); });
    await serving;
    assert.deepEqual(seen, ['SERVING', 'NOT_SERVING']);
    let refusal;
    while (!refusal) {
      await call(generation, 'Generate', {...story, max_tokens: 1}).catch((error) => { refusal = error; });
    }
    assert.equal(refusal.code, grpc.status.UNAVAILABLE);
    const {messages, status} = await running;
    assert.equal(status.code, grpc.status.OK, status.details);
    assert.equal(messages.at(-1).usage.generated_tokens, 700);
    assert.equal(await server.exited, 0);
  });
});

test('strangers learn nothing of the load', async () => {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'firesteel-'));
  const file = path.join(folder, 'tokens.yaml');
  fs.writeFileSync(file, `- name: nobody\n  sha256: ${'0'.repeat(64)}\n`);
  const server = await new Server('--auth-token-file', file).ready;
  try {
    const stranger = new v1.GenerationService(server.address, insecure);
    await assert.rejects(call(stranger, 'Generate', story), (error) => {
      assert.equal(error.code, grpc.status.UNAUTHENTICATED);
      assert.equal(loadReportOf(error.metadata), null);
      return true;
    });
    await assert.rejects(call(new v1.ModelService(server.address, insecure), 'GetLoad', {}),
                         {code: grpc.status.UNAUTHENTICATED});
  } finally {
    await server.stop();
    fs.rmSync(folder, {recursive: true});
  }
});

// A package definition from nothing but an address.
async function reflect(address, service) {
  const definition = protoLoader.fromJSON({nested: {grpc: {nested: {reflection: {nested: {v1alpha: {nested: {
    ServerReflection: {methods: {ServerReflectionInfo: {
      requestType: 'Request', requestStream: true, responseType: 'Response', responseStream: true}}},
    Request: {fields: {file_containing_symbol: {type: 'string', id: 4}}},
    Response: {fields: {file_descriptor_response: {type: 'Files', id: 4}}},
    Files: {fields: {file_descriptor_proto: {rule: 'repeated', type: 'bytes', id: 1}}},
  }}}}}}}}, OPTIONS);
  const {ServerReflection} = grpc.loadPackageDefinition(definition).grpc.reflection.v1alpha;
  const stream = new ServerReflection(address, insecure).ServerReflectionInfo();
  const answers = collect(stream);
  stream.write({file_containing_symbol: service});
  stream.end();
  const {messages: [answer]} = await answers;
  // A FileDescriptorSet: each file as field 1.
  const set = Buffer.concat(answer.file_descriptor_response.file_descriptor_proto.map((file) => {
    const head = [0x0a];
    let length = file.length;
    for (; length >= 0x80; length >>>= 7) head.push((length & 0x7f) | 0x80);
    head.push(length);
    return Buffer.concat([Buffer.from(head), file]);
  }));
  return grpc.loadPackageDefinition(protoLoader.loadFileDescriptorSetFromBuffer(set, OPTIONS));
}

describe('credentials', () => {
  const certificates = (dir, name = 'node-client') => {
    execFileSync(path.join(__dirname, 'make_certificates.sh'), [dir, name]);
    const read = (file) => fs.readFileSync(path.join(dir, file));
    return {dir, trusting: (mutual) => grpc.credentials.createSsl(
        read('ca.pem'), mutual ? read('client.key') : null, mutual ? read('client.pem') : null)};
  };
  const hash = (token) => require('node:crypto').createHash('sha256').update(token).digest('hex');
  let dir;
  before(() => { dir = fs.mkdtempSync(path.join(os.tmpdir(), 'firesteel-node-')); });
  after(() => fs.rmSync(dir, {recursive: true}));

  test('mutual TLS: only with a certificate', async () => {
    const made = certificates(path.join(dir, 'mtls'));
    const at = (file) => path.join(made.dir, file);
    const server = await new Server('--tls-cert', at('server.pem'), '--tls-key', at('server.key'),
                                    '--tls-client-ca', at('ca.pem')).ready;
    try {
      const client = new v1.GenerationService(server.address, made.trusting(true));
      const {response} = await call(client, 'Generate', story);
      assert.equal(response.usage.generated_tokens, 12);
      while (!/client=node-client/.test(server.log)) await new Promise(setImmediate);
      for (const credentials of [made.trusting(false), insecure]) {
        const stranger = new v1.ModelService(server.address, credentials);
        await assert.rejects(call(stranger, 'ListModels', {}), {code: grpc.status.UNAVAILABLE});
      }
    } finally {
      await server.stop();
    }
  });

  // Every call makes a connection of its own, so that each handshake sees the files as they are.
  test('certificates and tokens are renewed under load: no call fails', async () => {
    const first = certificates(path.join(dir, 'first'));
    const second = certificates(path.join(dir, 'second'));
    const served = path.join(dir, 'served');
    fs.mkdirSync(served);
    const put = (from) => ['server.key', 'server.pem'].forEach(
        (f) => fs.copyFileSync(path.join(from.dir, f), path.join(served, f)));
    const tokens = path.join(dir, 'tokens.yaml');
    const write = (...of) => {
      fs.writeFileSync(tokens + '.new', `- name: node\n  sha256: [${of.map(hash).join(', ')}]\n`);
      fs.renameSync(tokens + '.new', tokens);
    };
    put(first);
    write('old');
    const server = await new Server(
        '--tls-cert', path.join(served, 'server.pem'), '--tls-key', path.join(served, 'server.key'),
        '--auth-token-file', tokens, '--credentials-reload-seconds', '0.05').ready;
    try {
      // Trusts both authorities, as clients do while certificates change.
      const both = Buffer.concat([first, second].map((c) => fs.readFileSync(path.join(c.dir, 'ca.pem'))));
      const credentials = grpc.credentials.createSsl(both);
      const issuers = new Set();
      let token = 'old', stop = false, calls = 0;
      const loop = async () => {
        while (!stop) {
          const client = new v1.GenerationService(server.address, credentials, {
            'grpc.use_local_subchannel_pool': 1});
          const metadata = new grpc.Metadata();
          metadata.set('authorization', `Bearer ${token}`);
          await call(client, 'Generate', {...story, max_tokens: 2}, {metadata});
          client.close();
          ++calls;
        }
      };
      const load = Promise.all([loop(), loop(), loop(), loop()]);
      const after20 = async () => {
        for (const target = calls + 20; calls < target && !stop;) {
          await Promise.race([load, new Promise((resolve) => setTimeout(resolve, 5))]);
        }
      };
      const trusts = async (made) => {
        const client = new v1.ModelService(server.address, made.trusting(false),
                                           {'grpc.use_local_subchannel_pool': 1});
        const metadata = new grpc.Metadata();
        metadata.set('authorization', `Bearer ${token}`);
        return call(client, 'ListModels', {}, {metadata}).then(() => true, () => false);
      };
      await after20();
      put(second);
      while (!await trusts(second)) await after20();
      issuers.add('second');
      write('old', 'new');
      const expectToken = async (value, valid) => {
        for (;;) {
          const client = new v1.ModelService(server.address, credentials);
          const metadata = new grpc.Metadata();
          metadata.set('authorization', `Bearer ${value}`);
          const ok = await call(client, 'ListModels', {}, {metadata}).then(() => true, () => false);
          client.close();
          if (ok === valid) return;
          await after20();
        }
      };
      await expectToken('new', true);
      token = 'new';
      await after20();
      write('new');
      await expectToken('old', false);
      await after20();
      stop = true;
      await load;  // rejects where any call failed
      assert.ok(calls >= 60);
      assert.ok(!await trusts(first));
    } finally {
      await server.stop();
    }
  });
});
