"""The replicas of a language model: which one gets a request, and who takes over from one that is lost."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Items
from itertools import count

from inflight.engine.lane import Lane
from inflight.engine.streams import Streams
from inflight.errors import Unavailable
from inflight.sched import Bid, Sequence, cheapest

log = logging.getLogger("inflight")

RENEW_GRACE = 30.0
"""Seconds in which the running requests of a replica may end before its ranks are started again."""


class Lanes:
    """All replicas of one model. With one, nothing is decided and nothing is computed for a decision.

    Args:
        streams: of the model.

    Attributes:
        all: the replicas by number.
        renewing: their ranks are being started again, one replica after the other.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._turns = count()
        self.renewing = False
        self.all: list[Lane] = []

    @property
    def up(self) -> bool:
        """Whether one replica at least takes plans."""
        return any(lane.up for lane in self.all)

    @property
    def failing(self) -> str | None:
        """Why no replica can be loaded; None if one is, or may be soon."""
        reasons = [lane.failing for lane in self.all]
        return None if None in reasons else reasons[0]

    @property
    def running(self) -> int:
        return sum(lane.scheduler.running for lane in self.all)

    @property
    def waiting(self) -> int:
        return sum(lane.waiting for lane in self.all)

    def covers(self, sequence: Sequence) -> bool:
        """As `Scheduler.covers`, of any replica that is up."""
        return any(lane.scheduler.covers(sequence) for lane in self.all if lane.up or len(self.all) == 1)

    def check(self, prompt: int, max_new_tokens: int) -> None:
        """As `Scheduler.check`, of the replica with the smallest cache, because any one may have to take over."""
        smallest = min(self.all, key=lambda lane: lane.scheduler.capacity.total_tokens)
        smallest.scheduler.check(prompt, max_new_tokens)

    def place(self, sequence: Sequence) -> Lane:
        """The replica that a new request is given to."""
        if len(self.all) == 1:
            return self.all[0]
        lanes = self._open() or [lane for lane in self.all if lane.failing is None] or self.all
        if not sequence.seen(0):  # images are not encoded, because their keys are cached
            lanes = [lane for lane in lanes if lane.scheduler.covers(sequence)] or lanes
        lane, bid = self._cheapest(lanes, sequence)
        lane.give(sequence, bid)
        return lane

    def hand_over(self, lane: Lane) -> None:
        """Gives the requests that wait at a replica to others, as far as there are any that can take them: those that
        are up, or may be while this one cannot be loaded."""
        others = self._open(besides=lane)
        if not others and lane.failing is not None:
            others = [other for other in self.all if other is not lane and other.failing is None]
        moved = self._divide(lane, others)
        if moved:
            log.info("%d requests go from replica %d to others", moved, lane.number)

    def came_up(self, lane: Lane) -> None:
        """A replica is loaded again: it takes over what waits at replicas that are not, and its share of what waits at
        those that are."""
        lane.leaving = False  # `renew` hears of it a little later
        for other in self.all:
            if other is not lane:
                self._divide(other, self._open())

    def add(self, lane: Lane) -> None:
        """Lets a new replica compute; it takes over its share of what waits."""
        self.all.append(lane)
        self.all.sort(key=lambda each: each.number)
        lane.begin()
        self.came_up(lane)

    async def retire(self, lane: Lane, grace: float = RENEW_GRACE) -> bool:
        """Ends a replica whose requests others can take.

        Args:
            grace: seconds in which those that run there may end; then they go on elsewhere.

        Returns:
            Whether it has ended. It has not where a request is left that nobody else can take.
        """
        lane.leaving = True
        ended = False
        try:
            self.hand_over(lane)
            await lane.leave(grace)
            ended = not lane.scheduler.requests
        finally:
            lane.leaving = False
            if ended:
                self.all.remove(lane)
        if not ended:
            lane.begin()
        return ended

    def _divide(self, lane: Lane, takers: Items[Lane]) -> int:
        """Places the requests that wait at a replica anew, among `takers`; returns how many go to another replica."""
        if not takers or not lane.scheduler.waiting:
            return 0
        moved = 0
        released = lane.scheduler.release()
        # Those that had begun go to the head of their new queue, so the last one first.
        begun = [sequence for sequence in released if sequence.cached is not None]
        for sequence in (*reversed(begun), *(sequence for sequence in released if sequence.cached is None)):
            fitting = [taker for taker in takers if taker.fits(sequence)]
            stream = self._streams.get(sequence.id)
            home, bid = self._cheapest(fitting, sequence) if stream is not None and fitting else (lane, None)
            if stream is None or bid is None or home is lane:
                lane.scheduler.adopt(sequence)
                continue
            stream.home = home
            home.take_over(sequence, bid)
            moved += 1
        lane.wake()
        return moved

    async def renew(self, grace: float = RENEW_GRACE) -> None:
        """Starts the ranks of all replicas again, one replica after the other, and so takes up changed files of the
        model. Requests are computed by the other replicas meanwhile; none is lost.

        Args:
            grace: seconds in which those that run at a replica may end there. The others go on elsewhere, or at the
                same replica where there is no other.

        Raises:
            Unavailable: it is being done already.
            InflightError: the ranks of a replica cannot be loaded. The replicas behind it keep what they have.
        """
        if self.renewing:
            raise Unavailable("the replicas are being started again already; try again later")
        self.renewing = True
        try:
            for lane in list(self.all):
                if lane not in self.all or lane.leaving or (lane.executor.elastic and not lane.up):
                    continue  # it is retired; or it waits for a machine, and reads the files when one comes
                lane.leaving = True
                try:
                    self.hand_over(lane)
                    await lane.renew(grace if len(self._open(besides=lane)) else 0.0)
                finally:
                    lane.leaving = False
        finally:
            self.renewing = False

    def _open(self, besides: Lane | None = None) -> list[Lane]:
        """The replicas that take requests now: those that are up, and not leaving if there are others."""
        up = [lane for lane in self.all if lane.up and lane is not besides]
        return [lane for lane in up if not lane.leaving] or up

    def _cheapest(self, lanes: Items[Lane], sequence: Sequence) -> tuple[Lane, Bid]:
        bids = [lane.bid(sequence) for lane in lanes]
        index = cheapest(bids, next(self._turns) % len(lanes))
        return lanes[index], bids[index]
