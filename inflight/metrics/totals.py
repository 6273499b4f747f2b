"""What a method has done since the server's start, as one record."""

from __future__ import annotations

from typing import NamedTuple


class Runs(NamedTuple):
    """The runs of one batch size. Attributes: size: instances; times: number of runs; seconds: of all together."""

    size: int
    times: int
    seconds: float


class Totals(NamedTuple):
    """The sums of one method.

    Attributes:
        answered, answered_seconds: requests that were answered without an error, and their time, waiting included.
        failed, failed_seconds: the others.
        queued, queued_seconds: requests that waited for a replica, and how long.
        runs: of the stage that ran last in the method, by batch size.
        busy_seconds: the time of all stages that a request spends in them, on average.
        last: seconds since the epoch of the last run; 0: there was none.
    """

    answered: int = 0
    answered_seconds: float = 0.0
    failed: int = 0
    failed_seconds: float = 0.0
    queued: int = 0
    queued_seconds: float = 0.0
    runs: tuple[Runs, ...] = ()
    busy_seconds: float = 0.0
    last: float = 0.0
