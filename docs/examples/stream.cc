// Streams one generation: example_stream ADDRESS PROMPT
//
// Everything that a C++ client needs: a channel, a stub, a deadline, a stream read to its end, and
// the details of an error.

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <iostream>

#include "firesteel/v1/generation_service.grpc.pb.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: example_stream ADDRESS PROMPT\n";
    return 2;
  }
  // With TLS: grpc::SslCredentials({.pem_root_certs = ...}).
  const auto channel = grpc::CreateChannel(argv[1], grpc::InsecureChannelCredentials());
  const auto stub = firesteel::v1::GenerationService::NewStub(channel);

  firesteel::v1::GenerateRequest request;
  request.set_prompt(argv[2]);
  request.set_max_tokens(60);
  request.mutable_sampling()->set_temperature(0.8f);

  grpc::ClientContext context;  // of this one call
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
  // With tokens: context.AddMetadata("authorization", "Bearer ...").
  const auto reader = stub->GenerateStream(&context, request);
  firesteel::v1::GenerateStreamResponse message;
  while (reader->Read(&message)) std::cout << message.sequence().text() << std::flush;
  std::cout << std::endl;
  const grpc::Status status = reader->Finish();
  if (status.ok()) {  // the last message sums up
    std::cerr << message.usage().generated_tokens() << " tokens, "
              << 100 * message.sparsity().flops_skipped_fraction() << "% of the FLOPs skipped\n";
    return 0;
  }
  std::cerr << "error " << status.error_code() << ": " << status.error_message() << "\n";
  google::rpc::Status details;
  details.ParseFromString(status.error_details());
  for (const auto& detail : details.details()) {
    if (google::rpc::ErrorInfo info; detail.UnpackTo(&info)) {
      std::cerr << "reason " << info.reason() << "\n";
    } else if (google::rpc::RetryInfo retry; detail.UnpackTo(&retry)) {
      std::cerr << "try again in " << retry.retry_delay().seconds() << " s\n";
    }
  }
  return 1;
}
