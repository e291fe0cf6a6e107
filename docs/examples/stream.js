// Streams one generation: node stream.js ADDRESS PROMPT

'use strict';

const path = require('node:path');
const grpc = require('@grpc/grpc-js');
const protoLoader = require('@grpc/proto-loader');

const [address, prompt] = process.argv.slice(2);
const definition = protoLoader.loadSync('firesteel/v1/generation_service.proto', {
  includeDirs: [path.join(__dirname, '../../proto')],
  keepCase: true, longs: Number, enums: String, defaults: true});
const {GenerationService} = grpc.loadPackageDefinition(definition).firesteel.v1;

// With TLS: grpc.credentials.createSsl(rootCertificates).
const client = new GenerationService(address, grpc.credentials.createInsecure());
const metadata = new grpc.Metadata();
// With tokens: metadata.set('authorization', 'Bearer ...').
const stream = client.GenerateStream({prompt, max_tokens: 60, sampling: {temperature: 0.8}}, metadata,
                                     {deadline: Date.now() + 60_000});
let last;
stream.on('data', (message) => {
  process.stdout.write(message.sequence.text);
  last = message;
});
stream.on('error', (error) => {
  console.error(`error ${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
});
stream.on('end', () => {
  if (!last) return;
  // The last message sums up.
  const skipped = (100 * last.sparsity.flops_skipped_fraction).toFixed(0);
  console.error(`\n${last.usage.generated_tokens} tokens, ${skipped}% of the FLOPs skipped`);
});
process.on('SIGINT', () => stream.cancel());  // the server stops working on it
