"""What `inflight.place` uses of Ray, in one process, so that the rest can be tried where Ray is not installed.

The folder that FAKE_RAY names holds one file for each machine that there is; each has room for one process. Actors are
objects in this process. `tests/e2e/test_ray.py` runs on the real one.
"""

from __future__ import annotations

import concurrent.futures
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import exceptions, util

__all__ = ["exceptions", "util"]

used: dict[str, Any] = {}
"""By machine, who has it."""
lock = threading.Lock()
pool = concurrent.futures.ThreadPoolExecutor(32)


def folder() -> Path:
    return Path(os.environ["FAKE_RAY"])


def init(address: str, **options: Any) -> None:
    if address == "127.0.0.1:1":
        raise ConnectionError("nobody is there")


def shutdown() -> None:
    pass


def nodes() -> list[dict[str, Any]]:
    return [{"NodeID": each.name, "Alive": True, "Resources": {"CPU": 1.0}} for each in sorted(folder().iterdir())]


def available_resources() -> dict[str, float]:
    return {"CPU": float(len(list(folder().iterdir())) - len(used))}


class Context:
    def get_node_id(self) -> str:
        return sorted(each.name for each in folder().iterdir())[0]


def get_runtime_context() -> Context:
    return Context()


class Method:
    def __init__(self, actor: Actor, work: Callable[..., Any]) -> None:
        self._actor, self._work = actor, work

    def remote(self, *given: Any) -> Any:
        if self._actor.dead:
            raise exceptions.RayActorError("the actor is dead")
        return pool.submit(self._work, *given)


class Actor:
    """A host, on the machine that its placement has."""

    def __init__(self, kind: type) -> None:
        self.host = kind()
        self.dead = False

    def __getattr__(self, name: str) -> Method:
        return Method(self, getattr(self.host, name))


class Remote:
    def __init__(self, kind: type) -> None:
        self._kind = kind

    def options(self, **options: Any) -> Remote:
        return self

    def remote(self) -> Actor:
        return Actor(self._kind)


def remote(**options: Any) -> Callable[[type], Remote]:
    return Remote


def get(what: Any, timeout: float | None = None) -> Any:
    if isinstance(what, list):
        return [each.result(timeout) for each in what]
    return what.result(timeout)


def kill(actor: Actor) -> None:
    actor.dead = True
    process = actor.host._process
    if process is not None:
        process.kill()
        time.sleep(0)
