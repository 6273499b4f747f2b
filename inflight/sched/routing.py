"""Which replica of a model gets a request: the policy, and what it is decided by."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

from inflight.sched.scheduler import Scheduler
from inflight.sched.sequence import Sequence

OWN = 1.5
"""What a token counts that is computed anew, to one that others wait for: it also delays those behind the request, and
takes the place of somebody else's prefix in the cache. Of 1, 1.5, 2 and 3 the best in `python -m bench.routing`."""

ROW = 32
"""Tokens that a row in the batch counts as, since it shares the steps. From 0 to 128 the goodput hardly depends on it,
512 is worse (`python -m bench.routing --row 0,32,128,512`)."""


@dataclass(frozen=True, slots=True)
class Bid:
    """What a request would cost at one replica.

    Attributes:
        ahead: prompt tokens that are computed before its own.
        own: tokens of it that are not in the prefix cache there, and will not be when its turn comes.
        rows: requests there, running and waiting.
    """

    ahead: int
    own: int
    rows: int


def cheapest(bids: Items[Bid], turn: int = 0) -> int:
    """The replica that begins to answer soonest, by its index.

    A request goes where its prefix is cached, unless the queue there is longer than computing the prefix elsewhere
    takes: both are prompt tokens that stand before its first token, so they are added (`OWN`) and compared. Rows that
    decode count a little.

    Args:
        turn: of replicas that are equal the first one from this index on is taken.
    """
    count = len(bids)

    def cost(index: int) -> tuple[float, int]:
        bid = bids[index]
        return bid.ahead + OWN * bid.own + ROW * bid.rows, (index - turn) % count

    return min(range(count), key=cost)


class Prospects:
    """What one replica's scheduler has cached, or will have once the requests that wait there are computed."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._promised: dict[bytes, None] = {}  # digests of the blocks of waiting requests

    def bid(self, sequence: Sequence) -> Bid:
        scheduler = self._scheduler
        if not scheduler.waiting:
            self._promised.clear()
        size, length = scheduler.capacity.block_size, len(sequence.tokens)
        found = scheduler.found(sequence) // size
        digests = sequence.chain(size) if self._promised and not sequence.sampling.needs_whole_prompt else ()
        while found < len(digests) and digests[found] in self._promised:
            found += 1
        # The last token is always computed.
        own = length - min(found * size, length - 1)
        return Bid(scheduler.ahead, own, scheduler.running + scheduler.waiting)

    def promise(self, sequence: Sequence, bid: Bid) -> None:
        """Notes that a request is given to this replica for this bid."""
        sequence.own = bid.own
        if len(self._promised) > self._scheduler.capacity.num_blocks:
            self._promised.clear()
        if not sequence.sampling.needs_whole_prompt:
            self._promised.update(dict.fromkeys(sequence.chain(self._scheduler.capacity.block_size)))
