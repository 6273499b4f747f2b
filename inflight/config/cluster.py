"""The configuration of a cluster, and of a number of replicas that changes."""

from __future__ import annotations

from typing import Annotated

import msgspec

from inflight.config.parse import address, cluster, resources, seconds, switch, whole
from inflight.config.setting import Setting, check
from inflight.errors import ConfigError

MAX_REPLICAS = 64


class ClusterConfig(msgspec.Struct, frozen=True):
    """The machines that models run on.

    Attributes:
        cluster: `ray:` and the address of Ray's head, or `auto`; None: this machine.
        cluster_listen: where processes of other machines come.
        cluster_tls: their connections are encrypted.
    """

    cluster: Annotated[
        str | None,
        Setting(
            "Run models on the machines of a Ray cluster: ray for the one that this machine belongs to, or "
            "ray:HOST:PORT. Needs the extra [ray].",
            cluster,
            "ray[:HOST:PORT]",
            ": this machine",
        ),
    ] = None
    cluster_listen: Annotated[
        str | None,
        Setting(
            "ip:port where processes of the cluster's machines come.",
            address,
            "ADDRESS",
            ": this machine's address in the cluster, any free port",
        ),
    ] = None
    cluster_tls: Annotated[
        bool,
        Setting(
            "Do not encrypt connections between the cluster's machines.", switch, flag="cluster-plain", opposite=True
        ),
    ] = True

    @classmethod
    def asked(cls, where: str | None, listen: str | None, plain: bool) -> ClusterConfig:
        """The machines that a script names.

        Raises:
            ConfigError: an argument that the setting does not accept.
        """
        check(cls(where, listen, not plain))
        return cls(where if where is None else cluster(where), listen, not plain)


class Scaling(msgspec.Struct, frozen=True):
    """How the number of replicas of a language model changes, and what each process of one gets on a cluster.

    Attributes:
        min_replicas, max_replicas: None: as many as `replicas`.
        queue_time: seconds that a request may wait for its first step before another replica is started.
        idle_time: seconds for which one replica fewer must have been enough before one ends.
        resources: of each process, by Ray's names; empty: one GPU where there are some, else a share of a machine.
    """

    min_replicas: Annotated[
        int | None,
        Setting(
            "Replicas of a language model that there are always.",
            whole(1, MAX_REPLICAS),
            "N",
            ": 1 with --max-replicas, else --replicas",
        ),
    ] = None
    max_replicas: Annotated[
        int | None,
        Setting(
            "Replicas of a language model that there may be; how many there are follows the queue.",
            whole(1, MAX_REPLICAS),
            "N",
            ": --replicas",
        ),
    ] = None
    queue_time: Annotated[
        float,
        Setting("Seconds that a request may wait before one more replica is started.", seconds, "SECONDS", " 1"),
    ] = 1.0
    idle_time: Annotated[
        float,
        Setting("Seconds after which a replica that is not needed ends.", seconds, "SECONDS", " 120"),
    ] = 120.0
    resources: Annotated[
        tuple[tuple[str, float], ...],
        Setting(
            "What each process of a model gets on a cluster, like cpu=8,gpu=1,memory=16g, or any resource of Ray's by "
            "its name.",
            resources,
            "NAME=N,...",
            ": one GPU where the cluster has some, else its share of the smallest machine's processors",
            flag="cluster-resources",
        ),
    ] = ()

    @property
    def scales(self) -> bool:
        """Whether the number may change."""
        return self.min_replicas is not None or self.max_replicas is not None

    def most(self, replicas: int) -> int:
        """The replicas that there may be, where `replicas` are asked for.

        Raises:
            ConfigError: fewer than `min_replicas`.
        """
        if self.max_replicas is None:
            return max(replicas, self.min_replicas or 1)
        if self.min_replicas is not None and self.min_replicas > self.max_replicas:
            raise ConfigError(
                f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}; write at most as many"
            )
        return self.max_replicas

    def least(self, most: int) -> int:
        """The replicas that there are always, of `most`."""
        return self.min_replicas or (most if self.max_replicas is None else 1)
