"""What a worker has to load, and what it offers once that is loaded."""

from __future__ import annotations

import msgspec

from inflight.config import GeneratorConfig, RanksConfig
from inflight.contract import TensorSpec


class GraphOffer(msgspec.Struct, frozen=True):
    """One sub-graph of a loaded model, batch dimension included."""

    inputs: list[TensorSpec]
    outputs: list[TensorSpec]


class ModelOffer(msgspec.Struct, frozen=True):
    """One loaded model.

    Attributes:
        batch_size: rows in one run.
        fixed: the file fixes the batch, so short batches are padded.
        batched: the model has a batch dimension at all.
        unbatched_inputs: input indices without one.
    """

    key: str
    graphs: list[GraphOffer]
    batch_size: int
    fixed: bool
    batched: bool
    unbatched_inputs: list[int]


class MethodOffer(msgspec.Struct, frozen=True):
    """One method; its index in `Offer.methods` is how work names it.

    Attributes:
        whole: an instance is one whole call of the model, as `MethodInfo.whole`.
        execution_timeout: seconds that one call of one of its stages may take; None: the servable's; 0: any.
        model: of a hidden method: the key of the model that it runs for others; None: the servable declares the method.
        subgraph: of a hidden method: which sub-graph of the model.
    """

    name: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    queue_size: int | None
    priority: int
    timeout: float | None
    batch_size: int
    has_function_stage: bool
    whole: bool = False
    execution_timeout: float | None = None
    model: str | None = None
    subgraph: int = 0

    @property
    def hidden(self) -> bool:
        """Clients cannot reach it."""
        return self.model is not None


class GeneratorOffer(msgspec.Struct, frozen=True):
    """A language model that the servable declares; the server starts it.

    Attributes:
        key: how calls name it.
    """

    key: str
    config: GeneratorConfig


class Offer(msgspec.Struct, frozen=True):
    """All that a worker offers.

    Attributes:
        version: the version it loaded (never 0).
        own_models: it runs the models itself; else it sends model rows back to the server.
        device_type: the device that its models run on, for people to read.
        generators: language models that it declares and that run elsewhere.
    """

    version: int
    methods: list[MethodOffer]
    models: list[ModelOffer]
    own_models: bool
    device_type: str
    generators: list[GeneratorOffer] = []


class WorkerJob(msgspec.Struct, frozen=True):
    """What one worker process has to load and run.

    Attributes:
        directory, name, version: which servable; `directory` holds the folder `name`.
        model_file: a bare model file instead of a servable_config.py.
        device_id: None in an extra worker.
        own_models: load the models here.
        threads: CPU threads for its models.
        models: what the device workers offer, for a worker that does not load models itself.
        runtimes: value of INFLIGHT_RUNTIMES.
        trial_seconds: how long a trial run of a model may take; None: models are not tried.
        whole: a bare model file takes one request a call; None: find out.
        ranks: of a distributed servable: where its agents come.
        max_wait_ms: of a bare model file: how long requests wait for a fuller run.
    """

    directory: str
    name: str
    version: int
    model_file: str | None
    max_batch_size: int | None
    device_id: int | None
    device_type: str | None
    own_models: bool
    threads: int
    dec_key: bytes | None
    dec_mode: str
    models: list[ModelOffer]
    runtimes: str | None
    trial_seconds: float | None = None
    whole: bool | None = None
    ranks: RanksConfig | None = None
    max_wait_ms: float = 0.0
