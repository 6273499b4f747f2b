"""Instances on their way through a method, inside a worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from inflight.contract import Array, Outcome, Row, Table, Texts, Value
from inflight.errors import Cancelled, DeadlineExceeded, InflightError
from inflight.servable import MethodSpec, Ref, StageSpec

Finish = Callable[["Submission", "Sequence[int]", "Sequence[Outcome]"], None]


class Submission:
    """Instances of one method that came together, in one message or one call of user code.

    Attributes:
        keys: the numbers that the server knows them by, one after the other.
        finish: called with the keys of some of them and their outcomes; each key comes once.
        deadlines: for each key the `time.monotonic()` after which its caller waits no more, or None; None: no key has
            a deadline.
        dropped: keys whose callers left; they are finished at their next stage.
        left: how many are not finished; counted by the code that submitted them.
        arrived: when the worker read them.
        callers: of rows that a stage calls a model with: the keys of the stage's instances, in whose time they run.
    """

    __slots__ = ("arrived", "callers", "deadlines", "dropped", "finish", "keys", "left", "method")

    def __init__(
        self,
        method: MethodSpec,
        keys: range,
        finish: Finish,
        deadlines: Sequence[float | None] | None = None,
        arrived: float = 0.0,
        callers: Sequence[int] = (),
    ) -> None:
        self.method = method
        self.keys = keys
        self.finish = finish
        self.deadlines = deadlines
        self.dropped: set[int] = set()
        self.left = len(keys)
        self.arrived = arrived
        self.callers = callers

    def ended(self, key: int, now: float) -> InflightError | None:
        """The error of an instance whose caller waits no more; None while the caller waits."""
        if key in self.dropped:
            return Cancelled("the caller left")
        deadline = self.deadlines[self.keys.index(key)] if self.deadlines is not None else None
        if deadline is not None and now > deadline:
            return DeadlineExceeded("the deadline passed while the request waited for its stage")
        return None


class Job:
    """Instances of one submission that are at the same stage, and what their stages have produced so far.

    Attributes:
        keys: their numbers, in order.
        slots: `slots[0]` are the method's inputs, `slots[n]` the outputs of stage n, one row for each instance.
        position: index into `method.stages` of the stage they wait for.
        entered: when they joined the queue they wait in.
    """

    __slots__ = ("entered", "keys", "position", "slots", "submission")

    def __init__(self, submission: Submission, keys: Sequence[int], slots: list[Sequence[Row]], position: int = 0):
        self.submission = submission
        self.keys = keys
        self.slots = slots
        self.position = position
        self.entered = 0.0

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def method(self) -> MethodSpec:
        return self.submission.method

    @property
    def stage(self) -> StageSpec:
        return self.method.stages[self.position]

    @property
    def done(self) -> bool:
        return self.position >= len(self.method.stages)

    def part(self, start: int, stop: int) -> Job:
        """The instances from `start` up to `stop`, as a job of their own."""
        job = Job(self.submission, self.keys[start:stop], [rows[start:stop] for rows in self.slots], self.position)
        job.entered = self.entered
        return job

    def without(self, errors: Mapping[int, InflightError]) -> Job:
        """The job of the other instances, once those that have an error, by index, are finished with it."""
        if not errors:
            return self
        self.submission.finish(self.submission, [self.keys[index] for index in errors], list(errors.values()))
        others = [index for index in range(len(self)) if index not in errors]
        slots: list[Sequence[Row]] = [[rows[index] for index in others] for rows in self.slots]
        return Job(self.submission, [self.keys[index] for index in others], slots, self.position)

    def inputs(self, stage: StageSpec) -> Sequence[Row]:
        """The stage's inputs, not copied; a stage that names no inputs reads all inputs of the method."""
        return self._read(stage.inputs) if stage.inputs else self.slots[0]

    def _read(self, refs: tuple[Ref, ...]) -> Sequence[Row]:
        """The values that `refs` name: columns where all of them lie in columns."""
        slots = self.slots
        if all(type(slots[ref.stage]) is Table for ref in refs):
            return Table([slots[ref.stage].columns[ref.output] for ref in refs])  # type: ignore[attr-defined]
        return [list(row) for row in zip(*(_values(slots[ref.stage], ref.output) for ref in refs))]

    def editable_inputs(self, stage: StageSpec, kept: Sequence[bool], texts: Sequence[str | None]) -> list[list[Any]]:
        """The inputs of a Python stage: bytes as the function declares them, else as a uint8 array; `Texts` as lists;
        every array writable.

        Args:
            kept: for each input, whether the value is read again (`kept_inputs`); then the stage gets a copy.
            texts: for each input, what the function declares (`FunctionSpec.texts`).
        """
        columns = [
            [_editable(value, keep, kind) for value in _values(self.slots[ref.stage], ref.output)]
            for ref, keep, kind in zip(stage.inputs, kept, texts)
        ]
        return [list(row) for row in zip(*columns)] if columns else [[] for _ in self.keys]

    def shared_inputs(self, stage: StageSpec) -> list[list[Any]]:
        """The same with MindSpore Serving's sharing: later stages, and returned inputs, see an edit in place."""
        rows: list[list[Any]] = [[] for _ in self.keys]
        for ref in stage.inputs:
            slot = [row if isinstance(row, list) else list(row) for row in self.slots[ref.stage]]
            self.slots[ref.stage] = slot
            for row, values in zip(rows, slot):
                value = values[ref.output]
                if isinstance(value, bytes):
                    # The slot keeps the bytes: a method that returns its input returns bytes.
                    value = np.frombuffer(bytearray(value), np.uint8)
                elif isinstance(value, np.ndarray) and not value.flags.writeable:
                    value = values[ref.output] = value.copy()
                row.append(value.tolist() if isinstance(value, Texts) else value)
        return rows

    def advance(self, outputs: Sequence[Row]) -> None:
        """Takes the outputs of the current stage, one row for each instance."""
        self.slots.append(outputs)
        self.position += 1

    def finish(self) -> None:
        """Ends with the method's outputs; a method that names none returns its last stage's."""
        method = self.method
        rows = self._read(method.returns) if method.returns else self.slots[-1]
        self.submission.finish(self.submission, self.keys, rows)


def _values(rows: Sequence[Row], at: int) -> list[Value]:
    """One value of each row."""
    if type(rows) is Table:
        column = rows.columns[at]
        return [column[index, ...] for index in range(len(column))]
    return [row[at] for row in rows]


def _editable(value: Value, keep: bool, kind: str | None) -> Any:
    if isinstance(value, bytes):
        if kind == "bytes":
            return value
        return np.frombuffer(bytearray(value), np.uint8)
    if isinstance(value, Texts):
        return value.tolist()
    if isinstance(value, np.ndarray) and (keep or not value.flags.writeable):
        copy: Array = value.copy()
        return copy
    return value


def kept_inputs(method: MethodSpec, stage: StageSpec) -> tuple[bool, ...]:
    """For each input of a stage, whether the value is read after it: by a later input, a later stage, the caller."""
    later = {ref for other in method.stages if other.index > stage.index for ref in _read_by(method, other)}
    # A method that names no outputs returns those of its last stage, which no stage reads.
    later.update(method.returns)
    return tuple(ref in later or ref in stage.inputs[at + 1 :] for at, ref in enumerate(stage.inputs))


def _read_by(method: MethodSpec, stage: StageSpec) -> tuple[Ref, ...]:
    return stage.inputs or tuple(Ref(0, index) for index in range(len(method.inputs)))
