"""Runs the steps of a native program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from inflight.kernels.arrays import address, aligned_floats
from inflight.kernels.layout import DecodeArrays, Integers, StepArrays, StepOutput
from inflight.tensors import Floats

MIN_ROWS = 8
"""Rows that memory for results has at least."""


class StepRunner:
    """Steps of one program. The memory of results is used again from step to step.

    Args:
        program: the native one.
        widths: of its buffers, by number.
    """

    def __init__(self, program: Any, widths: Sequence[int]) -> None:
        self._program = program
        self._widths = widths
        self._memory = StepOutput(aligned_floats(0, 0), aligned_floats(0, 0), np.empty(0, np.int64))
        self._output = self._memory
        self._decoding: DecodeArrays | None = None  # the arrays whose addresses are in `_arguments`
        self._arguments: tuple[int, ...] = ()

    def run(self, step: StepArrays, logits: int, hidden: int) -> StepOutput:
        """See `NativeProgram.run`."""
        tokens, positions, slots, at = map(_int64, (step.tokens, step.positions, step.slots, step.logits_at))
        tables = np.ascontiguousarray(step.tables, np.int32)
        reach = None if step.reach is None else _int64(step.reach)
        images = _ImageArguments(step, self._widths[hidden])
        states = _StateArguments(step)
        adapters = None if step.adapters is None else _int64(step.adapters)
        if adapters is not None and len(adapters) != len(step.lengths):
            raise ValueError(f"{len(adapters)} adapters do not fit {len(step.lengths)} rows")
        out, self._decoding = self._results(len(at), logits, hidden), None
        self._program.run(
            address(tokens),
            address(positions),
            address(slots),
            step.lengths,
            address(tables),
            address(at),
            len(tokens),
            tables.shape[1],
            len(at),
            address(out.logits),
            address(out.hidden),
            hidden,
            address(out.best),
            0 if reach is None else address(reach),
            **images.arguments,
            **states.arguments,
            adapters=0 if adapters is None else address(adapters),
        )
        return out

    def decode(self, step: DecodeArrays, append: bool, logits: int, hidden: int) -> StepOutput:
        """See `NativeProgram.decode`. The arguments are kept as long as the batch keeps its arrays."""
        if step is not self._decoding:
            self._decoding, out = step, self._results(len(step.known), logits, hidden)
            self._arguments = (
                address(step.tokens),
                step.tokens.shape[1],
                address(step.blocks),
                step.blocks.shape[1],
                address(step.known),
                address(step.computed),
                len(step.known),
                address(out.logits),
                address(out.hidden),
                hidden,
                address(out.best),
                0 if step.shift is None else address(step.shift),
                0 if step.states is None else address(step.states),
                0 if step.adapters is None else address(step.adapters),
            )
        self._program.decode(append, *self._arguments)
        return self._output

    def _results(self, rows: int, logits: int, hidden: int) -> StepOutput:
        """Arrays for the results of `rows` rows: those of the last step, or views of the memory, which may grow."""
        if self._output.logits.shape == (rows, self._widths[logits]):
            return self._output
        if len(self._memory.best) < rows or not len(self._memory.best):
            most = max(MIN_ROWS, rows)
            self._memory = StepOutput(
                aligned_floats(most, self._widths[logits]),
                aligned_floats(most, self._widths[hidden]),
                np.empty(most, np.int64),
            )
        memory = self._memory
        self._output = StepOutput(memory.logits[:rows], memory.hidden[:rows], memory.best[:rows])
        return self._output


class _StateArguments:
    """The arguments of a step of a model with recurrent layers, over arrays that this object keeps.

    Raises:
        ValueError: arrays that do not fit each other.
    """

    def __init__(self, step: StepArrays) -> None:
        self.arguments: dict[str, Any] = {}
        if step.states is None:
            return
        saves = step.saves
        self._kept = [_int64(step.states), *(() if saves is None else (_int64(saves.at), _int64(saves.to)))]
        if len(self._kept[0]) != len(step.lengths) or (saves is not None and len(saves.at) != len(saves.to)):
            raise ValueError(f"{len(step.states)} states do not fit {len(step.lengths)} rows")
        names = ("states", "save_at", "save_to")
        self.arguments = {name: address(array) for name, array in zip(names, self._kept)}
        self.arguments["saves"] = 0 if saves is None else len(saves.at)


class _ImageArguments:
    """The arguments of a step with images, over arrays that this object keeps; a step without any has none.

    Args:
        width: of the embeddings.

    Raises:
        ValueError: arrays that do not fit each other.
    """

    def __init__(self, step: StepArrays, width: int) -> None:
        self.arguments: dict[str, Any] = {}
        self._kept: list[np.ndarray[Any, Any]] = []
        count = len(step.tokens)
        for name, array, shape in (("places", step.places, (3, count)), ("until", step.until, (count,))):
            if array is not None:
                self.arguments[name] = self._keep(_int64(array), shape)
        if step.images is None:
            return
        shape = len(step.images.at), width
        self.arguments["image_at"] = self._keep(_int64(step.images.at), shape[:1])
        self.arguments["images"] = shape[0]
        self.arguments["image_rows"] = self._keep(_float32(step.images.rows), shape)
        self.arguments["added"] = [self._keep(_float32(rows), shape) for rows in step.images.added]

    def _keep(self, array: np.ndarray[Any, Any], shape: tuple[int, ...]) -> int:
        if array.shape != shape:
            raise ValueError(f"an array of images has the shape {array.shape}, not {shape}")
        self._kept.append(array)
        return address(array)


def _float32(values: Floats) -> Floats:
    return np.ascontiguousarray(values, np.float32)


def _int64(values: Integers) -> Integers:
    return np.ascontiguousarray(values, np.int64)
