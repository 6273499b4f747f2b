"""The application of a gRPC port: procedures by path, the message size limit, and the API key."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from inflight.wire.access import authorized
from inflight.wire.grpc.rpc import Rpc
from inflight.wire.grpc.status import UNAUTHENTICATED, GrpcError


class GrpcApp:
    """The procedures of a gRPC port, independent of the engine that serves them.

    Attributes:
        rpcs: by path, `/package.Service/Method`.
        max_message_bytes: of one message, either way, after decompression.
    """

    def __init__(
        self,
        rpcs: Mapping[str, Rpc],
        *,
        max_message_bytes: int,
        api_key: str | None = None,
        secured: Collection[str] = (),
    ) -> None:
        """Args: secured: paths that only callers with the key may call."""
        self.rpcs = dict(rpcs)
        self.max_message_bytes = max_message_bytes
        self._api_key = api_key
        self._secured = frozenset(secured)

    @property
    def needs_key(self) -> bool:
        """Whether some calls need a key."""
        return self._api_key is not None

    def refuses(self, path: str, authorization: bytes | None) -> GrpcError | None:
        """The status for a caller without the key."""
        if self._api_key is None or path not in self._secured or authorized(self._api_key, authorization):
            return None
        return GrpcError(
            UNAUTHENTICATED, "this server needs its API key: send the metadata authorization: Bearer <key>"
        )
