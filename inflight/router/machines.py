"""The cluster that the server's processes run on, where there is one."""

from __future__ import annotations

from inflight.config import ClusterConfig
from inflight.place import Cluster


class Machines:
    """The connection to a cluster, shared by servables and language models. Lives on one event loop.

    Attributes:
        elsewhere: the configuration names a cluster.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._cluster: Cluster | None = None
        self.elsewhere = config.cluster is not None

    async def cluster(self) -> Cluster:
        """The cluster, connected; only where there is one.

        Raises:
            StartError: it does not answer.
        """
        if self._cluster is None:
            self._cluster = Cluster.of(self._config)
        await self._cluster.open()
        return self._cluster

    async def stop(self) -> None:
        """Ends the connection, and so everything that was started over it."""
        if self._cluster is not None:
            await self._cluster.stop()
