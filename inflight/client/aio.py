"""The client for asyncio."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any

import grpc
import grpc.aio

from inflight.client.base import MethodClient
from inflight.client.convert import Instance, Result, read_reply, transport_error
from inflight.client.ms_service import MSServiceStub
from inflight.client.options import CHANNEL_OPTIONS


class AsyncClient(MethodClient):
    """Calls one method of a servable over gRPC from one event loop. Arguments and errors: see `MethodClient`."""

    def _open(self, credentials: Any) -> None:
        self._credentials = credentials
        self._channel: Any = None
        self._predict: Any = None

    async def infer(
        self, instances: Instance | list[Instance] | tuple[Instance, ...], *, timeout: float | None = None
    ) -> Result:
        """Runs one instance or several. Cancelling the awaiting task cancels the call on the server.

        Returns:
            As `Client.infer`; a failed connection is `{"error": "Grpc Error, ..."}` and is not printed.

        Raises:
            InvalidRequest: (a RuntimeError) an instance or a value that cannot be sent, or a closed client.
        """
        return await self.prepare(instances, timeout=timeout)()

    def prepare(
        self, instances: Instance | list[Instance] | tuple[Instance, ...], *, timeout: float | None = None
    ) -> Callable[[], Awaitable[Result]]:
        """Builds the request once; each call of the returned function sends it, as `infer` does.

        Raises:
            InvalidRequest: an instance or a value that cannot be sent.
        """
        request = self._request(instances)
        seconds = self._seconds(timeout)

        async def send() -> Result:
            predict = self._connected()
            try:
                return read_reply(await predict(request, timeout=seconds))
            except grpc.RpcError as error:
                failure: Any = error
                return transport_error(failure.code(), failure.details())

        return send

    async def close(self) -> None:
        """Closes the connection; calls that wait end with an error."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _connected(self) -> Any:
        """The bound method; the channel is opened at the first call, because it belongs to the running loop."""
        self._check_open()
        if self._predict is None:
            if self._credentials is None:
                self._channel = grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS)
            else:
                self._channel = grpc.aio.secure_channel(self.address, self._credentials, options=CHANNEL_OPTIONS)
            self._predict = MSServiceStub(self._channel).Predict
        return self._predict
