"""Where one worker of a servable runs: the seam between its replica and this machine, or a cluster."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from inflight.errors import StartError
from inflight.link import Arena, ArenaReader, create_file, physical_memory
from inflight.place.cluster import Cluster
from inflight.place.handle import Process
from inflight.place.local import Launch, start_worker


class PlacedWorker(NamedTuple):
    """A started worker process.

    Attributes:
        reader: of its outbox; None: it is on another machine, and all values travel in frames.
        host: that machine's address; empty: this one.
        threads: that it may use there; 0: as many as its job says.
    """

    process: Process
    reader: ArenaReader | None
    host: str = ""
    threads: int = 0


class WorkerPlace(ABC):
    """Starts one worker, as often as it is lost. One caller at a time.

    Attributes:
        elastic: `start` may wait for a machine with room for as long as it takes, and cancelling ends the wait.
    """

    elastic = False

    @abstractmethod
    async def start(self, again: bool, on_release: Callable[[int], None]) -> PlacedWorker:
        """Starts the process.

        Args:
            again: it was started before.
            on_release: of the outbox's `ArenaReader`.

        Raises:
            StartError: it could not be started.
            WorkerLost: a machine was lost meanwhile.
        """

    @abstractmethod
    def release(self) -> None:
        """Gives back what the process took; called when it has ended."""


class WorkerHere(WorkerPlace):
    """On this machine.

    Args:
        label: its name, for messages.
        launch: makes the launch with this outbox; the flag says that it was started before.
    """

    def __init__(self, label: str, launch: Callable[[int, bool], Launch]) -> None:
        self._label = label
        self._launch = launch

    async def start(self, again: bool, on_release: Callable[[int], None]) -> PlacedWorker:
        try:
            outbox = Arena(create_file("inflight-outbox", physical_memory()))
        except OSError as error:
            raise StartError(f"cannot make shared memory for worker {self._label}: {error}") from error
        try:
            reader = ArenaReader(outbox.fd, on_release)
            return PlacedWorker(start_worker(self._launch(outbox.fd, again)), reader)
        except OSError as error:
            raise StartError(f"cannot start worker {self._label}: {error}") from error
        finally:
            outbox.close()

    def release(self) -> None:
        return None


class WorkerOnCluster(WorkerPlace):
    """On a machine of a cluster.

    Args:
        name: names it in the cluster.
        label: shown in the command line, as that of `Launch`.
        needs, on_cpu: as for `Cluster.place`.
    """

    elastic = True

    def __init__(
        self, cluster: Cluster, name: str, label: Sequence[str], needs: Mapping[str, float], on_cpu: bool
    ) -> None:
        self._cluster = cluster
        self._name = name
        self._command = ["-m", "inflight.worker", *label, "--join"]
        self._needs = needs
        self._on_cpu = on_cpu
        self._group: str | None = None

    async def start(self, again: bool, on_release: Callable[[int], None]) -> PlacedWorker:
        self.release()
        self._group, (host,), (process,) = await self._cluster.place(
            self._name, [self._command], self._needs, self._on_cpu
        )
        return PlacedWorker(process, None, host.address, max(1, host.cpus))

    def release(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            self._cluster.remove(group)
