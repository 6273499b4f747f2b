"""The blocking client, compatible with MindSpore Serving's."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import grpc

from inflight.client.base import MethodClient
from inflight.client.convert import Instance, Result, read_reply, transport_error
from inflight.client.ms_service import MSServiceStub
from inflight.client.options import CHANNEL_OPTIONS


class ClientGrpcAsyncResult:
    """An answer on its way."""

    def __init__(self, result_future: Any) -> None:
        self.result_future = result_future

    def result(self) -> Result:
        """Waits for the answer; the same structure as `Client.infer`.

        Raises:
            grpc.RpcError: the connection or the call failed.
        """
        return read_reply(self.result_future.result())


class ClientGrpcAsyncError:
    """A request that could not be sent; looks like a result."""

    def __init__(self, result_error: dict[str, Any]) -> None:
        self.result_error = result_error

    def result(self) -> Result:
        """The error as `{"error": text}`."""
        return self.result_error


class Client(MethodClient):
    """Calls one method of a servable over gRPC. May be shared by threads. Arguments and errors: see `MethodClient`."""

    def _open(self, credentials: Any) -> None:
        if credentials is None:
            self.channel = grpc.insecure_channel(self.address, options=CHANNEL_OPTIONS)
        else:
            self.channel = grpc.secure_channel(self.address, credentials, options=CHANNEL_OPTIONS)
        self.stub = MSServiceStub(self.channel)

    def infer(
        self, instances: Instance | list[Instance] | tuple[Instance, ...], *, timeout: float | None = None
    ) -> Result:
        """Runs one instance or several and waits for the answer.

        Args:
            instances: one dict from input name to value, or a tuple or list of them. A value is a numpy array or
                number, bool, int, float, str or bytes.
            timeout: seconds for this call instead of the client's.

        Returns:
            A list with one dict per instance (read-only arrays, str or bytes; `{"error": text}` for an instance
            that failed), or one dict `{"error": text}` where the request as a whole failed. A failed connection
            is such a dict too, `Grpc Error, (14, 'unavailable'), ...`, and is printed.

        Raises:
            InvalidRequest: (a RuntimeError) an instance or a value that cannot be sent, or a closed client.
        """
        self._check_open()
        request = self._request(instances)
        try:
            return read_reply(self.stub.Predict(request, timeout=self._seconds(timeout)))
        except grpc.RpcError as error:
            return _printed(error)

    def infer_async(
        self, instances: Instance | list[Instance] | tuple[Instance, ...], *, timeout: float | None = None
    ) -> ClientGrpcAsyncResult | ClientGrpcAsyncError:
        """Sends the request and returns at once; `.result()` of the returned object waits for the answer.

        Raises:
            InvalidRequest: as `infer`.
        """
        self._check_open()
        request = self._request(instances)
        try:
            return ClientGrpcAsyncResult(self.stub.Predict.future(request, timeout=self._seconds(timeout)))
        except grpc.RpcError as error:
            return ClientGrpcAsyncError(_printed(error))

    def close(self) -> None:
        """Closes the connection; calls that wait end with an error."""
        self._closed = True
        self.channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _printed(error: Any) -> dict[str, Any]:
    """The error dict of a failed call, after printing it as MindSpore Serving's client did."""
    code = error.code()
    print(error.details())
    print(code.name)
    print(code.value)
    return transport_error(code, error.details())
