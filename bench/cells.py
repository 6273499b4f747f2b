"""Samples, targets, and the cells that measure: a load on a server, or a bare library."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

from bench import load
from bench.bodies import Body
from bench.load import Load
from bench.procs import Server


@dataclass(frozen=True)
class Sample:
    """One figure of one round.

    Attributes:
        row: the load.
        who: the server or library under it.
        value: in `unit`.
        p50_ms, p99_ms: latency of a request; NaN if not measured.
        cpu_us: microseconds of CPU time of the server and its workers per request; NaN if not measured.
    """

    row: str
    who: str
    value: float
    unit: str
    p50_ms: float = math.nan
    p99_ms: float = math.nan
    cpu_us: float = math.nan


@dataclass(frozen=True)
class Target:
    """A target of `who` under the load `row`.

    Attributes:
        text: its wording in the report.
        versus: the server or library that it is compared with, by medians; None: the figure itself counts.
        least, most: bounds of the figure or of its ratio to `versus`.
        strict: the bounds are exclusive.
    """

    row: str
    who: str
    text: str
    versus: str | None = None
    least: float | None = None
    most: float | None = None
    strict: bool = False


Cell = Callable[[int], "list[Sample]"]
"""Measures for the given number of seconds."""


def rate(row: str, who: str, server: Server, run: Callable[[int], Load], scale: float = 1, unit: str = "req/s") -> Cell:
    """A cell whose figure is the load's rate times `scale`."""

    def cell(seconds: int) -> list[Sample]:
        before = server.cpu_seconds()
        seen = run(seconds)
        used = (server.cpu_seconds() - before) / seen.requests * 1e6
        return [Sample(row, who, seen.rate * scale, unit, seen.p50_ms, seen.p99_ms, used)]

    return cell


def rest(row: str, who: str, server: Server, path: str, body: Body, connections: int) -> Cell:
    port = server.ports["http"]
    load.check_rest(port, path, body)
    return rate(row, who, server, lambda seconds: load.rest(port, path, body, connections, seconds))


def grpc(row: str, who: str, server: Server, path: str, body: Body, connections: int, streams: int = 1) -> Cell:
    port = server.ports["grpc"]
    size = load.check_grpc(port, path, body)
    return rate(row, who, server, lambda seconds: load.grpc(port, path, body, connections, seconds, size, streams))


def direct(row: str, who: str, unit: str, scale: float, *command: object) -> Cell:
    """A cell that runs `bench.peers.direct` in a process of its own."""

    def cell(seconds: int) -> list[Sample]:
        name, *numbers = command
        argv = [sys.executable, "-m", "bench.peers.direct", str(name), str(seconds), *(str(n) for n in numbers)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=seconds + 60, check=True)
        seen = json.loads(done.stdout)
        return [Sample(row, who, seen["rate"] * scale, unit, seen["p50_ms"], seen["p99_ms"])]

    return cell


def bulk(row: str, who: str, server: Server, port: int, path: str, body: Body, scale: float, unit: str) -> Cell:
    load.check_rest(port, path, body)
    return rate(row, who, server, lambda seconds: load.bulk(port, path, body, seconds), scale, unit)
