"""Loads models when requests name them, and finds the model that an alias stands for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from inflight.admission import holder
from inflight.config import LONGEST_NAME, Alias, RoomConfig
from inflight.errors import Forbidden, InflightError, Loading, NotFound, Overloaded, Unavailable
from inflight.repository import Names
from inflight.router.models import Models
from inflight.startup import one_line

AGAIN = 10.0
"""Seconds after a load that failed in which requests get its reason and no new load begins."""


class Demand:
    """Which model a request's name stands for, and its load where it is not loaded. Lives on the server's event loop.

    Args:
        models: the repository.
        served: whether a name is one of a model that is served, or loads with the server.
        named: returns the name under which a version of a language model is served; None: it is none.
    """

    def __init__(
        self,
        config: RoomConfig,
        models: Models,
        served: Callable[[str], bool],
        named: Callable[[str, int], str | None],
    ) -> None:
        self._config = config
        self._models = models
        self._served = served
        self._named = named
        self._names = Names([Alias.of(text) for text in config.aliases])
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._failed: dict[str, tuple[float, str]] = {}
        self._waiting = 0
        self._loading = config.on_demand or config.makes_room

    @property
    def active(self) -> bool:
        """Whether names mean more here than the models that are served."""
        return bool(self._names) or self._loading

    @property
    def default(self) -> str | None:
        """The language model of requests that name none; None: the first one."""
        return self._config.default_model

    async def language_models(self) -> list[str]:
        """The language models that a request may name, loaded or not, and the aliases of such."""
        known = await self._models.language_models(self._config.on_demand) if self._loading else []
        found = dict.fromkeys([*self._models.served_language_models, *known])
        for alias in self._names.all:
            if any(target.model in found for target in alias.targets):
                found[alias.name] = None
        return list(found)

    def chosen(self, name: str, key: str | None) -> tuple[str, int] | None:
        """The model and version of a request whose name is an alias; None: it is none.

        Args:
            key: requests with the same one go to the same target.
        """
        for short in _shorter(name):
            target = self._names.chosen(short, key)
            if target is not None:
                return target.model + name[len(short) :], target.version
        return None

    def named(self, name: str, version: int) -> str:
        """For doors without versions: the name under which a version of a language model is served.

        Raises:
            NotFound: the model is served, but not in this version.
        """
        found = self._named(name, version)
        if found is None and self._models.serves(name):
            raise NotFound(f"the model '{name}' is not served in version {version}")
        return found or name

    def missing(self, name: str) -> bool:
        """Whether a request may have to wait until the model of this name is loaded."""
        return self._loading and not self._served(name)

    async def present(self, name: str, timeout: float | None = None) -> None:
        """Waits until a model is loaded, where it is known and is not. Unknown names are left to the caller.

        Args:
            timeout: seconds that the request has.

        Raises:
            Forbidden: the caller's key may not call the model.
            Overloaded: too many requests wait for models.
            Loading: it was not loaded in time; it may be later.
            Unavailable: it cannot be loaded.
        """
        if not self.missing(name):
            return
        known = await self._models.wanted(_shorter(name), self._config.on_demand)
        if known is None or not self.missing(known):
            return
        caller = holder.get()
        if caller is not None and not caller.allows(known):
            raise Forbidden(f"this API key may not call '{known}'")
        when, reason = self._failed.get(known, (0.0, ""))
        if reason and time.monotonic() - when < AGAIN:
            raise Unavailable(reason)
        if self._waiting >= self._config.load_queue:
            raise Overloaded(f"{self._waiting} requests wait for models to be loaded, as many as may; try again later")
        seconds = min(each for each in (self._config.load_wait, timeout) if each is not None)
        self._waiting += 1
        try:
            await asyncio.wait_for(asyncio.shield(self._load(known)), seconds)
        except asyncio.TimeoutError:
            raise Loading(f"the model '{known}' is still being loaded; try again later") from None
        finally:
            self._waiting -= 1

    def _load(self, name: str) -> asyncio.Task[None]:
        task = self._loads.get(name)
        if task is None:
            task = self._loads[name] = asyncio.get_running_loop().create_task(self._loaded(name))
            task.add_done_callback(lambda task: task.cancelled() or task.exception())  # whoever still waits
        return task

    async def _loaded(self, name: str) -> None:
        try:
            await self._models.ensure(name)
        except InflightError as error:
            reason = f"the model '{name}' cannot be loaded: {one_line(error)}"
            self._failed[name] = (time.monotonic(), reason)
            raise Unavailable(reason) from error
        else:
            self._failed.pop(name, None)
        finally:
            del self._loads[name]


def _shorter(name: str) -> list[str]:
    """A name, and the names in it that may be a servable's, as in `<servable>.<method>`; the longest first."""
    found = [name]
    if len(name) > LONGEST_NAME:
        return found
    while "." in found[-1]:
        found.append(found[-1].rpartition(".")[0])
    return [each for each in found if each]
