"""Loading and unloading of models by callers: who may, and what the doors tell of the models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from inflight.admission import holder
from inflight.contract import KnownModel, ModelState
from inflight.errors import Forbidden
from inflight.frontends.base import Backend


class AdapterControl(Protocol):
    """The LoRA adapters of language models. All methods run on the server's event loop."""

    async def load(self, name: str, path: str | None, model: str | None = None, *, again: bool = False) -> None:
        """Loads an adapter; returns when requests may name it.

        Raises:
            InflightError: it cannot be loaded; nothing has changed.
        """

    async def unload(self, name: str, model: str | None = None) -> None:
        """Takes an adapter out of service; requests that began with it end with it.

        Raises:
            NotFound: there is none of this name.
        """


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

    @property
    def adapters(self) -> AdapterControl:
        """The LoRA adapters of language models."""


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
        owner = parameters.get("adapter_of")
        await self._changeable(owner if isinstance(owner, str) else name).load(name, parameters)

    async def unload(self, name: str, parameters: Mapping[str, Any]) -> None:
        """See `ModelControl`.

        Raises:
            Forbidden: the caller may not.
        """
        await self._changeable(name).unload(name, parameters)

    async def load_adapter(self, name: str, path: str, model: str | None, again: bool) -> None:
        """See `ModelControl`.

        Raises:
            Forbidden: the caller may not.
        """
        await self._changeable(model or self._only()).adapters.load(name, path, model, again=again)

    async def unload_adapter(self, name: str, model: str | None) -> None:
        """See `ModelControl`.

        Raises:
            Forbidden: the caller may not.
        """
        owners = (each for each, one in self._backend.generators.items() if name in one.info.adapters)
        await self._changeable(model or next(owners, name)).adapters.unload(name, model)

    def _only(self) -> str:
        """The language model that an adapter is for where a caller names none: there is one only, or none."""
        return next(iter(self._backend.generators), "")

    def _changeable(self, name: str) -> ModelControl:
        if self._models is None or not self._allowed:
            raise Forbidden("this server does not let callers load and unload models; start it with --admin")
        caller = holder.get()
        if caller is not None and not (caller.admin and caller.allows(name)):
            raise Forbidden(f"this API key may not load or unload the model '{name}'")
        return self._models
