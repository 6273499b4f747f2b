"""The model repository extension of the Open Inference Protocol over gRPC."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from inflight.frontends.control import Control
from inflight.proto.open_inference_pb2 import (
    ModelRepositoryParameter,
    RepositoryIndexRequest,
    RepositoryIndexResponse,
    RepositoryModelLoadRequest,
    RepositoryModelLoadResponse,
    RepositoryModelUnloadRequest,
    RepositoryModelUnloadResponse,
)
from inflight.wire import Rpc, UnaryRpc


def repository_rpcs(control: Control) -> dict[str, Rpc]:
    """The extension's procedures by name."""

    async def index(request: RepositoryIndexRequest, _timeout: float | None) -> RepositoryIndexResponse:
        reply = RepositoryIndexResponse()
        for model in control.index(request.ready):
            version = str(model.version) if model.version else ""
            reply.models.add(name=model.name, version=version, state=model.state.value, reason=model.reason)
        return reply

    async def load(request: RepositoryModelLoadRequest, _timeout: float | None) -> RepositoryModelLoadResponse:
        await control.load(request.model_name, _parameters(request.parameters))
        return RepositoryModelLoadResponse()

    async def unload(request: RepositoryModelUnloadRequest, _timeout: float | None) -> RepositoryModelUnloadResponse:
        await control.unload(request.model_name, _parameters(request.parameters))
        return RepositoryModelUnloadResponse()

    return {
        "RepositoryIndex": UnaryRpc(RepositoryIndexRequest.FromString, index),
        "RepositoryModelLoad": UnaryRpc(RepositoryModelLoadRequest.FromString, load),
        "RepositoryModelUnload": UnaryRpc(RepositoryModelUnloadRequest.FromString, unload),
    }


def _parameters(given: Mapping[str, ModelRepositoryParameter]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, parameter in given.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is not None:
            found[name] = getattr(parameter, kind)
    return found
