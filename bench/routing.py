"""Who gets a request: the router of replicas against other policies, by simulation.

    python -m bench.routing [--replicas 4] [--seconds 200] [--load NAME] [--row 0,8,32]

Each replica is the product's own scheduler, with its prefix cache, its chunks and its order of requests; the router's
policy is the product's own function. Only the model is left out: a step takes as long as steps of this number of tokens
were measured to take (`STEP`). For every policy the highest rate of requests is searched at which the 99th percentile
of the time to the first token stays within `TARGET`; the requests answered a second at that rate are its goodput.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count

from inflight.contract import Sampling, StepResult
from inflight.sched import Bid, Capacity, Prospects, Scheduler, Sequence, cheapest, routing

STEP = ((1, 0.0112), (8, 0.0137), (32, 0.0367))
"""Seconds of a step with this many tokens, and between them on a line: Qwen2.5-0.5B in int8 on two cores, decoding 1, 8
and 32 rows (docs/cpu-benchmarks.md, "Decode alone": 89.3, 585 and 871 tokens/s)."""
PROMPT = 1 / 977.0
"""Seconds of each further token of a step: the same model's prompts ("Prefill of 1,024 tokens")."""
CACHE = 24_576
"""Tokens of each replica's cache."""
TARGET = 4.0
"""Seconds to the first token, 99th percentile."""
BLOCK = 16
WARM = 0.3
"""Share of the time, from its beginning, that is not counted: caches and chats only begin then."""


def step_seconds(tokens: int) -> float:
    """How long a step with so many tokens takes."""
    sizes = [size for size, _ in STEP]
    if tokens >= sizes[-1]:
        return STEP[-1][1] + (tokens - sizes[-1]) * PROMPT
    index = max(1, bisect_left(sizes, tokens))
    (before, low), (after, high) = STEP[index - 1], STEP[index]
    return low + (high - low) * (tokens - before) / (after - before)


# Loads


@dataclass
class Turn:
    """One request that is still to come.

    Attributes:
        at: when it comes, in seconds.
        prompt: its tokens.
        answer: the number of tokens that it gets.
        opens: it is the first turn of its chat.
        more: makes the next turn of the whole text and of the time of the answer's end; None: it is the last.
    """

    at: float
    prompt: list[int]
    answer: int
    opens: bool = True
    more: Callable[[list[int], float], Turn | None] | None = None


Load = Callable[[random.Random, float], Iterator[Turn]]
"""The first turns, in the order of their times, for a rate (requests a second)."""


def words(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(50_000) for _ in range(length)]


def tail(draw: random.Random, median: float, sigma: float, most: int) -> int:
    """A length with a heavy tail: log-normal."""
    return max(1, min(most, round(median * math.exp(sigma * draw.gauss(0, 1)))))


def zipf(draw: random.Random, count: int) -> int:
    return draw.choices(range(count), [1 / (rank + 1) for rank in range(count)])[0]


def arrivals(draw: random.Random, rate: float) -> Iterator[float]:
    now = 0.0
    while True:
        now += draw.expovariate(rate)
        yield now


def chats(draw: random.Random, rate: float) -> Iterator[Turn]:
    """Chats of some 5 turns with 8 assistants, each of which has a system prompt of its own; a person reads and writes
    for some 20 seconds between two turns."""
    systems = [words(draw, draw.randrange(300, 900)) for _ in range(8)]
    for at in arrivals(draw, rate / 5):
        rest = 1 + min(14, int(draw.expovariate(1 / 4.5)))
        yield turn(random.Random(draw.random()), at, systems[zipf(draw, 8)], rest)


def turn(draw: random.Random, at: float, before: list[int], rest: int) -> Turn:
    prompt = [*before, *words(draw, tail(draw, 40, 0.8, 800))]

    def more(text: list[int], ended: float) -> Turn | None:
        return turn(draw, ended + draw.expovariate(1 / 20), text, rest - 1) if len(text) < 6000 else None

    return Turn(at, prompt, tail(draw, 90, 0.6, 500), more=more if rest > 1 else None)


def assistants(draw: random.Random, rate: float) -> Iterator[Turn]:
    """Single questions to 40 assistants with system prompts of 1,000 to 2,000 tokens, few of them asked often."""
    systems = [words(draw, draw.randrange(1000, 2000)) for _ in range(40)]
    for at in arrivals(draw, rate):
        question = words(draw, tail(draw, 60, 0.8, 600))
        yield Turn(at, [*systems[zipf(draw, 40)], *question], tail(draw, 60, 0.7, 400))


def one_prefix(draw: random.Random, rate: float) -> Iterator[Turn]:
    """Nine of ten requests begin with the same 1,200 tokens; the others share nothing."""
    system = words(draw, 1200)
    for at in arrivals(draw, rate):
        question = words(draw, tail(draw, 120, 0.9, 1500))
        yield Turn(at, [*system, *question] if draw.random() < 0.9 else question, tail(draw, 80, 0.7, 400))


def heavy_tails(draw: random.Random, rate: float) -> Iterator[Turn]:
    """Nothing is shared; prompts and answers have heavy tails."""
    for at in arrivals(draw, rate):
        yield Turn(at, words(draw, tail(draw, 150, 1.2, 4000)), tail(draw, 80, 1.0, 1000))


LOADS: dict[str, Load] = {
    "chats": chats,
    "assistants": assistants,
    "one prefix": one_prefix,
    "heavy tails": heavy_tails,
}


# Policies


class Replica:
    """A scheduler without a model."""

    def __init__(self) -> None:
        self.scheduler = Scheduler(Capacity(CACHE // BLOCK, BLOCK, 64, 512 + 64, 512, 32))
        self.prospects = Prospects(self.scheduler)
        self.busy = False

    @property
    def outstanding(self) -> int:
        return self.scheduler.running + self.scheduler.waiting


Policy = Callable[[list[Replica], Sequence, int], int]
"""The index of the replica that gets a request; the number counts requests."""


def bids(replicas: list[Replica], sequence: Sequence) -> list[Bid]:
    return [replica.prospects.bid(sequence) for replica in replicas]


def round_robin(replicas: list[Replica], sequence: Sequence, number: int) -> int:
    return number % len(replicas)


def least_loaded(replicas: list[Replica], sequence: Sequence, number: int) -> int:
    """Fewest requests, running and waiting."""
    size = len(replicas)
    return min(range(size), key=lambda index: (replicas[index].outstanding, (index - number) % size))


def least_tokens(replicas: list[Replica], sequence: Sequence, number: int) -> int:
    """Ours without what is cached: fewest prompt tokens that are still to be computed."""
    blind = [Bid(bid.ahead, 0, bid.rows) for bid in bids(replicas, sequence)]
    return cheapest(blind, number % len(replicas))


def affinity(replicas: list[Replica], sequence: Sequence, number: int) -> int:
    """The longest cached prefix, whatever waits there."""
    offered, size = bids(replicas, sequence), len(replicas)
    return min(range(size), key=lambda index: (offered[index].own, offered[index].rows, (index - number) % size))


def ours(replicas: list[Replica], sequence: Sequence, number: int) -> int:
    return cheapest(bids(replicas, sequence), number % len(replicas))


POLICIES: dict[str, Policy] = {
    "least loaded": least_loaded,
    "round robin": round_robin,
    "least tokens": least_tokens,
    "pure affinity": affinity,
    "Inflight": ours,
}


# The simulation


@dataclass
class Outcome:
    """What was measured of a run.

    Attributes:
        first: seconds to the first token of each request.
        between: mean seconds between the tokens of each.
        prompted, cached: tokens of their prompts, and those of them that were cached.
    """

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    prompted: int = 0
    cached: int = 0

    @property
    def p99(self) -> float:
        return sorted(self.first)[int(len(self.first) * 0.99)] if self.first else math.inf

    @property
    def hits(self) -> float:
        return self.cached / max(1, self.prompted)


@dataclass
class Open:
    """A request in a replica."""

    turn: Turn
    sequence: Sequence
    counts: bool
    first: float = 0.0


class Simulation:
    """One run of a load at a rate under a policy."""

    def __init__(self, policy: Policy, load: Load, rate: float, replicas: int, seconds: float, seed: int) -> None:
        self._draw = random.Random(seed + 1000)
        self._policy = policy
        self._turns = load(random.Random(seed), rate)
        self._seconds = seconds
        self._late_for_sure = 0.02 * rate * seconds * (1 - WARM)
        self._replicas = [Replica() for _ in range(replicas)]
        self._events: list[tuple[float, int, Turn | int]] = []  # a turn that comes, or the replica whose step ends
        self._order = count()
        self._answers: dict[int, StepResult] = {}
        self._open: dict[int, Open] = {}
        self._begun = self._late = 0
        self._outcome = Outcome()

    def run(self) -> Outcome:
        """Runs until everybody is answered, or it is sure that too many are late."""
        self._push(next(self._turns))
        while self._events and self._late <= self._late_for_sure:
            now, _, what = heapq.heappop(self._events)
            if isinstance(what, Turn):
                if now < self._seconds:
                    self._arrive(now, what)
            else:
                self._answer(now, what)
        return self._outcome

    def _push(self, turn: Turn) -> None:
        heapq.heappush(self._events, (turn.at, next(self._order), turn))

    def _arrive(self, now: float, turn: Turn) -> None:
        number = self._begun
        self._begun += 1
        sequence = Sequence(number, turn.prompt, Sampling(), turn.answer)
        index = self._policy(self._replicas, sequence, number)
        replica = self._replicas[index]
        replica.prospects.promise(sequence, replica.prospects.bid(sequence))
        self._open[number] = Open(turn, sequence, now >= self._seconds * WARM)
        replica.scheduler.add(sequence)
        if turn.opens:
            self._push(next(self._turns))
        if not replica.busy:
            self._step(now, index)

    def _step(self, now: float, index: int) -> None:
        replica = self._replicas[index]
        plan = replica.scheduler.plan()
        replica.busy = plan is not None
        if plan is None:
            return
        ids = [sequence.id for sequence in replica.scheduler.requests.values() if sequence.pending]
        chunks = {row.id: row.chunk for row in plan.prefill}
        tokens = sum(chunks.values()) + sum(id not in chunks for id in ids)
        self._answers[index] = StepResult(plan.step, ids, words(self._draw, len(ids)))
        heapq.heappush(self._events, (now + step_seconds(tokens), next(self._order), index))

    def _answer(self, now: float, index: int) -> None:
        replica = self._replicas[index]
        for sequence, _, _ in replica.scheduler.apply(self._answers.pop(index)):
            opened = self._open[sequence.id]
            if sequence.generated == 1:
                opened.first = now
                if opened.counts:
                    self._outcome.first.append(now - opened.turn.at)
                    self._late += now - opened.turn.at > TARGET
            if sequence.finished:
                self._end(now, self._open.pop(sequence.id))
        self._step(now, index)

    def _end(self, now: float, opened: Open) -> None:
        turn, sequence = opened.turn, opened.sequence
        if opened.counts:
            outcome = self._outcome
            outcome.between.append((now - opened.first) / max(1, sequence.generated - 1))
            outcome.prompted += sequence.num_prompt
            outcome.cached += sequence.cached or 0
        if turn.more is not None:
            following = turn.more(sequence.tokens, now)
            if following is not None:
                following.opens = False
                self._push(following)


def outcome(policy: str, load: str, rate: float, replicas: int, seconds: float, seeds: int) -> Outcome:
    """The runs with several seeds taken together."""
    whole = Outcome()
    for seed in range(seeds):
        run = Simulation(POLICIES[policy], LOADS[load], rate, replicas, seconds, seed).run()
        whole.first += run.first
        whole.between += run.between
        whole.prompted += run.prompted
        whole.cached += run.cached
    return whole


def goodput(policy: str, load: str, replicas: int, seconds: float, seeds: int) -> tuple[float, Outcome]:
    """As `highest`, of this policy under this load."""
    return highest(lambda rate: outcome(policy, load, rate, replicas, seconds, seeds))


def highest(run: Callable[[float], Outcome]) -> tuple[float, Outcome]:
    """The highest rate, to 2 %, at which the 99th percentile is within `TARGET`; and its outcome."""
    low, high, best = 0.0, 1.0, Outcome()
    while (found := run(high)).p99 <= TARGET:
        low, high, best = high, high * 2, found
    low = low or high / 64
    while high / low > 1.02:
        middle = math.sqrt(low * high)
        found = run(middle)
        if found.p99 <= TARGET:
            low, best = middle, found
        else:
            high = middle
    return low, best


def report(replicas: int, seconds: float, seeds: int, loads: list[str]) -> None:
    """Prints the table, one line for each load and policy."""
    print("| load | policy | requests/s | to least loaded | first token, s: p50 | p99 | between tokens, ms | cached |")
    print("|---|---|---|---|---|---|---|---|")
    for load in loads:
        base = 0.0
        for policy in POLICIES:
            rate, found = goodput(policy, load, replicas, seconds, seeds)
            base = base or rate
            print(
                f"| {load} | {policy} | {rate:.2f} | {rate / base:.2f} | {statistics.median(found.first):.2f} | "
                f"{found.p99:.2f} | {statistics.mean(found.between) * 1000:.0f} | {found.hits:.0%} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=200.0, help="in which requests come")
    parser.add_argument("--seeds", type=int, default=1, help="runs for each rate")
    parser.add_argument("--load", choices=LOADS, action="append", help="default: all")
    parser.add_argument("--row", help="values of routing.ROW to compare, for the policy of Inflight alone")
    given = parser.parse_args()
    loads = given.load or list(LOADS)
    if given.row:
        for row in map(int, given.row.split(",")):
            routing.ROW = row
            for load in loads:
                rate, found = goodput("Inflight", load, given.replicas, given.seconds, given.seeds)
                print(f"row {row}: {load}: {rate:.2f} requests/s, {found.hits:.0%} cached", flush=True)
        return
    report(given.replicas, given.seconds, given.seeds, loads)


if __name__ == "__main__":
    main()
