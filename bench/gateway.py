"""Which cell gets a request: the gateway of docs/scale.md against other policies, by simulation.

    python -m bench.gateway [--cells 4] [--replicas 2] [--seconds 120] [--load NAME]

The loads, the replicas and the figures of the machine are those of `python -m bench.routing`. A cell is a server with
its replicas, and inside it the product's own policy decides. In front of the cells stand several gateways. They know of
each cell how many requests it had at the last report (`REPORT` seconds apart) and what they themselves have sent there
since.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from hashlib import blake2b

import numpy as np

from bench import routing
from bench.routing import LOADS, Outcome, Replica, Simulation, Turn
from inflight.sched import Sequence

GATEWAYS = 4
REPORT = 1.0
"""Seconds between two reports of the cells' loads."""
HEAD = 256
"""Tokens of a prompt that are hashed."""
BOUND = 1.25
"""A cell whose load is more than this many times the mean passes what is new to the next one in order (consistent
hashing with bounded loads, Mirrokni, Thorup and Zadimoghaddam 2018)."""


class Gateways:
    """A policy over the replicas of all cells: chooses a cell, and in it a replica as the product does.

    Attributes:
        now: the simulated time, set before each call.
    """

    def __init__(self, cells: int, replicas: int, choose: Callable[[list[float], list[int], int], int]) -> None:
        self._cells, self._size = cells, replicas
        self._choose = choose
        self._reported = [0] * cells
        self._sent = [[0] * cells for _ in range(GATEWAYS)]
        self._last = -REPORT
        self._orders: dict[bytes, list[int]] = {}
        self.now = 0.0

    def __call__(self, replicas: list[Replica], sequence: Sequence, number: int) -> int:
        size = self._size
        parts = [replicas[cell * size : (cell + 1) * size] for cell in range(self._cells)]
        if self.now - self._last >= REPORT:
            self._last = self.now
            self._reported = [sum(replica.outstanding for replica in part) for part in parts]
            self._sent = [[0] * self._cells for _ in range(GATEWAYS)]
        mine = self._sent[number % GATEWAYS]
        loads = [float(reported + sent) for reported, sent in zip(self._reported, mine)]
        cell = self._choose(loads, self._order(sequence), number)
        mine[cell] += 1
        return cell * size + routing.ours(parts[cell], sequence, number)

    def _order(self, sequence: Sequence) -> list[int]:
        """The cells in the order of rendezvous hashing for this prompt, which every gateway finds alike."""
        head = np.array(sequence.tokens[:HEAD], np.int32).tobytes()
        if head not in self._orders:
            weights = [
                blake2b(head, digest_size=8, salt=cell.to_bytes(4, "little")).digest() for cell in range(self._cells)
            ]
            self._orders[head] = sorted(range(self._cells), key=weights.__getitem__)
        return self._orders[head]


def in_turn(loads: list[float], order: list[int], number: int) -> int:
    return number % len(loads)


def least_loaded(loads: list[float], order: list[int], number: int) -> int:
    """Fewest requests, as far as is known."""
    return min(range(len(loads)), key=lambda cell: (loads[cell], (cell - number) % len(loads)))


def hashed(loads: list[float], order: list[int], number: int) -> int:
    """Rendezvous hashing, whatever waits there."""
    return order[0]


def bounded(loads: list[float], order: list[int], number: int) -> int:
    """The first cell in order whose load is within the bound."""
    bound = BOUND * (sum(loads) + 1) / len(loads)
    return next((cell for cell in order if loads[cell] + 1 <= math.ceil(bound)), order[0])


POLICIES = {
    "in turn": in_turn,
    "least loaded": least_loaded,
    "hash of the beginning": hashed,
    "hash, bounded": bounded,
}
WHOLE = "one router for all replicas"
"""What cells lose by: every replica's cache is known to one router."""


class Cells(Simulation):
    """A run behind gateways."""

    def _arrive(self, now: float, turn: Turn) -> None:
        if isinstance(self._policy, Gateways):
            self._policy.now = now
        super()._arrive(now, turn)


def run(policy: str, load: str, rate: float, cells: int, replicas: int, seconds: float, seed: int) -> Outcome:
    """One run."""
    chosen = routing.ours if policy == WHOLE else Gateways(cells, replicas, POLICIES[policy])
    return Cells(chosen, LOADS[load], rate, cells * replicas, seconds, seed).run()


def goodput(policy: str, load: str, cells: int, replicas: int, seconds: float) -> tuple[float, Outcome]:
    """As `routing.highest`."""
    return routing.highest(lambda rate: run(policy, load, rate, cells, replicas, seconds, 0))


def report(cells: int, replicas: int, seconds: float, loads: list[str]) -> None:
    print("| load | policy | requests/s | to least loaded | first token, s: p50 | p99 | prompts cached |")
    print("|---|---|---|---|---|---|---|")
    for load in loads:
        found = {policy: goodput(policy, load, cells, replicas, seconds) for policy in (*POLICIES, WHOLE)}
        base = found["least loaded"][0]
        for policy, (rate, outcome) in found.items():
            print(
                f"| {load} | {policy} | {rate:.2f} | {rate / base:.2f} | {statistics.median(outcome.first):.2f} | "
                f"{outcome.p99:.2f} | {outcome.hits:.0%} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=4)
    parser.add_argument("--replicas", type=int, default=2, help="of each cell")
    parser.add_argument("--seconds", type=float, default=120.0, help="in which requests come")
    parser.add_argument("--load", choices=LOADS, action="append", help="default: all")
    given = parser.parse_args()
    report(given.cells, given.replicas, given.seconds, given.load or list(LOADS))


if __name__ == "__main__":
    main()
