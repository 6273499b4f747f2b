"""The contract of a model back end.

A runtime turns files into a `LoadedModel`; it is imported only in the worker that needs it. It knows nothing of
instances, queues or padding: the batcher (`inflight.pipeline`) hands it whole batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from inflight.contract import Array, GraphSpec


class Exchanges(Protocol):
    """How the ranks of a distributed model exchange tensors while they run. All ranks of a group call the same methods
    in the same order. Groups are named as in the model's graph; ranks and roots are numbers within their group.

    Methods take and return C-contiguous arrays of numbers, and raise RuntimeError where an exchange fails.
    """

    def all_reduce(self, array: Array, reduction: str, group: str) -> Array:
        """[...] -> [...]: `sum`, `max`, `min` or `prod` over the ranks, on every rank."""
        ...

    def all_gather(self, array: Array, group: str) -> Array:
        """[n, ...] -> [ranks * n, ...]: all ranks' arrays, joined in rank order."""
        ...

    def reduce_scatter(self, array: Array, reduction: str, group: str) -> Array:
        """[ranks * n, ...] -> [n, ...]: this rank's part of the reduction."""
        ...

    def broadcast(self, array: Array, root: int, group: str) -> Array:
        """The root's array, on every rank."""
        ...

    def send(self, array: Array, peer: int, tag: int, group: str) -> None:
        """Begins to send; `finish` waits for it."""
        ...

    def receive(self, dtype: str, shape: tuple[int, ...], peer: int, tag: int, group: str) -> Array: ...

    def finish(self) -> None:
        """Waits until all that was sent has left."""
        ...


@dataclass(frozen=True)
class LoadRequest:
    """What to load and where.

    Attributes:
        files: absolute paths; several files are several sub-graphs of one model, by position.
        device_type: `cpu`, `gpu`, `ascend`, or None to let the runtime choose.
        device_id: index of the device of that type.
        threads: CPU threads this replica may use, so that replicas do not fight.
        options: device options of the matching device info (`precision_mode`, `provider`, ...).
        dec_key, dec_mode: key of an encrypted file and `AES-GCM`, `AES-CBC` or `SM4-CBC`.
        config_file: absolute path of a back-end specific configuration.
        target: the callable itself, for the callable runtime.
        trial: entered around runs of the graph while it is loaded (warming up), which may never end; None: it is not
            run before the first request.
        exchanges: joins the other ranks of a distributed model; called at most once, where a file exchanges tensors
            with other processes. None: such files are refused.
    """

    files: tuple[Path, ...]
    device_type: str | None = None
    device_id: int = 0
    threads: int = 1
    options: dict[str, str] = field(default_factory=dict)
    dec_key: bytes | None = None
    dec_mode: str = "AES-GCM"
    config_file: Path | None = None
    target: Callable[..., Any] | None = None
    trial: Callable[[], AbstractContextManager[None]] | None = nullcontext
    exchanges: Callable[[], Exchanges] | None = None


class LoadedModel(ABC):
    """One model on one device.

    `run` is called from one thread at a time. It must not keep, modify or return its inputs; it returns arrays that it
    will not touch again. It raises an ordinary exception on failure and stays usable afterwards.
    """

    graphs: tuple[GraphSpec, ...]
    device_type: str
    own_threads: int = 0
    """How many threads call `run` at once. 0: one, and it may be a thread that does other work too."""

    @abstractmethod
    def run(self, inputs: Sequence[Array], subgraph: int = 0) -> list[Array]:
        """Runs one batch: one C-contiguous array per input, of the dtype the graph states."""

    def close(self) -> None:  # noqa: B027 - most back ends hold nothing
        """Releases the device memory; the model is not used afterwards."""


class Runtime(ABC):
    """Loads one family of files."""

    formats: ClassVar[tuple[str, ...]]
    """Names a `declare_model(model_format=...)` may use for it, lower case."""
    suffixes: ClassVar[tuple[str, ...]]
    """File name endings it serves when no format is named."""

    @classmethod
    @abstractmethod
    def devices(cls) -> tuple[str, ...]:
        """Device types it can use on this machine, preferred first: of `ascend`, `gpu`, `cpu`."""

    @classmethod
    @abstractmethod
    def load(cls, request: LoadRequest) -> LoadedModel:
        """Loads the files, and runs the model once inside `request.trial`.

        Raises:
            StartError: the model cannot be loaded; the text says what to do.
        """
