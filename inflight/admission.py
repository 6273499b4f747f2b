"""Who is let in to a language model, and when those who were refused are listened to again.

A model takes `limit` generations at a time; who comes beyond is refused at once. That alone does not protect it: a
client that asks again as soon as it is refused costs the event loop a request each time, a thousand such clients cost
all of it, and the engine, whose steps run on the same loop, stands still. So the doors ask here, and the policy is:

- A refusal costs next to nothing. Whether there is room is known at once (`full`), before a request's body is read or
  looked at, and the answer's bytes were made beforehand.
- Who was refused waits. The door stops to read that connection (a call over HTTP/2 is held), the client's next request
  stays in the kernel, and nobody else notices. The first pause is short and every further refusal in a row doubles it
  (`FIRST_PAUSE` to `LONGEST_PAUSE`), so that a refusal is told within a second of being asked for.
- The event loop has a budget for refusals: `SHARE` of its time. Where so many wait that their pauses would cost more,
  the pauses become longer, those that are over longest ending first.
- It is fair. When a generation ends, whoever was refused first, and not let in since, has the next turn, before the
  client whose generation ended can ask again. So a crowd in a closed loop goes round, and nobody starves.
- Who sends what is refused for its own sake (too long, too large, not valid) waits likewise, and gets no place offered
  before it has sent something better. What it takes to find out has a budget too: once it is spent, those whose last
  request was let in for nothing are refused like everybody else where there is no room.
- Nobody waits where the model is idle: a mistaken request can be sent again right away.

Lives on one event loop. Nothing here knows of protocols: the engine counts, the doors wait.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable
from contextvars import ContextVar

from inflight.errors import OVERLOADED, Overloaded

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 0.6
"""Seconds: after a first refusal, and after the fourth in a row and all further ones."""
SHARE = 0.1
"""Of the event loop's time, for those who are read again though nothing says that there is room."""
COST, COST_OF_CALL, COST_OF_CONNECTION, COST_OF_BYTE = 45e-6, 70e-6, 20e-6, 0.5e-9
"""Seconds that a refusal takes over HTTP/1.1, and over gRPC, a new connection, and a byte of a refused body that is
read and dropped (the system's share included: with the reader's own 0.15 ns a crowd of uploads took the whole core)."""
COST_OF_MISTAKE = 300e-6
"""Seconds that a request takes which is let in and refused then, beside what the engine says that it took."""
BURST, DEBT, WASTE = 0.02, 0.05, 2.0
"""Seconds of a budget that may be saved up, by which that for refusals may be overdrawn, and that for what was computed
for nothing: by many at once, since it is known only afterwards."""
TICK = 0.005
"""Seconds between two looks at those who wait."""
FORGOTTEN = 2.0
"""Seconds without a further refusal after which a caller is a new one."""
_SWEPT = 256
"""Entries up to which those of callers that are gone stay where they are."""
_tickets = itertools.count(1)

arrival: ContextVar[Arrival | None] = ContextVar("arrival", default=None)
"""Set while the work on a request begins that a door has let in."""


class Arrival:
    """A request that a door has let in: a place is kept for it until it takes one, or has an answer."""

    __slots__ = ("_admission",)

    def __init__(self, admission: Admission) -> None:
        self._admission: Admission | None = admission
        admission.arrived()

    def kept_by(self, admission: Admission) -> bool:
        """Whether this model still keeps the place."""
        return self._admission is admission

    def settle(self, admission: Admission | None = None) -> None:
        """The place is taken, or not needed. Args: admission: only if it is there that the place is kept."""
        kept = self._admission
        if kept is not None and (admission is None or admission is kept):
            self._admission = None
            kept.arriving -= 1


class Caller:
    """One connection, or whatever else can be made to wait, as a line knows it.

    Args:
        turn: called on the loop when the caller is to be listened to again, with whether there is a place for it. Tells
            whether the caller may come for that place; False: somebody else can have it.
        cost: seconds that a turn takes; 0: `turn` says so itself (`Admission.spent`).

    Attributes:
        costly: its last request was let in, and refused then.
        line: where it waits.
        met: the line in which it waited last.
    """

    __slots__ = ("cost", "costly", "faulty", "line", "met", "refusals", "since", "ticket", "turn", "turned")

    def __init__(self, turn: Callable[[bool], bool], cost: float = COST) -> None:
        self.turn = turn
        self.cost = cost
        self.since = 0.0  # when it was refused first, of the refusals in a row
        self.refusals = 0
        self.faulty = self.costly = False
        self.turned = 0.0  # when it had its last turn
        self.ticket = 0
        self.line: Admission | None = None
        self.met: Admission | None = None

    @property
    def waits(self) -> bool:
        return self.line is not None

    def leave(self) -> None:
        """The caller will not ask again."""
        if self.line is not None:
            self.line.forget(self)


class _Heap:
    """Callers by time. An entry whose ticket is no longer the caller's is passed over."""

    def __init__(self) -> None:
        self._entries: list[tuple[float, int, Caller]] = []

    def push(self, when: float, caller: Caller) -> None:
        heapq.heappush(self._entries, (when, caller.ticket, caller))

    def first(self) -> float | None:
        """The time of the first that waits."""
        entries = self._entries
        while entries and entries[0][2].ticket != entries[0][1]:
            heapq.heappop(entries)
        return entries[0][0] if entries else None

    def pop(self) -> Caller:
        """The caller that `first` spoke of."""
        return heapq.heappop(self._entries)[2]

    def sweep(self, waiting: int) -> None:
        """Lets go of entries of callers that do not wait, where these are the most."""
        if len(self._entries) > _SWEPT and len(self._entries) > 2 * waiting:
            self._entries = [entry for entry in self._entries if entry[2].ticket == entry[1]]
            heapq.heapify(self._entries)


class Admission:
    """The places of one language model, and the line of those who found none.

    Args:
        limit: generations at a time.
        on_refused: called for each request that a door refused without asking the engine.
        loop: gives the event loop that it lives on.

    Attributes:
        used: generations that were let in and have not ended.
        uploading: bytes of large bodies that come in now.
        arriving: places that are kept for requests which a door has let in.
        waiting: callers that are not listened to.
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
        self.uploading = 0
        self.waiting = 0
        self._on_refused = on_refused
        self._by_first_refusal, self._by_due = _Heap(), _Heap()
        self._offered = 0  # turns that were given because of room, and not used yet
        self._budget = self._waste = BURST
        self._looked = 0.0
        self._timer: asyncio.TimerHandle | None = None

    # The engine's side

    @property
    def room(self) -> int:
        """Generations that would be let in now."""
        return self.limit - self.used

    def enter(self) -> None:
        """Takes a place.

        Raises:
            Overloaded: there is none.
        """
        if self.used >= self.limit:
            raise Overloaded(OVERLOADED)
        self.used += 1
        if (mine := arrival.get()) is not None:
            mine.settle(self)
        elif self._offered:
            self._offered -= 1

    def leave(self) -> None:
        """Gives a place back; whoever was refused first has the next turn."""
        self.used -= 1
        if self.waiting:
            self._offer(self._loop().time())

    # The doors' side

    @property
    def full(self) -> bool:
        """Whether a request that comes now is refused."""
        return self.used + self.arriving >= self.limit

    def arrived(self) -> None:
        """A place is kept for a request."""
        self.arriving += 1
        if self._offered:
            self._offered -= 1

    def turned_away(self) -> None:
        """A door refused a request without asking the engine."""
        self._on_refused()

    def came(self, caller: Caller) -> bool:
        """A connection was made, of nobody knows whom. True: it waits to be read, since others wait too.

        In a crowd that comes anew for every request nobody is known; each waits as if it had been refused once.
        """
        if not self.full:
            return False
        now = self._refill()
        self._budget -= COST_OF_CONNECTION
        if self._budget > 0 and not self.waiting:
            return False
        caller.since = now
        self._wait(caller, now + FIRST_PAUSE, now)
        self._by_first_refusal.push(now, caller)
        return True

    def rest(self, caller: Caller, seconds: float) -> None:
        """The caller has nothing to say yet, and is listened to after a while."""
        now = self._loop().time()
        self._wait(caller, now + seconds, now)

    def barred(self, caller: Caller) -> bool:
        """Whether its requests have cost too much for nothing to be let in again now."""
        if not caller.costly or not self.used:
            return False
        self._refill()
        return self._waste <= 0

    def refused(self, caller: Caller, fault: bool = False, let_in: bool = False) -> bool:
        """The caller was told that it is refused. True: it waits, and its turn comes; False: it may ask at once.

        Args:
            fault: the request was wrong. Until one is right no place is offered to this caller, it has its pauses only.
            let_in: it was not refused at the door.
        """
        if let_in:
            caller.costly = True
            self.wasted(COST_OF_MISTAKE)
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
            self._by_first_refusal.push(caller.since, caller)
        return True

    def hold(self, caller: Caller, since: float) -> None:
        """The caller's request is here and finds no place: its turn comes, at the latest after the longest pause.

        Args:
            since: when it was refused first, of the refusals in a row, else now; loop time.
        """
        now = self._loop().time()
        caller.since = since
        self._wait(caller, now + LONGEST_PAUSE, now)
        self._by_first_refusal.push(since, caller)

    def served(self, caller: Caller) -> None:
        """The caller was let in: it has had its turn."""
        caller.refusals, caller.faulty, caller.costly = 0, False, False

    def spent(self, seconds: float) -> None:
        """So much went into refusals."""
        self._refill()
        self._budget = max(self._budget - seconds, -DEBT)

    def wasted(self, seconds: float) -> None:
        """So much computing went into a request that was then refused."""
        self._refill()
        self._waste = max(self._waste - seconds, -WASTE)

    def dropped(self, caller: Caller, size: int) -> bool:
        """So many bytes of a refused request's body were read. True: the rest waits until it can be afforded."""
        now = self._refill()
        self._budget -= size * COST_OF_BYTE
        if not self.used or caller.waits or self._budget > 0:
            return False
        self._wait(caller, now, now)
        return True

    def forget(self, caller: Caller) -> None:
        """The caller waits no more."""
        self._take_out(caller)
        self._by_first_refusal.sweep(self.waiting)
        self._by_due.sweep(self.waiting)

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
        caller.turned = now
        return caller.turn(offered)

    def _offer(self, now: float) -> None:
        """A turn for each place that is free: those first who were refused first."""
        while self._offered + self.arriving < self.room and self._by_first_refusal.first() is not None:
            kept = self.arriving
            self._offered += 1
            used = self._give_turn(self._by_first_refusal.pop(), now, True)
            if not used and self.arriving == kept and self._offered:
                self._offered -= 1

    def _look(self) -> None:
        """Turns for those whose pause is over, as far as the budget goes; and places that nobody took, once more."""
        now = self._refill()
        self._offered = 0
        self._offer(now)
        while self._budget > 0 and (due := self._by_due.first()) is not None and due <= now:
            caller = self._by_due.pop()
            self._budget -= caller.cost
            self._give_turn(caller, now, False)
        self._by_first_refusal.sweep(self.waiting)
        self._by_due.sweep(self.waiting)
        self._timer = self._loop().call_later(TICK, self._look) if self.waiting else None

    def _refill(self) -> float:
        """Adds to the budgets what the time since the last look is worth; the loop's time now."""
        now = self._loop().time()
        earned = (now - self._looked) * SHARE
        self._budget, self._waste = min(self._budget + earned, BURST), min(self._waste + earned, BURST)
        self._looked = now
        return now
