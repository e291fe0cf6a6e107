// Starts the server program for a test, and loads the protocol as a Node client does.

'use strict';

const assert = require('node:assert');
const fs = require('node:fs');
const path = require('node:path');
const {spawn} = require('node:child_process');
const grpc = require('@grpc/grpc-js');
const protoLoader = require('@grpc/proto-loader');

const ROOT = path.resolve(__dirname, '../..');
const PROGRAM = process.env.FIRESTEEL_SERVER_PROGRAM;
const OPTIONS = {keepCase: true, longs: Number, enums: String, defaults: true, oneofs: true};

/** The server as a child process; `ready` resolves once it serves. */
class Server {
  constructor(...more) {
    this.child = spawn(PROGRAM, [
      '--model', `${ROOT}/models/spark-stories`, '--address', '127.0.0.1:0', '--metrics-address',
      '127.0.0.1:0', '--kv-cache-bytes', '256MiB', ...more]);
    this.log = '';
    this.child.stderr.on('data', (text) => { this.log += text; });
    this.exited = new Promise((resolve) => this.child.on('exit', resolve));
    this.ready = new Promise((resolve, reject) => {
      let out = '';
      this.child.stdout.on('data', (text) => {
        out += text;
        const line = /^listening on (\S+), metrics on (\S+)$/m.exec(out);
        if (line) {
          [, this.address, this.metrics] = line;
          resolve(this);
        }
      });
      this.exited.then(() => reject(new Error(`the server ended: ${this.log}`)));
    });
  }

  signal(name) { this.child.kill(name); }

  async stop() {
    this.child.kill('SIGKILL');
    await this.exited;
  }
}

/** The packages of all services, from the .proto files. */
function loadProtos() {
  return grpc.loadPackageDefinition(protoLoader.loadSync(
      ['firesteel/v1/generation_service.proto', 'firesteel/v1/model_service.proto',
       'firesteel/v1/admin_service.proto', 'grpc/health/v1/health.proto',
       'inference/grpc_service.proto'],
      {...OPTIONS, includeDirs: [`${ROOT}/proto`]}));
}

/** A unary call as a promise of {response, metadata, trailers}; rejects with gRPC's error. */
function call(client, method, request, {metadata = new grpc.Metadata(), ...options} = {}) {
  return new Promise((resolve, reject) => {
    const result = {};
    const started = client[method](request, metadata, options, (error, response) => {
      if (error) reject(error);
      result.response = response;
    });
    started.on('metadata', (m) => { result.metadata = m; });
    started.on('status', (s) => {
      result.trailers = s.metadata;
      if (s.code === grpc.status.OK) resolve(result);
    });
  });
}

/** All messages of a stream and its status. */
function collect(stream, onMessage = () => {}) {
  return new Promise((resolve) => {
    const messages = [];
    stream.on('data', (message) => {
      messages.push(message);
      onMessage(message, messages);
    });
    stream.on('error', () => {});
    stream.on('status', (status) => resolve({messages, status}));
  });
}

// proto-loader keeps its decoders to itself; protobufjs, on which it stands, has them.
const protobuf = require('protobufjs');
const errorRoot = new protobuf.Root();
errorRoot.resolvePath = (_, target) =>
    target.startsWith('google/protobuf/') ? target : `${ROOT}/proto/${target}`;
errorRoot.loadSync(['google/rpc/status.proto', 'google/rpc/error_details.proto'], {keepCase: true});

/** What the server says of its load at the end of a call (ORCA's report); null where it says nothing. */
const loadRoot = protobuf.loadSync(`${ROOT}/proto/xds/data/orca/v3/orca_load_report.proto`);
function loadReportOf(metadata) {
  const [bytes] = metadata.get('endpoint-load-metrics-bin');
  return bytes ? loadRoot.lookupType('xds.data.orca.v3.OrcaLoadReport').decode(bytes) : null;
}

/** The details of an error, by the short names of their types. */
function detailsOf(error) {
  const details = {};
  const [bytes] = error.metadata.get('grpc-status-details-bin');
  if (!bytes) return details;
  for (const any of errorRoot.lookupType('google.rpc.Status').decode(bytes).details) {
    const name = any.type_url.split('/').pop();
    details[name.split('.').pop()] = errorRoot.lookupType(name).decode(any.value);
  }
  return details;
}

module.exports = {ROOT, OPTIONS, Server, loadProtos, call, collect, detailsOf, loadReportOf, assert, grpc,
                  protoLoader, fs};
