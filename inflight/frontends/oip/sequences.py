"""Sequences of requests to stateful models: what one request leaves is given to the next.

The state lies here, in the server's process, and travels with each request as further inputs. So a sequence is bound to
no replica, loses nothing when one dies, and shares runs with other sequences.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from inflight.config import DescribedConfig, SequenceConfig, SignalConfig
from inflight.contract import Array, MethodInfo
from inflight.errors import DeadlineExceeded, InvalidRequest, Overloaded
from inflight.frontends.base import Backend, predict
from inflight.frontends.oip.mapping import from_outcomes, to_rows
from inflight.frontends.oip.tensors import DATATYPES, OipTensor

MAX_SEQUENCES = 10_000
"""Sequences of a server at a time."""
MAX_WAITING = 64
"""Requests of one sequence that wait for the one before them."""


@dataclass(frozen=True)
class Part:
    """The place of a request in a sequence. Attributes: id: 0 or empty: it names none."""

    id: int | str = 0
    start: bool = False
    end: bool = False

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> Part:
        """Reads the parameters of a request.

        Raises:
            InvalidRequest: one is of another type.
        """
        id = parameters.get("sequence_id") or 0
        if isinstance(id, bool) or not isinstance(id, (int, str)):
            raise InvalidRequest("'sequence_id' of the parameters must be a whole number or a string")
        flags: list[bool] = []
        for name in ("sequence_start", "sequence_end"):
            flag = parameters.get(name) or False
            if not isinstance(flag, bool):
                raise InvalidRequest(f"'{name}' of the parameters must be true or false")
            flags.append(flag)
        return cls(id, *flags)


NO_PART = Part()


def describing(backend: Backend, method: MethodInfo) -> DescribedConfig | None:
    """What the folder of a method's model says of it; None: nothing."""
    for status in backend.servables():
        if (status.name, status.version) == (method.servable, method.version):
            return status.described
    return None


@dataclass
class _Sequence:
    """One sequence.

    Attributes:
        states: by input; None before its first request was answered and after its last one.
        used: loop time of its last request.
        waiting: requests that wait or run.
        turn: held by the one that runs.
    """

    states: dict[str, Array] | None
    used: float
    waiting: int = 0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class Sequences:
    """The sequences of a server. Lives on its event loop."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._all: OrderedDict[tuple[str, int, int | str], _Sequence] = OrderedDict()

    async def run(
        self,
        method: MethodInfo,
        part: Part,
        tensors: Sequence[OipTensor],
        timeout: float | None,
        wanted: Sequence[str] | None = None,
    ) -> list[OipTensor]:
        """Runs a request after those of its sequence that came before; returns the outputs that callers see.

        Raises:
            InflightError: the request is wrong, or was not run; then the sequence is as it was before.
        """
        says = describing(self._backend, method)
        sequence = says.sequence if says is not None else None
        assert says is not None
        assert sequence is not None, "only stateful methods come here"
        _check(method, sequence, tensors)
        kept = self._found(method, sequence, part)
        if kept.waiting >= MAX_WAITING:
            raise Overloaded(f"{MAX_WAITING} requests of sequence '{part.id}' wait for each other; try again later")
        kept.waiting += 1
        try:
            await _turn(kept.turn, timeout)
            try:
                before = {} if part.start else kept.states
                if before is None:  # the first one failed, or the last one was before this one
                    raise _not_begun(method, sequence, part)
                given = _states(sequence, before, method.whole)
                given += [_signal(signal, part, method.whole) for signal in sequence.signals]
                rows = to_rows(method, [*tensors, *given])
                outcomes = await predict(self._backend, method, rows, timeout=timeout)
                outputs = from_outcomes(method, outcomes)
                self._keep(method, sequence, part, kept, {output.name: output for output in outputs})
            finally:
                kept.turn.release()
        finally:
            kept.waiting -= 1
        names = wanted or [spec.name for spec in method.outputs if spec.name not in says.hidden]
        by_name = {output.name: output for output in outputs}
        return [by_name[name] for name in names]

    def _found(self, method: MethodInfo, sequence: SequenceConfig, part: Part) -> _Sequence:
        """The sequence of a request; a new one where it begins one.

        Raises:
            InvalidRequest: it names none, or one that has not begun.
            Overloaded: there are too many.
        """
        if not part.id:
            raise InvalidRequest(
                f"the model '{method.servable}' is stateful: give each request the parameter 'sequence_id', and the "
                "first one of a sequence 'sequence_start'"
            )
        now = asyncio.get_running_loop().time()
        key = (method.servable, method.version, part.id)
        known = self._all.get(key)
        if known is not None and not known.waiting and now - known.used > sequence.idle:
            known = None
        if known is None and not part.start:
            raise _not_begun(method, sequence, part)
        if known is None:
            self._forget(now, sequence.idle)
            known = self._all[key] = _Sequence(None, now)
        self._all.move_to_end(key)
        known.used = now
        return known

    def _forget(self, now: float, idle: float) -> None:
        while self._all:
            key, first = next(iter(self._all.items()))
            if first.waiting or now - first.used <= idle:
                break
            del self._all[key]
        if len(self._all) >= MAX_SEQUENCES:
            raise Overloaded(f"{MAX_SEQUENCES} sequences have not ended; end some with 'sequence_end'")

    def _keep(
        self,
        method: MethodInfo,
        sequence: SequenceConfig,
        part: Part,
        kept: _Sequence,
        outputs: Mapping[str, OipTensor],
    ) -> None:
        key = (method.servable, method.version, part.id)
        if part.end:
            if self._all.get(key) is kept and kept.waiting == 1:
                del self._all[key]
            kept.states = None
            return
        # Copies: what a worker gave would keep its shared memory.
        kept.states = {state.input: np.array(outputs[state.output].data) for state in sequence.states}
        kept.used = asyncio.get_running_loop().time()


def _not_begun(method: MethodInfo, sequence: SequenceConfig, part: Part) -> InvalidRequest:
    return InvalidRequest(
        f"the sequence '{part.id}' of model '{method.servable}' has not begun, or nobody asked for {sequence.idle:g} "
        "seconds: its first request needs 'sequence_start'"
    )


def _check(method: MethodInfo, sequence: SequenceConfig, tensors: Sequence[OipTensor]) -> None:
    own = next((tensor.name for tensor in tensors if tensor.name in sequence.inputs), None)
    if own is not None:
        raise InvalidRequest(f"input '{own}' of model '{method.servable}' is the server's own; leave it out")
    if not method.whole and any(tensor.shape[:1] != (1,) for tensor in tensors):
        raise InvalidRequest(f"a request to the stateful model '{method.servable}' has one instance: shape [1, ...]")


def _states(sequence: SequenceConfig, states: Mapping[str, Array], whole: bool) -> list[OipTensor]:
    """The tensors that the last request left; zeros for the first one."""
    found: list[OipTensor] = []
    for state in sequence.states:
        shape = state.dims if whole else (1, *state.dims)
        data = states.get(state.input)
        if data is None:
            data = np.zeros(shape, DATATYPES.get(state.datatype, np.dtype(np.float32)))
        found.append(OipTensor(state.input, state.datatype, data.shape, data))
    return found


def _signal(signal: SignalConfig, part: Part, whole: bool) -> OipTensor:
    dtype = DATATYPES.get(signal.datatype, np.dtype(np.int64))
    if signal.kind == "corrid":
        number = part.id if isinstance(part.id, int) else 0
        if not isinstance(part.id, int) or not 0 <= number <= np.iinfo(dtype).max:
            raise InvalidRequest(f"'sequence_id' must be a number that fits {signal.datatype}, as the model takes it")
        value: float = number
    else:
        value = signal.values[part.start if signal.kind == "start" else part.end if signal.kind == "end" else True]
    data = np.full((1,) if whole else (1, 1), value, dtype)
    return OipTensor(signal.input, signal.datatype, data.shape, data)


async def _turn(lock: asyncio.Lock, timeout: float | None) -> None:
    try:
        await asyncio.wait_for(lock.acquire(), timeout)
    except asyncio.TimeoutError:
        raise DeadlineExceeded("the requests of its sequence before it took longer than its time") from None
