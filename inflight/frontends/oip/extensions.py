"""The extensions of the Open Inference Protocol over gRPC: repository, configuration, statistics, settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from google.protobuf.json_format import ParseDict

from inflight.errors import InvalidRequest
from inflight.frontends.control import Control
from inflight.frontends.oip.mapping import find_model, parse_version
from inflight.frontends.oip.reports import (
    LOG,
    NO_LOG,
    NO_MEMORY,
    NO_TRACE,
    TRACE,
    TotalsOf,
    model_config,
    model_statistics,
)
from inflight.proto.open_inference_pb2 import (
    CudaSharedMemoryRegisterRequest,
    CudaSharedMemoryStatusRequest,
    CudaSharedMemoryStatusResponse,
    CudaSharedMemoryUnregisterRequest,
    CudaSharedMemoryUnregisterResponse,
    LogSettingsRequest,
    LogSettingsResponse,
    ModelConfigRequest,
    ModelConfigResponse,
    ModelRepositoryParameter,
    ModelStatisticsRequest,
    ModelStatisticsResponse,
    RepositoryIndexRequest,
    RepositoryIndexResponse,
    RepositoryModelLoadRequest,
    RepositoryModelLoadResponse,
    RepositoryModelUnloadRequest,
    RepositoryModelUnloadResponse,
    SystemSharedMemoryRegisterRequest,
    SystemSharedMemoryStatusRequest,
    SystemSharedMemoryStatusResponse,
    SystemSharedMemoryUnregisterRequest,
    SystemSharedMemoryUnregisterResponse,
    TraceSettingRequest,
    TraceSettingResponse,
)
from inflight.wire import Rpc, UnaryRpc

if TYPE_CHECKING:
    from inflight.frontends.grpc.line import HoldingBackend


def target(backend: HoldingBackend, name: str, version: str, key: str | None = None) -> tuple[str, str]:
    """The model and version that a call names, with the one behind an alias where it names no version.

    Args:
        key: calls with the same one go to the same target of an alias.

    Raises:
        InvalidRequest: the version is not a number.
    """
    if parse_version(version):
        return name, version
    name, number = backend.target(name, 0, key)
    return name, str(number) if number else ""


def repository_rpcs(control: Control) -> dict[str, Rpc]:
    """The extension's procedures by name."""

    async def index(request: RepositoryIndexRequest, _timeout: float | None) -> RepositoryIndexResponse:
        reply = RepositoryIndexResponse()
        for model in await control.index(request.ready):
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


def report_rpcs(backend: HoldingBackend, totals: TotalsOf) -> dict[str, Rpc]:
    """The procedures that tell of models, by name."""

    async def config(request: ModelConfigRequest, timeout: float | None) -> ModelConfigResponse:
        name, version = target(backend, request.name, request.version)
        await backend.present(name, timeout)
        return ParseDict({"config": model_config(backend, name, version)}, ModelConfigResponse())

    async def statistics(request: ModelStatisticsRequest, _timeout: float | None) -> ModelStatisticsResponse:
        told = model_statistics(backend, totals, *target(backend, request.name, request.version))
        return ParseDict(told, ModelStatisticsResponse(), ignore_unknown_fields=True)

    return {
        "ModelConfig": UnaryRpc(ModelConfigRequest.FromString, config),
        "ModelStatistics": UnaryRpc(ModelStatisticsRequest.FromString, statistics),
    }


def setting_rpcs(backend: HoldingBackend) -> dict[str, Rpc]:
    """The procedures of settings that nobody can change, by name."""

    async def trace(request: TraceSettingRequest, _timeout: float | None) -> TraceSettingResponse:
        if request.settings:
            raise InvalidRequest(NO_TRACE)
        if request.model_name:
            find_model(backend, *target(backend, request.model_name, ""))
        reply = TraceSettingResponse()
        for name, values in TRACE.items():
            reply.settings[name].value.extend(values)
        return reply

    async def log(request: LogSettingsRequest, _timeout: float | None) -> LogSettingsResponse:
        if request.settings:
            raise InvalidRequest(NO_LOG)
        reply = LogSettingsResponse()
        for name, value in LOG.items():
            if isinstance(value, bool):
                reply.settings[name].bool_param = value
            elif isinstance(value, int):
                reply.settings[name].uint32_param = value
            else:
                reply.settings[name].string_param = value
        return reply

    async def register(_request: object, _timeout: float | None) -> Any:
        raise InvalidRequest(NO_MEMORY)

    async def status(request: object, _timeout: float | None) -> Any:
        cuda = isinstance(request, CudaSharedMemoryStatusRequest)
        return CudaSharedMemoryStatusResponse() if cuda else SystemSharedMemoryStatusResponse()

    async def unregister(request: object, _timeout: float | None) -> Any:
        cuda = isinstance(request, CudaSharedMemoryUnregisterRequest)
        return CudaSharedMemoryUnregisterResponse() if cuda else SystemSharedMemoryUnregisterResponse()

    return {
        "TraceSetting": UnaryRpc(TraceSettingRequest.FromString, trace),
        "LogSettings": UnaryRpc(LogSettingsRequest.FromString, log),
        "SystemSharedMemoryStatus": UnaryRpc(SystemSharedMemoryStatusRequest.FromString, status),
        "SystemSharedMemoryRegister": UnaryRpc(SystemSharedMemoryRegisterRequest.FromString, register),
        "SystemSharedMemoryUnregister": UnaryRpc(SystemSharedMemoryUnregisterRequest.FromString, unregister),
        "CudaSharedMemoryStatus": UnaryRpc(CudaSharedMemoryStatusRequest.FromString, status),
        "CudaSharedMemoryRegister": UnaryRpc(CudaSharedMemoryRegisterRequest.FromString, register),
        "CudaSharedMemoryUnregister": UnaryRpc(CudaSharedMemoryUnregisterRequest.FromString, unregister),
    }
