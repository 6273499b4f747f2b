"""The application of the gRPC port: every service it offers."""

from __future__ import annotations

from inflight.frontends.base import Backend
from inflight.frontends.control import Control
from inflight.frontends.directory import Directory
from inflight.frontends.grpc.counted import counted
from inflight.frontends.grpc.health import health_rpcs
from inflight.frontends.grpc.keyed import admission
from inflight.frontends.grpc.line import HoldingBackend
from inflight.frontends.grpc.reflection import reflection_rpcs
from inflight.frontends.keys import Keys
from inflight.frontends.mindspore.grpc import predict_rpcs
from inflight.frontends.oip import Sequences
from inflight.frontends.oip.grpc import SERVICE as OIP_SERVICE
from inflight.frontends.oip.grpc import oip_rpcs
from inflight.metrics import Metrics
from inflight.proto import health_pb2, ms_service_pb2, open_inference_pb2
from inflight.wire import GrpcApp

PREDICT_SERVICE = "mindspore.serving.proto.MSService"


def grpc_app(
    backend: Backend,
    *,
    max_message_bytes: int,
    keys: Keys | None = None,
    metrics: Metrics | None = None,
    control: Control | None = None,
    directory: Directory | None = None,
    sequences: Sequences | None = None,
) -> GrpcApp:
    """The procedures of a gRPC port; `listen_grpc` serves them.

    Args:
        max_message_bytes: limit of one message, received or sent.
        keys: calls of models carry one in their metadata, as `authorization: Bearer <key>`; None: they need none.
        metrics: counts the calls; None: they are not counted.
        control: loads and unloads models; None: nobody can.
        directory: names that mean more than the models that are served; None: there are none.
        sequences: of stateful models, for all doors of a server; None: this one has its own.
    """
    holding = HoldingBackend(backend, directory)
    totals = (metrics or Metrics()).totals
    models = {**predict_rpcs(holding), **oip_rpcs(holding, control or Control(backend), totals, sequences)}
    rpcs = {
        **models,
        **health_rpcs(backend, (PREDICT_SERVICE, OIP_SERVICE)),
        **reflection_rpcs((ms_service_pb2.DESCRIPTOR, open_inference_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR)),
    }
    if metrics is not None:
        rpcs = counted(rpcs, metrics.routes)
    admit = admission(keys) if keys is not None else None
    return GrpcApp(rpcs, max_message_bytes=max_message_bytes, admit=admit, secured=models)
