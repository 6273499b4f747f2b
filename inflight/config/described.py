"""What a model's folder says of the model, in Triton's config.pbtxt, as far as it is served by it."""

from __future__ import annotations

from typing import Any

import msgspec


class TensorConfig(msgspec.Struct, frozen=True):
    """An input or output.

    Attributes:
        datatype: of the Open Inference Protocol.
        dims: without the batch dimension; -1 is open.
        labels: of an output, for classifications, by index; empty: it has none.
    """

    name: str
    datatype: str
    dims: tuple[int, ...]
    labels: tuple[str, ...] = ()


class StateConfig(msgspec.Struct, frozen=True):
    """A tensor that a sequence carries from one request to the next: what `output` gives is the next one's `input`. It
    begins with zeros."""

    input: str
    output: str
    datatype: str
    dims: tuple[int, ...]


class SignalConfig(msgspec.Struct, frozen=True):
    """An input that tells the model of its sequence.

    Attributes:
        kind: `start`, `end`, `ready` or `corrid`, the sequence's number.
        values: what says no and what says yes.
    """

    input: str
    kind: str
    datatype: str
    values: tuple[float, float] = (0.0, 1.0)


class SequenceConfig(msgspec.Struct, frozen=True):
    """The sequences of a stateful model. Attributes: idle: seconds without a request after which one is forgotten."""

    states: tuple[StateConfig, ...] = ()
    signals: tuple[SignalConfig, ...] = ()
    idle: float = 60.0

    @property
    def inputs(self) -> tuple[str, ...]:
        """Inputs of the model that the server gives, not the caller."""
        return (*(state.input for state in self.states), *(signal.input for signal in self.signals))


class DescribedConfig(msgspec.Struct, frozen=True):
    """The description of a model beside its file.

    Attributes:
        max_batch_size: rows in one run; 0: the model has no batch dimension, or not in front.
        inputs, outputs: those that are described; the file knows the others.
        queue_delay: seconds that requests wait for a fuller run.
        instances: replicas.
        versions: as `ServerConfig.version_policy`; empty: nothing is said.
        file: of a version, where it has several; empty: nothing is said.
        queue_size: requests that may wait; 0: any.
        timeout: seconds that a request may take where it says nothing; 0: any.
        priority: the level of requests that name none.
        sequence: of a stateful model.
        told: the description as the JSON object of Triton's `ModelConfig`.
    """

    max_batch_size: int = 0
    inputs: tuple[TensorConfig, ...] = ()
    outputs: tuple[TensorConfig, ...] = ()
    queue_delay: float = 0.0
    instances: int = 1
    versions: str = ""
    file: str = ""
    queue_size: int = 0
    timeout: float = 0.0
    priority: int = 0
    sequence: SequenceConfig | None = None
    told: dict[str, Any] = {}

    def labels(self, output: str) -> tuple[str, ...]:
        """The labels of an output; empty: it has none."""
        return next((each.labels for each in self.outputs if each.name == output), ())

    @property
    def hidden(self) -> tuple[str, ...]:
        """Tensors of the file that callers neither give nor get: those of sequences, unless they are described, too."""
        if self.sequence is None:
            return ()
        told = [each.name for each in (*self.inputs, *self.outputs)]
        kept = (state.output for state in self.sequence.states)
        return tuple(name for name in (*self.sequence.inputs, *kept) if name not in told)
