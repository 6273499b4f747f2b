"""Transports: HTTP/1.1 and gRPC, sockets, TLS, listeners. This room knows no inference protocol."""

from inflight.wire.access import bearer
from inflight.wire.address import GRPC, RESTFUL, Kind, parse_address
from inflight.wire.grpc.app import GrpcApp
from inflight.wire.grpc.rpc import Encoded, Go, Reply, Rpc, StreamRpc, UnaryRpc, close_replies, peer
from inflight.wire.grpc.status import NOT_FOUND, UNIMPLEMENTED, GrpcError
from inflight.wire.http.asgi import (
    JSON,
    Answer,
    App,
    Header,
    InlineApp,
    Message,
    Receive,
    Scope,
    Send,
    error_json,
    header,
    nothing_to_cancel,
    respond,
    respond_json,
)
from inflight.wire.http.body import MESSAGE_OPTION, Body, accepted_encoding, pack, read_body, too_large, unpack
from inflight.wire.http.disconnect import Disconnected, run_until_disconnect
from inflight.wire.http.gate import PAYLOAD_OPTION, Gate, GatedApp, Gates, Refusal
from inflight.wire.http.sse import DONE, EventStream, Opened
from inflight.wire.listen import Listener, listen_grpc, listen_http, success_line

__all__ = [
    "DONE",
    "GRPC",
    "JSON",
    "MESSAGE_OPTION",
    "NOT_FOUND",
    "PAYLOAD_OPTION",
    "RESTFUL",
    "UNIMPLEMENTED",
    "Answer",
    "App",
    "Body",
    "Disconnected",
    "Encoded",
    "EventStream",
    "Gate",
    "GatedApp",
    "Gates",
    "Go",
    "GrpcApp",
    "GrpcError",
    "Header",
    "InlineApp",
    "Kind",
    "Listener",
    "Message",
    "Opened",
    "Receive",
    "Refusal",
    "Reply",
    "Rpc",
    "Scope",
    "Send",
    "StreamRpc",
    "UnaryRpc",
    "accepted_encoding",
    "bearer",
    "close_replies",
    "error_json",
    "header",
    "listen_grpc",
    "listen_http",
    "nothing_to_cancel",
    "pack",
    "parse_address",
    "peer",
    "read_body",
    "respond",
    "respond_json",
    "run_until_disconnect",
    "success_line",
    "too_large",
    "unpack",
]
