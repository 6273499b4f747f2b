"""A bare `grpc.aio` server in one process: the floor that gRPC in Python has.

`parsed` answers with the request message itself, decoded and encoded again; `bytes` hands the wire bytes back.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from typing import Any

import grpc

from inflight.proto.ms_service_pb2 import PredictRequest

METHOD = "Predict"
SERVICE = "mindspore.serving.proto.MSService"


async def _same(request: Any, context: Any) -> Any:
    return request


def _handler(parsed: bool) -> Any:
    coders: dict[str, Any] = {}
    if parsed:
        coders = {
            "request_deserializer": PredictRequest.FromString,
            "response_serializer": PredictRequest.SerializeToString,
        }
    return grpc.method_handlers_generic_handler(SERVICE, {METHOD: grpc.unary_unary_rpc_method_handler(_same, **coders)})


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("--messages", choices=("parsed", "bytes"), default="parsed")
    args = parser.parse_args()
    limit = 256 << 20
    server = grpc.aio.server(
        options=[("grpc.max_receive_message_length", limit), ("grpc.max_send_message_length", limit)]
    )
    server.add_generic_rpc_handlers((_handler(args.messages == "parsed"),))
    server.add_insecure_port(f"127.0.0.1:{args.port}")
    await server.start()
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    await stop.wait()
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(main())
