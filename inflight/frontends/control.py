"""Loading and unloading of models by callers: who may, and what the doors tell of the models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from inflight.admission import holder
from inflight.contract import KnownModel, ModelState
from inflight.errors import Forbidden
from inflight.frontends.base import Backend


class ModelControl(Protocol):
    """The repository of a server as the doors see it. All methods run on the server's event loop."""

    async def index(self) -> Sequence[KnownModel]:
        """Every version of every model that is known."""

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Loads a model, or loads it again; returns when it answers.

        Raises:
            InflightError: it cannot be loaded; what served under the name goes on.
        """

    async def unload(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Takes a model out of service; requests that it has are answered.

        Raises:
            NotFound: no model of this name is known.
        """


class Control:
    """A `ModelControl` that asks first whether the caller may change models.

    Args:
        models: None: models cannot be changed.
        allowed: callers may change models, those with an API key if their key says so.
    """

    def __init__(self, backend: Backend, models: ModelControl | None = None, allowed: bool = False) -> None:
        self._backend = backend
        self._models = models
        self._allowed = allowed

    async def index(self, only_ready: bool = False) -> list[KnownModel]:
        """Every version of every model that is known, or only those that answer."""
        if self._models is not None:
            entries = await self._models.index()
        else:
            entries = [KnownModel.of(each) for each in self._backend.servables()]
        return [entry for entry in entries if not only_ready or entry.state is ModelState.READY]

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """See `ModelControl`.

        Raises:
            Forbidden: the caller may not.
        """
        await self._changeable(name).load(name, parameters)

    async def unload(self, name: str, parameters: Mapping[str, Any]) -> None:
        """See `ModelControl`.

        Raises:
            Forbidden: the caller may not.
        """
        await self._changeable(name).unload(name, parameters)

    def _changeable(self, name: str) -> ModelControl:
        if self._models is None or not self._allowed:
            raise Forbidden("this server does not let callers load and unload models; start it with --admin")
        caller = holder.get()
        if caller is not None and not (caller.admin and caller.allows(name)):
            raise Forbidden(f"this API key may not load or unload the model '{name}'")
        return self._models
