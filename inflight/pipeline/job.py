"""One instance on its way through a method, inside a worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from inflight.contract import Outcome, Row, TableRow, Value
from inflight.servable import MethodSpec, Ref, StageSpec

Finish = Callable[["Job", Outcome], None]


class Job:
    """An instance and what its stages have produced so far.

    Attributes:
        key: the number the server knows it by.
        slots: `slots[0]` are the method's inputs, `slots[n]` the outputs of stage n.
        position: index into `method.stages` of the stage it waits for.
        deadline: `time.monotonic()` after which nobody waits for it, or None.
        dropped: the caller left; it is finished at the next stage.
        entered: when it joined the queue it waits in.
        arrived: when the worker read it.
        finish: told the outcome, once.
    """

    __slots__ = ("arrived", "deadline", "dropped", "entered", "finish", "key", "method", "position", "slots")

    def __init__(
        self, key: int, method: MethodSpec, row: Sequence[Value], finish: Finish, deadline: float | None = None
    ) -> None:
        self.key = key
        self.method = method
        self.slots: list[Row] = [row]
        self.position = 0
        self.deadline = deadline
        self.dropped = False
        self.entered = 0.0
        self.arrived = 0.0
        self.finish = finish

    @property
    def stage(self) -> StageSpec:
        return self.method.stages[self.position]

    @property
    def subgraph(self) -> int:
        """Which sub-graph the model stage runs: 0, but for the hidden methods `@call_<model>_<subgraph>`."""
        return int(self.method.name.rpartition("_")[2]) if self.method.name.startswith("@call_") else 0

    @property
    def done(self) -> bool:
        return self.position >= len(self.method.stages)

    def inputs(self, stage: StageSpec) -> Row:
        """What the stage reads, as it stands; a stage that names no inputs reads the whole instance."""
        return self._read(stage.inputs) if stage.inputs else self.slots[0]

    def _read(self, refs: tuple[Ref, ...]) -> Row:
        """The values that `refs` name; where they are all values of one slot in order, that slot itself."""
        slots = self.slots
        slot = slots[refs[0].stage]
        if type(slot) is TableRow and is_whole(refs) and len(slot) == len(refs):
            return slot
        return [slots[ref.stage][ref.output] for ref in refs]

    def editable_inputs(self, stage: StageSpec, kept: Sequence[bool]) -> list[Value]:
        """What a Python stage reads: bytes as a uint8 array, every array writable.

        Args:
            kept: for each input, whether the value must stay as it is (`kept_inputs`); then the stage gets a copy.
        """
        row: list[Value] = []
        for ref, keep in zip(stage.inputs, kept):
            value = self.slots[ref.stage][ref.output]
            if isinstance(value, bytes):
                value = np.frombuffer(bytearray(value), np.uint8)
            elif isinstance(value, np.ndarray) and (keep or not value.flags.writeable):
                value = value.copy()
            row.append(value)
        return row

    def shared_inputs(self, stage: StageSpec) -> list[Value]:
        """The same as MindSpore Serving had it: an edit in place is seen by later stages, and in returned inputs."""
        row: list[Value] = []
        for ref in stage.inputs:
            slot = self.slots[ref.stage]
            if not isinstance(slot, list):
                slot = self.slots[ref.stage] = list(slot)
            value = slot[ref.output]
            if isinstance(value, bytes):
                # The slot keeps the bytes: a method that returns its input returns bytes.
                value = np.frombuffer(bytearray(value), np.uint8)
            elif isinstance(value, np.ndarray) and not value.flags.writeable:
                value = slot[ref.output] = value.copy()
            row.append(value)
        return row

    def advance(self, outputs: Row) -> None:
        """Takes the outputs of the current stage."""
        self.slots.append(outputs)
        self.position += 1

    def result(self) -> Row:
        """The method's outputs; a method that names none returns its last stage's."""
        if not self.method.returns:
            return self.slots[-1]
        return self._read(self.method.returns)


@lru_cache(maxsize=1024)
def is_whole(refs: tuple[Ref, ...]) -> bool:
    """Whether the refs name the first values of one slot, in order."""
    return all(ref.stage == refs[0].stage and ref.output == index for index, ref in enumerate(refs))


def kept_inputs(method: MethodSpec, stage: StageSpec) -> tuple[bool, ...]:
    """For each input of a stage, whether the value is read after it: by a later input, a later stage, the caller."""
    later = {ref for other in method.stages if other.index > stage.index for ref in _read_by(method, other)}
    # A method that names no outputs returns those of its last stage, which nobody reads before.
    later.update(method.returns)
    return tuple(ref in later or ref in stage.inputs[at + 1 :] for at, ref in enumerate(stage.inputs))


def _read_by(method: MethodSpec, stage: StageSpec) -> tuple[Ref, ...]:
    return stage.inputs or tuple(Ref(0, index) for index in range(len(method.inputs)))
