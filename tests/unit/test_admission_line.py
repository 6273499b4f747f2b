"""Who is let in and who waits: the policy alone, on a clock that the test turns."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from inflight.admission import (
    BULK_SHARE,
    BURST,
    COST_OF_BULK,
    EASY_SHARE,
    FIRST_PAUSE,
    LONGEST_PAUSE,
    SHARE,
    WASTE,
    WASTE_SHARE,
    Admission,
    Arrival,
    Caller,
    arrival,
)
from inflight.contract import MethodInfo, TensorSpec
from inflight.errors import Overloaded
from inflight.frontends import Backend
from inflight.frontends.grpc.line import HoldingBackend


class Clock:
    """As much of an event loop as the policy uses."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._calls: list[tuple[float, int, Callable[[], Any]]] = []
        self._numbers = itertools.count()

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, call: Callable[[], Any]) -> Any:
        heapq.heappush(self._calls, (self.now + delay, next(self._numbers), call))
        return call

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self._calls and self._calls[0][0] <= end:
            self.now, _, call = heapq.heappop(self._calls)
            call()
        self.now = end


def client(turn: Callable[[], object] = lambda: None) -> Caller:
    """A caller that comes whenever it has its turn."""

    def called(offered: bool) -> bool:
        turn()
        return True

    return Caller(called)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def full(clock: Clock, limit: int = 1) -> Admission:
    admission = Admission(limit, loop=lambda: clock)  # type: ignore[arg-type, return-value]
    for _ in range(limit):
        admission.enter()
    return admission


def test_who_comes_beyond_the_limit_is_refused(clock: Clock) -> None:
    admission = full(clock, 2)
    assert admission.full
    with pytest.raises(Overloaded):
        admission.enter()
    admission.leave()
    assert not admission.full
    admission.enter()


def test_pauses_double_up_to_the_longest(clock: Clock) -> None:
    admission, turns = full(clock), []
    caller = client(lambda: turns.append(clock.now))
    expected = FIRST_PAUSE
    for _ in range(8):
        began = clock.now
        assert admission.refused(caller)
        assert caller.waits
        clock.run(2 * LONGEST_PAUSE)
        assert turns.pop() - began == pytest.approx(expected, abs=0.011)
        expected = min(2 * expected, LONGEST_PAUSE)
        clock.now = turns[-1] if turns else began + expected  # asks again at once
    admission.served(caller)
    admission.refused(caller)
    clock.run(2 * FIRST_PAUSE)
    assert turns, "who was let in begins again"


def test_nobody_waits_for_an_idle_model(clock: Clock) -> None:
    admission = Admission(2, loop=lambda: clock)  # type: ignore[arg-type, return-value]
    assert not admission.refused(client())


def test_a_free_place_goes_to_whoever_was_refused_first(clock: Clock) -> None:
    admission, turns = full(clock), []
    callers = [client(lambda index=index: turns.append(index)) for index in range(4)]  # type: ignore[misc]
    admission.refused(callers[0], fault=True)
    for caller in callers[1:]:
        admission.refused(caller)
        clock.run(0.001)
    callers[1].leave()
    admission.leave()
    assert turns == [2], "the first one's request was wrong, the second has left"
    admission.enter()
    admission.leave()
    assert turns == [2, 3]
    admission.enter()
    clock.run(1)
    assert turns == [2, 3, 0], "whose request was wrong is heard after its pause"


LARGE = 2_000_000


@pytest.mark.parametrize("small_too", [True, False])
def test_large_bodies_have_their_share_of_the_loop_while_small_requests_come(clock: Clock, small_too: bool) -> None:
    """Large ones would fill every place that is left; without small ones they do."""
    admission = full(clock, 16)
    let_in: list[Caller] = []

    def comes(caller: Caller) -> None:
        admission.sees(caller, large=True)
        if admission.full or admission.gorged(caller):
            admission.refused(caller)
        else:
            admission.swallows(LARGE)
            admission.enter()
            let_in.append(caller)

    callers: list[Caller] = []
    callers += [client(lambda index=index: comes(callers[index])) for index in range(20)]  # type: ignore[misc]
    for caller in callers:
        comes(caller)
    seconds = 20
    for _ in range(seconds * 10):
        if small_too:
            admission.sees(client(), large=False)
        while admission.used > 8:  # half of the generations end
            admission.leave()
        clock.run(0.1)
        for caller in callers:
            if not caller.waits:
                admission.served(caller)
                comes(caller)
    share = seconds * BULK_SHARE / (LARGE * COST_OF_BULK)
    if small_too:
        assert share * 0.8 < len(let_in) <= share + 2 * BURST / (LARGE * COST_OF_BULK) + 1
        counts = [let_in.count(caller) for caller in callers]
        assert max(counts) - min(counts) <= 2, "they take turns among each other"
    else:
        assert len(let_in) > 4 * share


def test_large_bodies_beside_small_requests_never_wait_while_places_are_free(clock: Clock) -> None:
    """Ten pictures of 5 MB at once, and then ten of 1 to 5 MB each second, beside chats on not half of the places."""
    admission = Admission(128, loop=lambda: clock)  # type: ignore[arg-type, return-value]
    for _ in range(40):
        admission.enter()
    sizes = itertools.cycle([1_000_000, 2_000_000, 5_000_000])
    for tenth in range(300):
        admission.sees(client(), large=False)
        assert not admission.crowded
        for _ in range(10 if tenth == 100 else 1):
            caller = client()
            admission.sees(caller, large=True)
            assert not admission.gorged(caller)
            admission.swallows(5_000_000 if tenth == 100 else next(sizes))
            admission.enter()
            admission.leave()
        clock.run(0.1)


def test_a_crowd_of_large_bodies_leaves_the_loop_to_small_requests(clock: Clock) -> None:
    """Also while places are free; and as soon as half of them are taken, large ones get less."""
    admission = Admission(128, loop=lambda: clock)  # type: ignore[arg-type, return-value]
    admission.enter()

    def let_in(seconds: int) -> float:
        """Seconds of the loop that large bodies took of each second."""
        taken = 0
        for _ in range(seconds * 1000):
            admission.sees(client(), large=False)
            if not admission.gorged():
                admission.swallows(LARGE)
                taken += 1
            clock.run(0.001)
        return taken * LARGE * COST_OF_BULK / seconds

    assert EASY_SHARE < let_in(20) < 1.2 * EASY_SHARE
    for _ in range(63):
        admission.enter()
    assert 0.9 * BULK_SHARE < let_in(20) < 1.2 * BULK_SHARE


def test_a_place_is_kept_for_a_request_until_it_takes_it(clock: Clock) -> None:
    admission = Admission(2, loop=lambda: clock)  # type: ignore[arg-type, return-value]
    first, second = Arrival(admission), Arrival(admission)
    assert admission.full
    second.settle()  # it was answered without a generation
    assert not admission.full
    token = arrival.set(first)
    admission.enter()
    admission.enter()  # a second choice of the same request
    arrival.reset(token)
    first.settle()
    assert (admission.used, admission.arriving) == (2, 0)


def test_the_time_for_refusals_is_bounded(clock: Clock) -> None:
    admission, turns = full(clock), []

    def again(caller: Caller) -> bool:
        turns.append(clock.now)
        return admission.refused(caller)

    for _ in range(20_000):
        caller = Caller(lambda offered: True)
        caller.turn = lambda offered, caller=caller: again(caller)  # type: ignore[misc]
        admission.refused(caller)
    clock.run(5)
    assert SHARE / 100e-6 * 4 < len(turns) < SHARE / 30e-6 * 6


def test_computing_for_nothing_is_paid_by_those_who_ask_for_it(clock: Clock) -> None:
    admission, turns = full(clock, 2), []
    admission.leave()
    honest, mistaken = client(lambda: turns.append(clock.now)), client()
    admission.refused(honest)
    admission.refused(mistaken, fault=True, let_in=True)
    assert not admission.barred(mistaken), "a mistake now and then is nothing"
    admission.wasted(3.0)
    assert admission.barred(mistaken)
    assert not admission.barred(honest)
    began = clock.now
    clock.run(0.2)
    assert turns
    assert turns[0] - began < 0.2
    assert admission.barred(mistaken)
    clock.run(WASTE / WASTE_SHARE)
    assert not admission.barred(mistaken)
    admission.wasted(3.0)
    admission.served(mistaken)
    assert not admission.barred(mistaken), "it has sent something better"


def test_a_crowd_goes_round(clock: Clock) -> None:
    """1,280 clients that ask again at once, 128 places, a quarter of a second each: all get equally much."""
    admission = Admission(128, loop=lambda: clock)  # type: ignore[arg-type, return-value]
    good, asked, waits = [0] * 1280, [0.0] * 1280, []
    callers: list[Caller] = []

    def ask(index: int) -> None:
        if admission.full:
            waits.append(clock.now - asked[index])
            asked[index] = clock.now
            assert admission.refused(callers[index])
            return
        admission.enter()
        admission.served(callers[index])
        clock.call_later(0.25, lambda: end(index))

    def end(index: int) -> None:
        admission.leave()
        good[index] += 1
        asked[index] = clock.now
        clock.call_later(0.0001, lambda: ask(index))

    def turn(index: int) -> Callable[[], None]:
        return lambda: clock.call_later(0.00001, lambda: ask(index))

    callers += [client(turn(index)) for index in range(1280)]
    for index in range(1280):
        asked[index] = clock.now
        ask(index)
    clock.run(20)
    assert sum(good) > 0.95 * 128 * 20 / 0.25
    assert min(good) >= 0.7 * max(good)
    assert sorted(waits)[int(len(waits) * 0.99)] < 1.0


def test_a_place_that_one_does_not_want_goes_to_the_next(clock: Clock) -> None:
    admission, turns = full(clock), []

    def come(index: int, wants: bool) -> Callable[[bool], bool]:
        def turn(offered: bool) -> bool:
            turns.append((index, offered))
            if wants:
                kept.append(Arrival(admission))
            return wants

        return turn

    kept: list[Arrival] = []
    for index in range(4):
        admission.refused(Caller(come(index, wants=index >= 2)))
        clock.run(0.001)
    admission.leave()
    assert turns == [(0, True), (1, True), (2, True)]
    assert admission.full
    kept[0].settle()
    clock.run(0.01)
    assert turns[3:] == [(3, True)], "it was not needed"


def test_what_each_turn_costs(clock: Clock) -> None:
    """A turn of a caller that measures by itself costs what it says."""
    admission, turns = full(clock), []

    def turn(offered: bool) -> bool:
        turns.append(clock.now)
        admission.spent(0.01)
        return False

    for _ in range(100):
        admission.refused(Caller(turn, cost=0.0))
    clock.run(5)
    assert 0.8 * 5 * SHARE / 0.01 < len(turns) < 1.2 * 5 * SHARE / 0.01 + 4


def test_what_has_left_is_let_go(clock: Clock) -> None:
    admission = full(clock)
    callers = [client() for _ in range(2000)]
    for caller in callers:
        admission.refused(caller)
    for caller in callers:
        caller.leave()
    assert admission.waiting == 0
    clock.run(1)
    assert len(admission._by_due._entries) + len(admission._by_first_refusal._entries) <= 512


@pytest.mark.parametrize("fields", [{"version": 1}, {"version": 2}, {"optional": ()}])
def test_a_call_stands_in_the_line_of_the_version_that_it_names(fields: dict[str, Any]) -> None:
    """Of the older version all places are taken, of the newest none; methods of servables have no line."""
    text, parameters = TensorSpec("inputs", "str", ()), TensorSpec("parameters", "str", ())
    more = {"version": 1, "optional": (("parameters", "{}"),), **fields}
    method = MethodInfo("lm", name="generate", inputs=(text, parameters), outputs=(text,), **more)

    async def main() -> None:
        older, newest = Admission(1), Admission(1)
        older.enter()
        generators = {"lm": SimpleNamespace(admission=newest), "lm:1": SimpleNamespace(admission=older)}
        holding = HoldingBackend(cast(Backend, SimpleNamespace(generators=generators)))
        held: list[Any] = []
        caller = holding.hold(lambda: method, lambda: "a connection", held.append)
        if fields != {"version": 1}:
            assert caller is None
            return
        assert caller is not None
        assert caller.waits
        older.leave()  # then it is the call's turn
        assert [one.kept_by(older) for one in held] == [True]

    asyncio.run(main())
