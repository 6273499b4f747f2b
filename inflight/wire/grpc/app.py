"""The application of a gRPC port: procedures by path, the message size limit, and the API key."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TypeAlias

from inflight.errors import InflightError
from inflight.wire.grpc.rpc import Rpc
from inflight.wire.grpc.status import status_of

Admit: TypeAlias = "Callable[[Rpc, bytes | None], Rpc]"
"""Checks the key in the metadata `authorization` of a call. Returns the procedure for its caller; raises an
InflightError without a key that is known."""


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
        admit: Admit | None = None,
        secured: Collection[str] = (),
    ) -> None:
        """Args: admit: called for every call of `secured` paths; None: none needs a key."""
        self.rpcs = dict(rpcs)
        self.max_message_bytes = max_message_bytes
        self._admit = admit
        self._secured = frozenset(secured)

    @property
    def needs_key(self) -> bool:
        """Whether some calls need a key."""
        return self._admit is not None

    def admitted(self, path: str, rpc: Rpc, authorization: bytes | None) -> Rpc:
        """The procedure for this caller.

        Raises:
            GrpcError: the caller shows no key that is known.
        """
        if self._admit is None or path not in self._secured:
            return rpc
        try:
            return self._admit(rpc, authorization)
        except InflightError as error:
            raise status_of(error, path) from None
