"""gRPC server reflection, v1 and v1alpha: tools such as grpcurl learn the services from it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto

from inflight.proto import reflection_pb2
from inflight.proto.reflection_pb2 import ServerReflectionRequest, ServerReflectionResponse
from inflight.wire import NOT_FOUND, UNIMPLEMENTED, Rpc, StreamRpc

_PACKAGES = ("grpc.reflection.v1", "grpc.reflection.v1alpha")


def reflection_rpcs(descriptors: Sequence[Any]) -> dict[str, Rpc]:
    """The service's procedures by path.

    Args:
        descriptors: the file descriptors (`module_pb2.DESCRIPTOR`) of the other services; none imports another file.
    """
    files = [FileDescriptorProto.FromString(each.serialized_pb) for each in descriptors]
    files += [_renamed(package) for package in _PACKAGES]
    index = _Index(files)

    async def info(
        requests: AsyncIterator[ServerReflectionRequest], _timeout: float | None
    ) -> AsyncIterator[ServerReflectionResponse]:
        async for request in requests:
            yield index.answer(request)

    rpc = StreamRpc(ServerReflectionRequest.FromString, duplex=info)
    return {f"/{package}.ServerReflection/ServerReflectionInfo": rpc for package in _PACKAGES}


class _Index:
    """Files by name and by the symbols they define."""

    def __init__(self, files: Sequence[FileDescriptorProto]) -> None:
        self._by_name = {file.name: file.SerializeToString() for file in files}
        self._by_symbol = {symbol: self._by_name[file.name] for file in files for symbol in _symbols(file)}
        self._services = sorted(f"{file.package}.{service.name}" for file in files for service in file.service)

    def answer(self, request: ServerReflectionRequest) -> ServerReflectionResponse:
        """The reply to one request."""
        reply = ServerReflectionResponse(valid_host=request.host, original_request=request)
        kind = request.WhichOneof("message_request")
        if kind == "list_services":
            for name in self._services:
                reply.list_services_response.service.add(name=name)
        elif kind == "file_by_filename":
            _put_file(reply, self._by_name.get(request.file_by_filename), request.file_by_filename)
        elif kind == "file_containing_symbol":
            _put_file(reply, self._by_symbol.get(request.file_containing_symbol), request.file_containing_symbol)
        elif kind is None:
            _put_error(reply, UNIMPLEMENTED, "the request asks for nothing")
        else:
            _put_error(reply, NOT_FOUND, "no message here has extensions")
        return reply


def _put_file(reply: ServerReflectionResponse, file: bytes | None, name: str) -> None:
    if file is None:
        _put_error(reply, NOT_FOUND, f"'{name}' is not found, list_services names what is here")
    else:
        reply.file_descriptor_response.file_descriptor_proto.append(file)


def _put_error(reply: ServerReflectionResponse, code: int, text: str) -> None:
    reply.error_response.error_code = code
    reply.error_response.error_message = text


def _symbols(file: FileDescriptorProto) -> list[str]:
    """Full names of everything a file defines."""
    names = []
    for service in file.service:
        names.append(f"{file.package}.{service.name}")
        names += [f"{file.package}.{service.name}.{method.name}" for method in service.method]
    names += [f"{file.package}.{enum.name}" for enum in file.enum_type]
    for message in file.message_type:
        names += _message_symbols(message, file.package)
    return names


def _message_symbols(message: DescriptorProto, scope: str) -> list[str]:
    name = f"{scope}.{message.name}"
    names = [name, *(f"{name}.{enum.name}" for enum in message.enum_type)]
    for nested in message.nested_type:
        names += _message_symbols(nested, name)
    return names


def _renamed(package: str) -> FileDescriptorProto:
    """Reflection's own file under one of its two package names; the messages are the same in both."""
    file = FileDescriptorProto.FromString(reflection_pb2.DESCRIPTOR.serialized_pb)
    old = f".{file.package}."
    file.name = f"{package.replace('.', '/')}/reflection.proto"
    file.package = package
    for message in file.message_type:
        for field in message.field:
            if field.type_name:
                field.type_name = field.type_name.replace(old, f".{package}.")
    for method in file.service[0].method:
        method.input_type = method.input_type.replace(old, f".{package}.")
        method.output_type = method.output_type.replace(old, f".{package}.")
    return file
