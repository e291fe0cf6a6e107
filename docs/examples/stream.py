"""Streams one generation: stream.py ADDRESS PROMPT (README.md says how to make the stubs)."""

import sys

import grpc

from firesteel.v1 import generation_service_pb2, generation_service_pb2_grpc
from google.rpc import error_details_pb2, status_pb2


def main():
    address, prompt = sys.argv[1:]
    # With TLS: grpc.secure_channel(address, grpc.ssl_channel_credentials(root_certificates=...)).
    with grpc.insecure_channel(address) as channel:
        stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
        request = generation_service_pb2.GenerateRequest(
            prompt=prompt, max_tokens=60,
            sampling=generation_service_pb2.SamplingParameters(temperature=0.8))
        # With tokens: metadata=(("authorization", "Bearer ..."),).
        stream = stub.GenerateStream(request, timeout=60)
        try:
            for message in stream:
                print(message.sequence.text, end="", flush=True)
            print()
            # The last message sums up.
            print(f"{message.usage.generated_tokens} tokens, "
                  f"{message.sparsity.flops_skipped_fraction:.0%} of the FLOPs skipped", file=sys.stderr)
        except grpc.RpcError as error:
            print(f"error {error.code().name}: {error.details()}", file=sys.stderr)
            for key, value in error.trailing_metadata():
                if key != "grpc-status-details-bin":
                    continue
                for detail in status_pb2.Status.FromString(value).details:
                    info = error_details_pb2.ErrorInfo()
                    if detail.Unpack(info):
                        print("reason", info.reason, file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            stream.cancel()  # the server stops working on it


if __name__ == "__main__":
    main()
