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
from inflight.errors import DeadlineExceeded, InvalidRequest, Overloaded, Unavailable
from inflight.frontends.base import Backend, predict
from inflight.frontends.oip.mapping import from_outcomes, to_rows
from inflight.frontends.oip.tensors import DATATYPES, OipTensor

MAX_SEQUENCES = 10_000
"""Sequences of a server at a time."""
MAX_WAITING = 64
"""Requests of one sequence that wait for the one before them."""
MAX_BYTES = 4 << 30
"""Bytes of the states of all sequences beyond which none begins."""
LONGEST_ID = 1024
"""Characters of a sequence's id."""
SWEEP = 30.0
"""Seconds between two looks for sequences that nobody asks for any more."""


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
        if isinstance(id, str) and len(id) > LONGEST_ID:
            raise InvalidRequest(f"'sequence_id' of the parameters has more than {LONGEST_ID} characters")
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

    @property
    def bytes(self) -> int:
        """Bytes of its states."""
        return sum(state.nbytes for state in (self.states or {}).values())


@dataclass
class _Model:
    """The sequences of one version of a model, by id, the one that was asked for last at the end.

    Attributes:
        says: the model's description. Another one, of a model that was loaded again, ends all its sequences.
    """

    says: DescribedConfig
    idle: float
    sequences: OrderedDict[int | str, _Sequence] = field(default_factory=OrderedDict)


class Sequences:
    """The sequences of a server, for all its doors. Lives on its event loop."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._models: dict[tuple[str, int], _Model] = {}
        self._bytes = 0  # of the states of all sequences
        self._sweep: asyncio.TimerHandle | None = None

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
        if says is None or sequence is None:
            raise Unavailable(f"the model '{method.servable}' was unloaded")
        _check(method, sequence, tensors)
        own = self._own(method, says, sequence)
        kept = self._found(method, own, sequence, part)
        if kept.waiting >= MAX_WAITING:
            raise Overloaded(f"{MAX_WAITING} requests of sequence '{part.id}' wait for each other; try again later")
        kept.waiting += 1
        try:
            timeout = await _turn(kept.turn, timeout)
            try:
                before = {} if part.start else kept.states
                if before is None:  # the first one failed, or the last one was before this one
                    raise _not_begun(method, sequence, part)
                given = _states(sequence, before, method.whole)
                given += [_signal(signal, part, method.whole) for signal in sequence.signals]
                rows = to_rows(method, [*tensors, *given])
                outcomes = await predict(self._backend, method, rows, timeout=timeout)
                outputs = from_outcomes(method, outcomes)
                self._keep(own, sequence, part, kept, {output.name: output for output in outputs})
            finally:
                kept.turn.release()
        finally:
            kept.waiting -= 1
        names = wanted or [spec.name for spec in method.outputs if spec.name not in says.hidden]
        by_name = {output.name: output for output in outputs}
        return [by_name[name] for name in names]

    def _own(self, method: MethodInfo, says: DescribedConfig, sequence: SequenceConfig) -> _Model:
        """The sequences of a method's model."""
        key = (method.servable, method.version)
        own = self._models.get(key)
        if own is not None and own.says != says:
            for id in list(own.sequences):
                self._drop(own, id)
            own = None
        if own is None:
            own = self._models[key] = _Model(says, sequence.idle)
        return own

    def _found(self, method: MethodInfo, own: _Model, sequence: SequenceConfig, part: Part) -> _Sequence:
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
        self._forget()
        known = own.sequences.get(part.id)
        if known is None:
            if not part.start:
                raise _not_begun(method, sequence, part)
            self._check_room()
            known = own.sequences[part.id] = _Sequence(None, 0.0)
        _use(own, part, known)
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(SWEEP, self._swept)
        return known

    def _check_room(self) -> None:
        """Raises Overloaded where no further sequence may begin."""
        if sum(len(own.sequences) for own in self._models.values()) >= MAX_SEQUENCES:
            raise Overloaded(f"{MAX_SEQUENCES} sequences have not ended; end some with 'sequence_end'")
        if self._bytes >= MAX_BYTES:
            raise Overloaded(f"the states of sequences fill {MAX_BYTES >> 30} GiB; end some with 'sequence_end'")

    def _forget(self) -> None:
        """Forgets the sequences that nobody asked for in their time."""
        now = asyncio.get_running_loop().time()
        for own in self._models.values():
            while own.sequences:
                id, first = next(iter(own.sequences.items()))
                if now - first.used <= own.idle:
                    break
                if first.waiting:
                    first.used = now
                    own.sequences.move_to_end(id)
                else:
                    self._drop(own, id)

    def _drop(self, own: _Model, id: int | str) -> None:
        self._bytes -= own.sequences.pop(id).bytes

    def _swept(self) -> None:
        self._forget()
        self._models = {key: own for key, own in self._models.items() if own.sequences}
        loop = asyncio.get_running_loop()
        self._sweep = loop.call_later(SWEEP, self._swept) if self._models else None

    def _keep(
        self,
        own: _Model,
        sequence: SequenceConfig,
        part: Part,
        kept: _Sequence,
        outputs: Mapping[str, OipTensor],
    ) -> None:
        before = kept.bytes
        kept.states = None
        if not part.end:  # copies: what a worker gave would keep its shared memory
            kept.states = {state.input: np.array(outputs[state.output].data) for state in sequence.states}
        if own.sequences.get(part.id) is not kept:
            return  # it was forgotten meanwhile, or its model is another one now
        self._bytes += kept.bytes - before
        if part.end and kept.waiting == 1:
            self._drop(own, part.id)
        elif not part.end:
            _use(own, part, kept)


def _use(own: _Model, part: Part, kept: _Sequence) -> None:
    kept.used = asyncio.get_running_loop().time()
    own.sequences.move_to_end(part.id)


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


async def _turn(lock: asyncio.Lock, timeout: float | None) -> float | None:
    """Waits for a turn. Returns: the rest of the time in seconds."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    try:
        await asyncio.wait_for(lock.acquire(), timeout)
    except asyncio.TimeoutError:
        raise DeadlineExceeded("the requests of its sequence before it took longer than its time") from None
    return None if timeout is None else max(timeout - (loop.time() - began), 0.0)
