"""Admits requests to a language model and decides when refused clients are read again.

A model takes `limit` generations at a time; further requests are refused at once. That alone does not protect it: a
client that repeats each refused request at once costs the event loop a request each time. A thousand such clients take
all of its time, and the engine, which steps on the same loop, stands still. So the doors ask here, and the policy is:

- A refusal costs next to nothing. `full` is known before a request's body is read, and the answer's bytes are prepared.
- A refused client waits. The door stops reading its connection (a call over HTTP/2 is held) and the client's next
  request stays in the kernel; other clients are not affected. The first pause is short and every further refusal in a
  row doubles it (`FIRST_PAUSE` to `LONGEST_PAUSE`), so that a refusal is answered within a second of its request.
- The event loop has a budget for refusals: `SHARE` of its time. If the waiting clients would cost more, their pauses
  become longer; the pause that should have ended first ends first.
- It is fair. When a generation ends, the client that was refused first, and has not been let in since, has the next
  turn, before the client of the ended generation can ask again. So clients in a closed loop take turns; none starves.
- A client with a bad request (too long, too large, not valid) waits likewise, and is offered no place until it has sent
  a good one. Finding out has a budget too: once that is spent, clients whose last request was let in and then refused
  are refused at the door while there is work.
- Bytes are shared like turns. A large body costs the loop as much as many small requests, to receive and to parse.
  While small ones come too and places are scarce, large ones get `BULK_SHARE` of the loop's time; those beyond it are
  refused from their heads, and keep their claims to a turn among each other. While places are not scarce their limit is
  `EASY_SHARE`, which only a crowd of them reaches.
- No client waits while the model is idle: a mistaken request can be sent again right away.

Lives on one event loop and knows no protocols: the engine counts, the doors wait.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Protocol

from inflight.errors import OVERLOADED, Overloaded

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 0.7
"""Seconds: after a first refusal, and after the fourth in a row and all further ones."""
SHARE = 0.1
"""Share of the event loop's time for reading callers again although there may be no place for them."""
WASTE_SHARE = 0.02
"""Share of the time for requests that are let in and then refused. Each takes a place and the tokenizer from good ones,
so it is smaller: with 0.1 a crowd of long prompts took 15 % of the server's process."""
COST, COST_OF_CALL, COST_OF_CONNECTION, COST_OF_BYTE = 45e-6, 70e-6, 20e-6, 0.5e-9
"""Seconds that a refusal takes over HTTP/1.1, and over gRPC, a new connection, and a byte of a refused body that is
read and dropped (the system's share included: with the reader's own 0.15 ns a crowd of uploads took the whole core)."""
BULK_SHARE = 0.08
"""Share of the event loop's time for large bodies that are let in while small requests come and places are scarce."""
EASY_SHARE = 0.4
"""The same while places are not scarce; also the seconds that they may save up then: 160 MB at once, and 160 MB/s."""
COST_OF_BULK = 2.5e-9
"""Seconds that a byte of a large body takes from the socket to the parsed request (`python -m bench.overload --only
uploads`)."""
LATELY = 10.0
"""Seconds after a small request, and after half of the places were taken, in which large ones have only their share:
longer than a generation takes, since all that run in a batch may end, and come again, together."""
COST_OF_MISTAKE = 300e-6
"""Seconds for a request that is let in and then refused, besides the time that the engine reports (`wasted`)."""
BURST, DEBT, WASTE = 0.02, 0.05, 0.4
"""Limits of the budgets in seconds: how much either may save up, how far the one for refusals may be overdrawn, and how
far the one for wasted computing may: much further, because many requests can waste before the first is known to."""
TICK = 0.005
"""Seconds between two checks of the waiting callers."""
FORGOTTEN = 2.0
"""Seconds without a refusal after which a caller counts as new."""
_SWEPT = 256
"""Number of entries up to which a heap keeps those of callers that no longer wait."""
_tickets = itertools.count(1)

arrival: ContextVar[Arrival | None] = ContextVar("arrival", default=None)
"""Set by a door while it hands an admitted request on."""


class Holder(Protocol):
    """Who has shown an API key."""

    @property
    def tenant(self) -> str:
        """Only requests with the same tenant share cached prompts."""

    @property
    def priority(self) -> int:
        """Of its requests to language models; larger goes first."""

    @property
    def admin(self) -> bool:
        """Whether it may load and unload models."""

    def allows(self, *names: str | None) -> bool:
        """Whether it may call the model or servable that has these names."""

    def spent(self, tokens: int) -> None:
        """A request of its to a language model has ended that read and wrote these tokens."""


holder: ContextVar[Holder | None] = ContextVar("holder", default=None)
"""Set by the doors while they serve a request of this holder; None: the server asks for no key."""


priority: ContextVar[int] = ContextVar("priority", default=0)
"""Set by a door around a request to a servable that names a level: 1 is the highest; 0: it names none."""


class Arrival:
    """A request that a door has let in. A place is reserved for it until it takes one or is answered."""

    __slots__ = ("_admission",)

    def __init__(self, admission: Admission) -> None:
        self._admission: Admission | None = admission
        admission.arrived()

    def kept_by(self, admission: Admission) -> bool:
        """Whether this model still reserves a place for it."""
        return self._admission is admission

    def settle(self, admission: Admission | None = None) -> None:
        """Ends the reservation. Args: admission: end it only if the place is this model's."""
        kept = self._admission
        if kept is not None and (admission is None or admission is kept):
            self._admission = None
            kept.arriving -= 1


class Caller:
    """A connection, or a call, that can be made to wait.

    Args:
        turn: called on the loop when the caller is to be read again; its argument says whether a place is offered.
            Returns False if the caller will not use the place, so that another one gets it.
        cost: seconds that a turn takes; 0: `turn` reports them itself (`Admission.spent`).

    Attributes:
        bulky: its last request has a large body.
        costly: its last request was let in and then refused.
        line: the model that it waits for now.
        met: the model that it last waited for.
        offered: its last turn offered it a place.
    """

    __slots__ = (
        "bulky",
        "cost",
        "costly",
        "faulty",
        "line",
        "met",
        "offered",
        "refusals",
        "since",
        "ticket",
        "turn",
        "turned",
    )

    def __init__(self, turn: Callable[[bool], bool], cost: float = COST) -> None:
        self.turn = turn
        self.cost = cost
        self.since = 0.0  # time of the first of its refusals in a row
        self.refusals = 0
        self.faulty = self.costly = self.bulky = self.offered = False
        self.turned = 0.0  # time of its last turn
        self.ticket = 0
        self.line: Admission | None = None
        self.met: Admission | None = None

    @property
    def waits(self) -> bool:
        return self.line is not None

    def leave(self) -> None:
        """Takes the caller out of the line: it is gone."""
        if self.line is not None:
            self.line.forget(self)


def gone(_offered: bool) -> bool:
    """The turn of a caller that has left."""
    return False


class _Heap:
    """Callers by time. An entry is skipped if its ticket is no longer the caller's."""

    def __init__(self) -> None:
        self._entries: list[tuple[float, int, Caller]] = []

    def push(self, when: float, caller: Caller) -> None:
        heapq.heappush(self._entries, (when, caller.ticket, caller))

    def first(self) -> float | None:
        """The time of the first caller that still waits."""
        entries = self._entries
        while entries and entries[0][2].ticket != entries[0][1]:
            heapq.heappop(entries)
        return entries[0][0] if entries else None

    def pop(self) -> Caller:
        """Removes the first caller. `first` must have been called just before."""
        return heapq.heappop(self._entries)[2]

    def sweep(self, waiting: int) -> None:
        """Drops the entries of callers that no longer wait if they are more than half."""
        if len(self._entries) > _SWEPT and len(self._entries) > 2 * waiting:
            self._entries = [entry for entry in self._entries if entry[2].ticket == entry[1]]
            heapq.heapify(self._entries)


class Admission:
    """The places of one language model and the line of callers that wait for one.

    Args:
        limit: generations at a time.
        on_refused: called for each request that a door refused without asking the engine.
        loop: returns the event loop that it lives on.

    Attributes:
        used: generations that were let in and have not ended.
        uploading: bytes of large bodies that come in now.
        arriving: places reserved for requests that a door has let in.
        entered: time of the last generation's begin by `time.perf_counter`.
        waiting: callers in the line, which are not read meanwhile.
    """

    def __init__(
        self,
        limit: int,
        on_refused: Callable[[], None] = lambda: None,
        loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.get_running_loop,
    ) -> None:
        self._loop = loop
        self.limit = limit
        self.used = 0
        self.arriving = 0
        self.entered = 0.0
        self.uploading = 0
        self.waiting = 0
        self._on_refused = on_refused
        self._by_first_refusal, self._bulky, self._by_due = _Heap(), _Heap(), _Heap()
        self._bulk = EASY_SHARE
        self._small = self._scarce = -LATELY  # times of the last small request, and when half of the places were taken
        self._offered = 0  # places offered to callers that have not used them yet
        self._budget = self._waste = BURST
        self._looked = 0.0
        self._timer: asyncio.TimerHandle | None = None

    # The engine's side

    @property
    def room(self) -> int:
        """Number of generations that would be let in now."""
        return self.limit - self.used

    def enter(self) -> None:
        """Takes a place.

        Raises:
            Overloaded: all are taken.
        """
        if self.used >= self.limit:
            raise Overloaded(OVERLOADED)
        self.used += 1
        self.entered = time.perf_counter()
        if (mine := arrival.get()) is not None:
            mine.settle(self)
        elif self._offered:
            self._offered -= 1

    def leave(self) -> None:
        """Gives a place back and offers it to the caller that was refused first."""
        self.used -= 1
        if self.waiting:
            self._offer(self._loop().time())

    # The doors' side

    @property
    def full(self) -> bool:
        """Whether a request would be refused now."""
        return self.used + self.arriving >= self.limit

    @property
    def crowded(self) -> bool:
        """Whether some request would be refused now: any, or one with a large body."""
        return self.full or self.gorged()

    def arrived(self) -> None:
        """Reserves a place for a request."""
        self.arriving += 1
        if self._offered:
            self._offered -= 1

    def sees(self, caller: Caller, large: bool) -> None:
        """Notes that a request of the caller has come, with a large body or a small one."""
        caller.bulky = large
        now = self._refill()
        if not large:
            self._small = now

    def gorged(self, caller: Caller | None = None) -> bool:
        """Whether large bodies have to wait, because small requests come and their kind has had its share.

        Args:
            caller: one with a large body, who also waits for those of its kind that have waited for longer.
        """
        if not self.used or self._refill() - self._small >= LATELY:
            return False
        return self._bulk <= 0 or (caller is not None and not caller.offered and self._bulky.first() is not None)

    def swallows(self, size: int) -> None:
        """Charges a large body of `size` bytes that is let in."""
        if self._refill() - self._small < LATELY:
            self._bulk -= size * COST_OF_BULK

    def turned_away(self) -> None:
        """Counts a request that a door refused without asking the engine."""
        self._on_refused()

    def came(self, caller: Caller) -> bool:
        """Handles a new connection. Returns True if it must wait before it is read, because others wait too.

        Clients that connect anew for every request cannot be recognised; each waits as if it had been refused once.
        """
        if not (self.full or (caller.bulky and self.gorged(caller))):
            return False
        now = self._refill()
        self._budget -= COST_OF_CONNECTION
        if self._budget > 0 and not self.waiting:
            return False
        caller.since = now
        self._wait(caller, now + FIRST_PAUSE, now)
        self._claim(caller)
        return True

    def rest(self, caller: Caller, seconds: float) -> None:
        """Makes a caller without a request wait for some seconds."""
        now = self._loop().time()
        self._wait(caller, now + seconds, now)

    def barred(self, caller: Caller) -> bool:
        """Whether to refuse the caller because its last request was wasted and the budget for such is spent."""
        if not caller.costly or not self.used:
            return False
        self._refill()
        return self._waste <= 0

    def refused(self, caller: Caller, fault: bool = False, let_in: bool = False) -> bool:
        """Handles a caller that got a refusal. Returns True if it waits for its turn, False if it may ask at once.

        Args:
            fault: the request was wrong. No place is offered to the caller until it is served; only its pauses end.
            let_in: it was refused after a door had let it in.
        """
        if let_in:
            caller.costly = True
            self.wasted(COST_OF_MISTAKE)
        caller.offered = False
        if not self.used or caller.waits:
            return False
        caller.faulty = caller.faulty or fault
        now = self._loop().time()
        if not caller.refusals or now - caller.turned > FORGOTTEN:
            caller.since, caller.refusals = now, 0
        pause = min(FIRST_PAUSE * 2**caller.refusals, LONGEST_PAUSE)
        caller.refusals = min(caller.refusals + 1, 16)
        self._wait(caller, now + pause, now)
        if not caller.faulty and not caller.costly:
            self._claim(caller)
        return True

    def hold(self, caller: Caller, since: float) -> None:
        """Makes a caller wait whose request is here and finds no place; for the longest pause at most.

        Args:
            since: loop time of the first of its refusals in a row, else now.
        """
        now = self._loop().time()
        caller.since = since
        self._wait(caller, now + LONGEST_PAUSE, now)
        self._claim(caller)

    def served(self, caller: Caller) -> None:
        """Forgets the caller's refusals: it was let in."""
        caller.refusals, caller.faulty, caller.costly, caller.offered = 0, False, False, False

    def spent(self, seconds: float) -> None:
        """Takes time that refusals took from their budget."""
        self._refill()
        self._budget = max(self._budget - seconds, -DEBT)

    def wasted(self, seconds: float) -> None:
        """Takes time that was computed for a request refused later from the budget for waste."""
        self._refill()
        self._waste = max(self._waste - seconds, -WASTE)

    def dropped(self, caller: Caller, size: int) -> bool:
        """Charges `size` bytes read of a refused request's body. Returns True if the rest waits for more budget."""
        now = self._refill()
        self._budget -= size * COST_OF_BYTE
        if not self.used or caller.waits or self._budget > 0:
            return False
        self._wait(caller, now, now)
        return True

    def forget(self, caller: Caller) -> None:
        """Takes the caller out of the line."""
        self._take_out(caller)
        self._sweep()

    def _sweep(self) -> None:
        for heap in (self._by_first_refusal, self._bulky, self._by_due):
            heap.sweep(self.waiting)

    def _claim(self, caller: Caller) -> None:
        """Gives the caller a claim to a free place, from its first refusal on."""
        (self._bulky if caller.bulky else self._by_first_refusal).push(caller.since, caller)

    def _next_claim(self, fed: bool) -> _Heap | None:
        """Where the caller stands who was refused first, of those that may have a place now.

        Args:
            fed: one with a large body has had its turn just now, and is not charged yet.
        """
        small = self._by_first_refusal.first()
        bulky = None if fed or self.gorged() else self._bulky.first()
        if bulky is not None and (small is None or bulky < small):
            return self._bulky
        return None if small is None else self._by_first_refusal

    def _wait(self, caller: Caller, due: float, now: float) -> None:
        caller.ticket = next(_tickets)
        caller.line = caller.met = self
        self.waiting += 1
        self._by_due.push(due, caller)
        if self._timer is None:
            self._timer = self._loop().call_later(TICK, self._look)

    def _take_out(self, caller: Caller) -> None:
        caller.ticket, caller.line = 0, None
        self.waiting -= 1

    def _give_turn(self, caller: Caller, now: float, offered: bool) -> bool:
        self._take_out(caller)
        caller.turned, caller.offered = now, offered
        return caller.turn(offered)

    def _offer(self, now: float) -> None:
        """Offers each free place to a caller, in the order of their first refusals."""
        fed = False
        while self._offered + self.arriving < self.room and (claims := self._next_claim(fed)) is not None:
            fed = fed or claims is self._bulky
            kept = self.arriving
            self._offered += 1
            used = self._give_turn(claims.pop(), now, True)
            if not used and self.arriving == kept and self._offered:
                self._offered -= 1

    def _look(self) -> None:
        """Offers unused places again, then gives turns to callers whose pause is over, as far as the budget goes."""
        now = self._refill()
        self._offered = 0
        self._offer(now)
        while self._budget > 0 and (due := self._by_due.first()) is not None and due <= now:
            caller = self._by_due.pop()
            self._budget -= caller.cost
            self._give_turn(caller, now, False)
        self._sweep()
        self._timer = self._loop().call_later(TICK, self._look) if self.waiting else None

    def _refill(self) -> float:
        """Adds the share of the time since the last call to all budgets; returns the loop's time."""
        now = self._loop().time()
        passed = now - self._looked
        self._budget = min(self._budget + passed * SHARE, BURST)
        self._waste = min(self._waste + passed * WASTE_SHARE, BURST)
        if 2 * (self.used + self.arriving) >= self.limit:
            self._scarce = now
        share, most = (BULK_SHARE, BURST) if now - self._scarce < LATELY else (EASY_SHARE, EASY_SHARE)
        self._bulk = min(self._bulk + passed * share, most)
        self._looked = now
        return now
