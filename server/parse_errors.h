// What a client is told whose request cannot be parsed.

#ifndef FIRESTEEL_SERVER_PARSE_ERRORS_H_
#define FIRESTEEL_SERVER_PARSE_ERRORS_H_

#include <google/protobuf/descriptor.h>
#include <grpcpp/support/server_interceptor.h>

#include <memory>
#include <vector>

namespace firesteel::server {

/// gRPC's callback API ends such a call with UNIMPLEMENTED and no message, before any code of ours
/// runs. For the methods of these services this makes it INVALID_ARGUMENT with the usual details.
/// Comes before interceptors that look at the status.
std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface> MakeParseErrorInterceptor(
    const std::vector<const google::protobuf::ServiceDescriptor*>& services);

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_PARSE_ERRORS_H_
