"""The declarations of a traced servable_config.py, as plain data.

The registration functions build these; the pipeline runs them. A stage names its inputs by reference: stage 0 is
the method's own inputs, stage n (from 1) the n-th `add_stage` of the method.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from inflight.config import GeneratorConfig

DEFAULT_MAX_BATCH_SIZE = 32
"""`declare_model`'s default of rows in one run of a model with a dynamic batch dimension."""


class Ref(NamedTuple):
    """Output number `output` of stage number `stage`."""

    stage: int
    output: int


@dataclass(frozen=True)
class DeviceOptions:
    """Options of one device type (`cpu`, `gpu`, `ascend`), as the device infos collect them."""

    device_type: str
    options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ranks:
    """How a distributed model is divided.

    Attributes:
        size: processes that share the model.
        stages: of its pipeline; the ranks are divided between them evenly, in order.
        pipeline: as many batches as stages may run at once; else one.
    """

    size: int
    stages: int
    pipeline: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """One `declare_model`.

    Attributes:
        key: file names joined with `;`; how stages and `Model.call` name the model.
        files: as written; relative to the version directory.
        format: lower case, or None to decide by the file's ending.
        with_batch_dim: the first dimension of every input (but the listed ones) and output is the batch.
        without_batch_dim_inputs: input indices that have no batch dimension; instances that share a run have the same.
        max_batch_size: rows in one run where the model's batch dimension is dynamic.
        thread_num: CPU threads asked for, or None.
        device_options: by device type.
        config_file: as written; absolute or relative to the servable's directory.
        target: the callable of a callable model.
        generator: the configuration of a language model, which runs in ranks of its own, not in the servable's workers.
        ranks: of a distributed model, whose parts the agents have; it has no files here.
    """

    key: str
    files: tuple[str, ...]
    format: str | None = None
    with_batch_dim: bool = True
    without_batch_dim_inputs: tuple[int, ...] = ()
    max_batch_size: int = DEFAULT_MAX_BATCH_SIZE
    thread_num: int | None = None
    device_options: dict[str, DeviceOptions] = field(default_factory=dict)
    config_file: str | None = None
    target: Callable[..., Any] | None = None
    generator: GeneratorConfig | None = None
    ranks: Ranks | None = None


@dataclass(frozen=True)
class FunctionSpec:
    """A Python stage function: `<servable>.<name>`, with the counts all its uses agree on."""

    key: str
    function: Callable[..., Any]
    inputs_count: int
    outputs_count: int
    batched: bool

    @property
    def texts(self) -> tuple[str | None, ...]:
        """For each input, `str` or `bytes` where the function's annotation says so; else None."""
        try:
            annotations = [each.annotation for each in inspect.signature(self.function).parameters.values()]
        except (TypeError, ValueError):  # a function of C without a signature
            annotations = []
        kinds = [_TEXTS.get(each) if isinstance(each, (str, type)) else None for each in annotations]
        return tuple([*kinds, *[None] * self.inputs_count][: self.inputs_count])


_TEXTS: dict[Any, str] = {str: "str", bytes: "bytes", "str": "str", "bytes": "bytes"}
"""What annotations of texts are; as text where the file postpones their evaluation."""


@dataclass(frozen=True)
class StageSpec:
    """One `add_stage`.

    Attributes:
        index: from 1.
        kind: `function` (key into functions) or `model` (key into models, sub-graph 0).
        inputs: the source of each input.
        batch_size: None: one instance a call; 0: as many as the model's batch; n: at most n.
        tag: how error texts name the stage.
    """

    index: int
    kind: Literal["function", "model"]
    key: str
    inputs: tuple[Ref, ...]
    outputs_count: int
    batch_size: int | None
    tag: str


@dataclass(frozen=True)
class MethodSpec:
    """One `register_method`.

    Attributes:
        max_wait_ms: how long a stage may wait for a fuller batch; 0: it takes the instances that wait.
        queue_size: instances that may wait in the server, or None for the server's own limit.
        priority: methods with a higher number go first.
        timeout: seconds a request may take in all, or None.
        mindspore_values: as in `register_method`.
        execution_timeout: seconds that one call of a stage may take; None: the servable's own limit; 0: no limit.
        exclusive: no other function of the servable runs while one of this method waits in `Model.call`.
        hidden: it runs a sub-graph of a model for other stages. Clients cannot call it; its name appears in logs only.
        subgraph: of a hidden method: the number of that sub-graph. Model stages of other methods run sub-graph 0.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    stages: tuple[StageSpec, ...]
    returns: tuple[Ref, ...]
    max_wait_ms: float = 0.0
    queue_size: int | None = None
    priority: int = 0
    timeout: float | None = None
    mindspore_values: bool = False
    execution_timeout: float | None = None
    exclusive: bool = False
    hidden: bool = False
    subgraph: int = 0

    @property
    def has_function_stage(self) -> bool:
        return any(stage.kind == "function" for stage in self.stages)


@dataclass(frozen=True)
class ServableSpec:
    """Everything one servable declares. `directory` holds servable_config.py (or the bare model file)."""

    name: str
    directory: Path
    models: dict[str, ModelSpec]
    functions: dict[str, FunctionSpec]
    methods: dict[str, MethodSpec]
