"""How many replicas of a model there should be: the policy, and what it is decided by."""

from __future__ import annotations

from dataclasses import dataclass

BUSY = 0.5
"""Share of the rows of one replica fewer up to which that many would be enough: the rest is for what comes together."""


@dataclass(frozen=True, slots=True)
class Pressure:
    """What is seen of a model's replicas at one moment.

    Attributes:
        replicas: those that compute, and those that are on their way.
        coming: of them, those that do not compute yet.
        waited: seconds that the request at the head of a queue has waited for its first step, the longest of all.
        running: rows in all batches; rows: the most that one replica's batch takes.
    """

    replicas: int
    coming: int
    waited: float
    running: int
    rows: int


def wanted(seen: Pressure, calm: float, least: int, most: int, queue_time: float, idle_time: float) -> int:
    """The number of replicas that there should be.

    One more where somebody waits too long, but only once the last one computes, since it may be the one that helps. One
    fewer where that many would have been enough for a long time. Never two at once: a burst is over before a model is
    loaded, and one that is not over asks again.

    Args:
        calm: seconds for which one replica fewer has been enough (`enough`).
        least, most: bounds.
        queue_time: seconds that a request may wait. idle_time: seconds of calm after which a replica ends.
    """
    if seen.replicas < least:
        return least
    if calm >= idle_time:
        return max(least, seen.replicas - 1)
    if seen.waited > queue_time and not seen.coming:
        return max(seen.replicas, min(seen.replicas + 1, most))
    return seen.replicas


def enough(seen: Pressure) -> bool:
    """Whether one replica fewer would be enough: nobody waits, and the others' batches would be half empty. One that
    does not compute is the first to go."""
    return not seen.waited and seen.running <= BUSY * seen.rows * min(seen.replicas - 1, seen.replicas - seen.coming)


class Scaler:
    """Applies the policy to what is seen from time to time.

    Args:
        least, most, queue_time, idle_time: as in `wanted`.
    """

    def __init__(self, least: int, most: int, queue_time: float, idle_time: float) -> None:
        self._rule = least, most, queue_time, idle_time
        self._calm_since: float | None = None

    def look(self, now: float, seen: Pressure) -> int:
        """The number of replicas that there should be. Args: now: seconds, of any clock that only goes forward."""
        if not enough(seen):
            self._calm_since = None
        elif self._calm_since is None:
            self._calm_since = now
        calm = 0.0 if self._calm_since is None else now - self._calm_since
        count = wanted(seen, calm, *self._rule)
        if count != seen.replicas:
            self._calm_since = None  # the next one has a time of its own
        return count
