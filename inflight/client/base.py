"""The common part of the blocking client and the asyncio client: the method to call, and the request."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from inflight.client.convert import build_request
from inflight.client.options import SSLConfig, channel_credentials, check_target
from inflight.errors import InvalidRequest
from inflight.proto import ms_service_pb2


class MethodClient(ABC):
    """A client of one method of a servable.

    Args:
        address: `host:port` or `unix:path` of the server's gRPC door.
        servable_name, method_name: what to call.
        version_number: of the servable; 0 is the newest one that runs.
        ssl_config: certificates, for a server that speaks TLS.
        timeout: seconds that a call may take where the call itself does not say; None waits without limit.

    Raises:
        ConfigError: (a RuntimeError) an argument is wrong.
    """

    def __init__(
        self,
        address: str,
        servable_name: str,
        method_name: str,
        version_number: int = 0,
        ssl_config: SSLConfig | None = None,
        *,
        timeout: float | None = None,
    ) -> None:
        check_target(address, servable_name, method_name, version_number)
        self.address = address
        self.servable_name = servable_name
        self.method_name = method_name
        self.version_number = version_number
        self.ssl_config = ssl_config
        self.timeout = timeout
        self._closed = False
        self._open(channel_credentials(ssl_config))

    @abstractmethod
    def _open(self, credentials: Any) -> None:
        """Prepares the channel; `credentials` are None without TLS."""

    def _request(self, instances: object) -> ms_service_pb2.PredictRequest:
        return build_request(self.servable_name, self.method_name, self.version_number, instances)

    def _seconds(self, timeout: float | None) -> float | None:
        return self.timeout if timeout is None else timeout

    def _check_open(self) -> None:
        if self._closed:
            name = type(self).__name__
            raise InvalidRequest(f"This client is closed; create a new {name} to send requests")
