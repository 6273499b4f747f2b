"""The gRPC binding of `MSService`: what protoc's gRPC plug-in would write, over `inflight.proto`."""

from __future__ import annotations

from typing import Any

import grpc

from inflight.proto import ms_service_pb2

SERVICE = "mindspore.serving.proto.MSService"
PREDICT = f"/{SERVICE}/Predict"


class MSServiceStub:
    """`Predict(request, timeout=None)` on a channel, blocking or (`grpc.aio`) awaitable; `Predict.future` too."""

    def __init__(self, channel: Any) -> None:
        self.Predict = channel.unary_unary(
            PREDICT,
            request_serializer=ms_service_pb2.PredictRequest.SerializeToString,
            response_deserializer=ms_service_pb2.PredictReply.FromString,
        )


class MSServiceServicer:
    """Base of a server's implementation; override `Predict`."""

    def Predict(self, request: ms_service_pb2.PredictRequest, context: Any) -> Any:
        context.set_code(grpc.StatusCode.UNIMPLEMENTED)
        context.set_details("Method not implemented!")
        raise NotImplementedError("Method not implemented!")


def add_MSServiceServicer_to_server(servicer: MSServiceServicer, server: Any) -> None:
    """Registers `servicer` on a `grpc.server` or `grpc.aio.server`."""
    handlers = {
        "Predict": grpc.unary_unary_rpc_method_handler(
            servicer.Predict,
            request_deserializer=ms_service_pb2.PredictRequest.FromString,
            response_serializer=ms_service_pb2.PredictReply.SerializeToString,
        )
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
