// The calls of the Open Inference Protocol that generate.

#ifndef FIRESTEEL_SERVER_INFER_CALL_H_
#define FIRESTEEL_SERVER_INFER_CALL_H_

#include <grpcpp/server_context.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/server_callback.h>

#include "inference/grpc_service.pb.h"
#include "server/generation_call.h"

namespace firesteel::server {

/// Requests of one ModelInferRequest stream that run or wait at a time; the next is read when one
/// of them has ended, so a client that sends faster is slowed down by gRPC's flow control.
inline constexpr size_t kMaxStreamedInfers = 32;

/// Starts the calls' reactors; they delete themselves.
grpc::ServerUnaryReactor* StartModelInfer(grpc::CallbackServerContext* context,
                                          const inference::ModelInferRequest& request,
                                          inference::ModelInferResponse* response,
                                          const CallServices& services);

/// Of ModelInferRequest and ModelStreamInferResponse, as bytes.
grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* StartModelStreamInfer(
    grpc::CallbackServerContext* context, const CallServices& services);

}  // namespace firesteel::server

#endif  // FIRESTEEL_SERVER_INFER_CALL_H_
