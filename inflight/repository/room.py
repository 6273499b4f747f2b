"""Which models have to go so that another one has room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Loaded:
    """A model that is loaded, or takes its room while it loads.

    Attributes:
        size: bytes that it takes.
        used: time of its last request.
        busy: it answers requests now.
        stays: it cannot go now.
    """

    name: str
    size: int
    used: float
    busy: bool = False
    stays: bool = False


def leaving(loaded: Sequence[Loaded], size: int, max_loaded: int | None, max_memory: int | None) -> list[str] | None:
    """The models to unload before another one is loaded: those that answer nothing first, the least recently used of
    them first.

    Args:
        loaded: all others.
        size: bytes that the new one takes.
        max_loaded, max_memory: the limits, the new one included; None: there is none.

    Returns:
        Their names, in the order in which they go; None: there is not room enough now, even without all that can go.
    """
    count, memory = len(loaded) + 1, sum(model.size for model in loaded) + size
    gone: list[str] = []
    candidates = iter(sorted((m for m in loaded if not m.stays), key=lambda model: (model.busy, model.used)))

    def fits() -> bool:
        return (max_loaded is None or count <= max_loaded) and (max_memory is None or memory <= max_memory)

    while not fits():
        model = next(candidates, None)
        if model is None:
            return None
        gone.append(model.name)
        count, memory = count - 1, memory - model.size
    return gone
