"""`inference.GRPCInferenceService`: the Open Inference Protocol, version 2, over gRPC.

Results are always in `raw_output_contents`, as in Triton. Requests carry raw or typed contents.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from inflight.admission import Caller, priority
from inflight.contract import MethodInfo, Outcome, TextPart
from inflight.errors import InflightError, InvalidRequest, NotFound
from inflight.frontends.control import Control
from inflight.frontends.oip.classes import check_classes, classified
from inflight.frontends.oip.extensions import report_rpcs, repository_rpcs, setting_rpcs, target
from inflight.frontends.oip.large import InferRequest, encoded, first_tensor, parse_request
from inflight.frontends.oip.mapping import (
    ModelMetadata,
    ModelNames,
    check_wanted,
    find_model,
    from_outcomes,
    metadata,
    model_ready,
    request_priority,
    request_timeout,
    to_rows,
)
from inflight.frontends.oip.reports import EXTENSIONS, TotalsOf
from inflight.frontends.oip.sequences import NO_PART, Part, Sequences, describing
from inflight.frontends.oip.tensors import BF16, OipTensor, from_elements, from_raw
from inflight.proto.open_inference_pb2 import (
    InferParameter,
    InferTensorContents,
    ModelInferRequest,
    ModelInferResponse,
    ModelMetadataRequest,
    ModelMetadataResponse,
    ModelReadyRequest,
    ModelReadyResponse,
    ModelStreamInferResponse,
    ServerLiveRequest,
    ServerLiveResponse,
    ServerMetadataRequest,
    ServerMetadataResponse,
    ServerReadyRequest,
    ServerReadyResponse,
)
from inflight.version import __version__
from inflight.wire import Go, Reply, Rpc, StreamRpc, UnaryRpc

if TYPE_CHECKING:
    from inflight.frontends.grpc.line import HoldingBackend

SERVICE = "inference.GRPCInferenceService"
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""The field of `contents` for each datatype; FP16 and BF16 have none and are sent raw only."""
_UNSUPPORTED = {
    "shared_memory_region": "shared memory is not supported, send the tensor's bytes in the request",
}
_SEQUENCE = ("sequence_id", "sequence_start", "sequence_end")


def oip_rpcs(
    backend: HoldingBackend, control: Control, totals: TotalsOf, sequences: Sequences | None = None
) -> dict[str, Rpc]:
    """The service's procedures by path."""
    models = ModelNames(backend)
    sequences = sequences or Sequences(backend)

    def model_infer(request: InferRequest, timeout: float | None) -> Awaitable[Reply]:
        return _infer(backend, sequences, request, timeout)

    def hold(request: InferRequest, name_of: Callable[[], object], go: Go) -> Caller | None:
        named = request.message.model_name, request.message.model_version
        return backend.hold(lambda: models.find(*named), name_of, go)

    def begin_infer(
        request: InferRequest, timeout: float | None, done: Callable[[Reply | Exception], None]
    ) -> Callable[[], None] | None:
        _direct(backend, request)
        if backend.missing(request.message.model_name):
            return None
        method = models.find(request.message.model_name, request.message.model_version)
        if backend.waits(method) or method.stateful:
            return None
        tensors, wanted = _inputs(request), _wanted(request)
        check_wanted(method, wanted)
        answer = partial(_answer, method, wanted, _classes(backend, method, request), _begun(method, request), done)
        token = priority.set(_priority(request))
        try:
            return backend.submit(method, to_rows(method, tensors), answer, timeout=_seconds(request, timeout))
        finally:
            priority.reset(token)

    more = {
        **_state_rpcs(backend),
        **repository_rpcs(control),
        **report_rpcs(backend, totals),
        **setting_rpcs(backend),
    }

    def path(name: str) -> str:
        return f"/{SERVICE}/{name}"

    return {
        path("ModelInfer"): UnaryRpc(parse_request, model_infer, begin_infer, hold, layout=first_tensor),
        path("ModelStreamInfer"): StreamRpc(
            parse_request, duplex=partial(_stream_infer, backend, sequences), layout=first_tensor
        ),
        **{path(name): rpc for name, rpc in more.items()},
    }


def _state_rpcs(backend: HoldingBackend) -> dict[str, Rpc]:
    """Procedures that say what the server and its models are, by name."""

    async def server_live(_request: ServerLiveRequest, _timeout: float | None) -> ServerLiveResponse:
        return ServerLiveResponse(live=backend.live)

    async def server_ready(_request: ServerReadyRequest, _timeout: float | None) -> ServerReadyResponse:
        return ServerReadyResponse(ready=backend.live and backend.ready)

    async def ready(request: ModelReadyRequest, _timeout: float | None) -> ModelReadyResponse:
        try:
            return ModelReadyResponse(ready=model_ready(backend, *target(backend, request.name, request.version)))
        except NotFound:
            return ModelReadyResponse(ready=False)

    async def server_metadata(_request: ServerMetadataRequest, _timeout: float | None) -> ServerMetadataResponse:
        return ServerMetadataResponse(name="inflight", version=__version__, extensions=EXTENSIONS)

    async def model_metadata(request: ModelMetadataRequest, timeout: float | None) -> ModelMetadataResponse:
        name, version = target(backend, request.name, request.version)
        await backend.present(name, timeout)
        return _metadata_reply(metadata(backend, name, version))

    return {
        "ServerLive": UnaryRpc(ServerLiveRequest.FromString, server_live),
        "ServerReady": UnaryRpc(ServerReadyRequest.FromString, server_ready),
        "ModelReady": UnaryRpc(ModelReadyRequest.FromString, ready),
        "ServerMetadata": UnaryRpc(ServerMetadataRequest.FromString, server_metadata),
        "ModelMetadata": UnaryRpc(ModelMetadataRequest.FromString, model_metadata),
    }


async def _infer(
    backend: HoldingBackend,
    sequences: Sequences,
    request: InferRequest,
    timeout: float | None,
    streamed: bool = False,
) -> Reply:
    """Answers one inference. The request is freed before the model is called, because that may take long."""
    _direct(backend, request)
    timeout = await backend.present(request.message.model_name, timeout)
    method = find_model(backend, request.message.model_name, request.message.model_version)
    tensors, wanted = _inputs(request), _wanted(request)
    reply = _begun(method, request)
    timeout = _seconds(request, timeout)
    classes, part, level = _classes(backend, method, request), _part(request), _priority(request)
    del request
    check_wanted(method, wanted)
    token = priority.set(level)
    try:
        if method.stateful:
            outputs = await sequences.run(method, part, tensors, timeout, wanted)
        else:
            outcomes = await backend.predict(method, to_rows(method, tensors), timeout=timeout)
            outputs = from_outcomes(method, outcomes, wanted)
    finally:
        priority.reset(token)
    return encoded(reply, _as_classes(outputs, classes, method.whole), streamed=streamed)


def _answer(
    method: MethodInfo,
    wanted: list[str],
    classes: Classes,
    reply: ModelInferResponse,
    done: Callable[[Reply | Exception], None],
    result: Sequence[Outcome] | InflightError,
) -> None:
    try:
        if isinstance(result, InflightError):
            raise result
        answer = encoded(reply, _as_classes(from_outcomes(method, result, wanted), classes, method.whole))
    except Exception as error:  # the gRPC engine answers it, like any handler's error
        done(error)
    else:
        done(answer)


def _direct(backend: HoldingBackend, request: InferRequest) -> None:
    """Writes the model behind an alias into a request. The parameter `user` keeps a caller's requests with one."""
    message = request.message
    parameters = message.parameters
    key = (parameters["user"].string_param if "user" in parameters else "") or None
    name, version = target(backend, message.model_name, message.model_version, key)
    if (name, version) != (message.model_name, message.model_version):
        message.model_name, message.model_version = name, version


def _wanted(request: InferRequest) -> list[str]:
    """Names of the requested outputs; empty for all."""
    outputs = request.message.outputs
    for output in outputs:
        _refuse_parameters(output)
    return [output.name for output in outputs]


def _begun(method: MethodInfo, request: InferRequest) -> ModelInferResponse:
    message = request.message
    return ModelInferResponse(model_name=message.model_name, model_version=str(method.version), id=message.id)


async def _stream_infer(
    backend: HoldingBackend, sequences: Sequences, requests: AsyncIterator[InferRequest], timeout: float | None
) -> AsyncGenerator[Reply, None]:
    """Answers the requests of a stream one after the other."""
    async for request in requests:
        if _says_stream(request):
            replies = _text_replies(backend, request, timeout)
        else:
            replies = _stream_reply(backend, sequences, request, timeout)
        del request  # a generation takes long
        try:
            async for reply in replies:
                yield reply
        finally:
            await replies.aclose()


def _says_stream(request: InferRequest) -> bool:
    parameters = request.message.parameters
    return "stream" in parameters and parameters["stream"].bool_param


async def _stream_reply(
    backend: HoldingBackend, sequences: Sequences, request: InferRequest, timeout: float | None
) -> AsyncGenerator[Reply, None]:
    """Answers one request of a stream; after an error the stream continues."""
    failed = ModelInferResponse(model_name=request.message.model_name, id=request.message.id)
    work = _infer(backend, sequences, request, timeout, streamed=True)
    del request
    reply: Reply
    try:
        reply = await work
    except InflightError as error:
        reply = ModelStreamInferResponse(error_message=error.message or type(error).__name__, infer_response=failed)
    yield reply


async def _text_replies(
    backend: HoldingBackend, request: InferRequest, timeout: float | None
) -> AsyncGenerator[Reply, None]:
    """Answers a request with the parameter `stream`: replies with the output `text_output` as language models generate
    text, then one with the method's outputs and, as in Triton, `triton_final_response`."""
    failed = ModelInferResponse(model_name=request.message.model_name, id=request.message.id)
    try:
        _direct(backend, request)
        timeout = await backend.present(request.message.model_name, timeout)
        method = find_model(backend, request.message.model_name, request.message.model_version)
        rows = to_rows(method, _inputs(request))
        parts = backend.stream(method, rows, timeout=_seconds(request, timeout))
        names = [output.name for output in request.message.outputs]
        del request
        try:
            async for part in parts:
                reply = ModelInferResponse(
                    model_name=failed.model_name, model_version=str(method.version), id=failed.id
                )
                if isinstance(part, TextPart):
                    tensors = [OipTensor("text_output", "BYTES", (1,), [part.text.encode()])]
                    if len(rows) > 1:
                        reply.parameters["index"].int64_param = part.index
                else:
                    tensors = from_outcomes(method, part, names)
                reply.parameters["triton_final_response"].bool_param = not isinstance(part, TextPart)
                yield encoded(reply, tensors, streamed=True)
        finally:
            await parts.aclose()
    except InflightError as error:
        yield ModelStreamInferResponse(error_message=error.message or type(error).__name__, infer_response=failed)


Classes: TypeAlias = "dict[str, tuple[int, Sequence[str]]]"
"""By output that is wanted as a classification: the number of classes, and their labels."""


def _classes(backend: HoldingBackend, method: MethodInfo, request: InferRequest) -> Classes:
    found: Classes = {}
    for output in request.message.outputs:
        if output.parameters and "classification" in output.parameters:
            says = describing(backend, method)
            count = check_classes(output.name, output.parameters["classification"].int64_param)
            found[output.name] = (count, says.labels(output.name) if says is not None else ())
    return found


def _as_classes(outputs: list[OipTensor], classes: Classes, whole: bool) -> list[OipTensor]:
    if not classes:
        return outputs
    return [
        classified(output, *classes[output.name], whole) if output.name in classes else output for output in outputs
    ]


def _part(request: InferRequest) -> Part:
    parameters = request.message.parameters
    if not parameters:
        return NO_PART
    given = {name: _value(parameters[name]) for name in _SEQUENCE if name in parameters}
    return Part.of(given)


def _priority(request: InferRequest) -> int:
    parameters = request.message.parameters
    return request_priority(_value(parameters["priority"])) if parameters and "priority" in parameters else 0


def _value(parameter: InferParameter) -> object:
    kind = parameter.WhichOneof("parameter_choice")
    return getattr(parameter, kind) if kind is not None else None


def _seconds(request: InferRequest, deadline: float | None) -> float | None:
    """The call's deadline, or the request's parameter `timeout` if that is sooner; in seconds."""
    parameters = request.message.parameters
    if "timeout" not in parameters:
        return deadline
    limit = request_timeout(_value(parameters["timeout"]))
    return min((each for each in (limit, deadline) if each is not None), default=None)


def _inputs(request: InferRequest) -> list[OipTensor]:
    message, raws = request
    if raws and len(raws) != len(message.inputs):
        raise InvalidRequest(
            f"raw_input_contents holds {len(raws)} tensors for {len(message.inputs)} inputs, give one for each input "
            "or none at all"
        )
    tensors = []
    for index, tensor in enumerate(message.inputs):
        _refuse_parameters(tensor)
        if not raws:
            tensors.append(_typed(tensor))
        elif tensor.HasField("contents"):
            raise InvalidRequest(f"input '{tensor.name}' has contents beside raw_input_contents, use one of the two")
        else:
            tensors.append(from_raw(tensor.name, tensor.datatype, tensor.shape, raws[index]))
    return tensors


def _typed(tensor: ModelInferRequest.InferInputTensor) -> OipTensor:
    """An input whose elements are in `contents`."""
    if tensor.datatype in ("FP16", BF16):
        raise InvalidRequest(f"input '{tensor.name}' of datatype {tensor.datatype} must be sent in raw_input_contents")
    field = _CONTENTS.get(tensor.datatype)
    contents: InferTensorContents = tensor.contents
    elements = getattr(contents, field) if field else []
    if field and not elements and contents.ByteSize():
        raise InvalidRequest(f"the elements of input '{tensor.name}', datatype {tensor.datatype}, go into {field}")
    return from_elements(tensor.name, tensor.datatype, tensor.shape, elements)


def _refuse_parameters(
    tensor: ModelInferRequest.InferInputTensor | ModelInferRequest.InferRequestedOutputTensor,
) -> None:
    if tensor.parameters:
        for name, text in _UNSUPPORTED.items():
            if name in tensor.parameters:
                raise InvalidRequest(f"tensor '{tensor.name}': {text}")


def _metadata_reply(model: ModelMetadata) -> ModelMetadataResponse:
    reply = ModelMetadataResponse(name=model.name, versions=model.versions, platform=model.platform)
    for field, tensors in ((reply.inputs, model.inputs), (reply.outputs, model.outputs)):
        for tensor in tensors:
            field.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    return reply
