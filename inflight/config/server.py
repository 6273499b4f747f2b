"""The configuration of a server, its doors and its servables.

As in `model`, a setting's type, default, help and names are written at its field and nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from inflight.config.cluster import ClusterConfig
from inflight.config.described import DescribedConfig
from inflight.config.parse import (
    class_name,
    device_ids,
    existing_file,
    folder,
    one_of,
    seconds,
    switch,
    time_limit,
    versions,
    whole,
)
from inflight.config.ranks import DecKey, DecMode, DeviceType, RanksConfig
from inflight.config.room import RoomConfig
from inflight.config.setting import Reticent, Setting, fields_of, filled

DEFAULT_HTTP = "127.0.0.1:8080"
DEFAULT_GRPC = "127.0.0.1:8081"
DEFAULT_MAX_ENQUEUED = 10_000
DEFAULT_MAX_MESSAGE_MB = 100
DEFAULT_EXECUTION_TIMEOUT = 300.0
DEFAULT_START_TIMEOUT = 1800.0
MAX_MESSAGE_MB = 512
OFF = "off"
"""The address of a door that is not opened."""
GRPC_ENGINES = ("auto", "nghttp2", "grpcio")
"""The implementations of HTTP/2 for the gRPC door: nghttp2, if the package was built with it, or grpcio's C core.
`auto` is the first available one."""

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Microseconds of processor time that a control group grants in a period; `docker run --cpus` sets it."""


def processors(quota: Path = CPU_QUOTA) -> int:
    """The number of processors for this process: those of its affinity, at most the quota of its control group."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        granted, period = quota.read_text().split()
        return max(1, min(allowed, -(-int(granted) // int(period))))
    except (OSError, ValueError, ZeroDivisionError):  # no control group of version 2, or `max`
        return allowed


class TlsConfig(msgspec.Struct, frozen=True):
    """PEM files of one listener. With `verify_client` a client must show a certificate signed by `custom_ca`."""

    certificate: Annotated[
        str,
        Setting(
            "PEM file of the server's certificate; turns TLS on for both doors.",
            existing_file,
            "FILE",
            None,
            flag="tls-cert",
        ),
    ]
    private_key: Annotated[str, Setting("PEM file of its private key.", existing_file, "FILE", None, flag="tls-key")]
    custom_ca: Annotated[
        str | None,
        Setting("PEM file of the authority of the clients' certificates.", existing_file, "FILE", None, flag="tls-ca"),
    ] = None
    verify_client: Annotated[
        bool,
        Setting("Refuse clients without a certificate signed by --tls-ca.", switch, flag="tls-verify-client"),
    ] = False


class ListenConfig(msgspec.Struct, frozen=True):
    """One listening socket: `ip:port`, or `unix:path` for gRPC."""

    address: str
    max_message_mb: Annotated[int, Setting("Largest request, in MiB.", whole(1, MAX_MESSAGE_MB), "N")] = (
        DEFAULT_MAX_MESSAGE_MB
    )
    tls: TlsConfig | None = None

    @classmethod
    def asked(cls, address: str, values: Mapping[str, Any], tls: TlsConfig | None) -> ListenConfig | None:
        """The listener at an address, with the settings whose keys are in `values`; None for `off`."""
        return None if address.lower() == OFF else filled(cls, values, address=address, tls=tls)


class Addresses(msgspec.Struct, frozen=True):
    """Where the doors of a server listen: an address, or `off`."""

    http: Annotated[str, Setting("ip:port of the HTTP door (REST, health, metrics), or off.", str, "ADDRESS")] = (
        DEFAULT_HTTP
    )
    grpc: Annotated[str, Setting("ip:port or unix:path of the gRPC door, or off.", str, "ADDRESS")] = DEFAULT_GRPC


class RestConfig(msgspec.Struct, frozen=True):
    """The configuration of REST routes.

    Attributes:
        status_codes: MindSpore Serving's routes answer errors with the error's own status instead of HTTP 200.
        predict_routes, health_routes: further paths, named by a platform.
        tgi: OpenAI's routes answer as TGI does where the two differ.
    """

    status_codes: Annotated[
        bool, Setting("HTTP status codes for errors on /model/ routes, instead of always 200.", switch)
    ] = False
    predict_routes: tuple[str, ...] = ()
    health_routes: tuple[str, ...] = ()
    tgi: bool = False


class ServableConfig(Reticent, frozen=True):
    """One servable to start.

    Attributes:
        directory: the folder that holds the servable's folder; absolute.
        name: the servable's folder, and its name for clients.
        device_ids: one replica (worker process) for each; empty: only extra workers, on the CPU.
        version: 0 is the newest on disk.
        device_type: `ascend`, `gpu`, `cpu` or None.
        num_parallel_workers: total number of worker processes that can run Python stages.
        dec_key, dec_mode: key and mode to decrypt model files.
        model_file: a bare model file served without servable_config.py; `directory` is then its folder.
        max_batch_size: rows in one run of a bare model with a dynamic batch, or None for the default.
        execution_timeout: in seconds, for this servable; None: that of `ServerConfig`.
        ranks: of a distributed servable: where its agents come. It has one worker, whatever `device_ids` says.
        described: what the folder of a model file says of it.
        resources: of each worker process on a cluster, as in `Scaling`.
    """

    directory: Path
    name: Annotated[
        str,
        Setting(
            "Name for clients, where one model file or language model is served.",
            str,
            "NAME",
            ": the file's or directory's",
        ),
    ]
    device_ids: Annotated[tuple[int, ...], Setting("One replica (a process) for each.", device_ids, "N,N", " 0")] = (0,)
    version: Annotated[int, Setting("Version to serve; 0 is the newest on disk.", whole(0), "N")] = 0
    device_type: DeviceType = None
    num_parallel_workers: Annotated[
        int, Setting("Processes that can run Python stages, in all.", whole(0, 64), "N", flag="workers")
    ] = 0
    dec_key: DecKey = None
    dec_mode: DecMode = "AES-GCM"
    model_file: Path | None = None
    max_batch_size: Annotated[
        int | None,
        Setting(
            "Rows in one run of a model file with a dynamic batch, or of a language model.",
            whole(1),
            "N",
            " 32, and 128 of a language model",
        ),
    ] = None
    execution_timeout: float | None = None
    ranks: RanksConfig | None = None
    described: DescribedConfig | None = None
    resources: tuple[tuple[str, float], ...] = ()


class RestartPolicy(msgspec.Struct, frozen=True):
    """The policy for restarts of lost workers.

    Attributes:
        only_proven: MindSpore Serving's rule: a worker that answered nothing since its start, or that exited by
            itself, is not started again, and the exit of the last worker ends the server.
        first_delay, max_delay: back-off in seconds between starts that fail; a proven worker restarts at once.
    """

    only_proven: bool = False
    first_delay: float = 0.5
    max_delay: float = 30.0

    def after(self, delay: float) -> float:
        """The back-off behind one of `delay` seconds, or behind none."""
        return min(max(delay * 2, self.first_delay), self.max_delay)


class ServerConfig(msgspec.Struct, frozen=True):
    """The configuration of the whole server.

    Attributes:
        max_enqueued_requests: requests in flight over the whole server before new ones are refused.
        start_timeout: seconds that a worker may take to load its servable, or the ranks their language model; None:
            no limit.
        warm_up_timeout: seconds that one run of a model on made-up inputs may take when a worker starts; a worker that
            takes longer is started again without such runs.
        execution_timeout: seconds that one call of a stage's function or model may take before its worker counts as
            hung and is replaced; 0: no limit.
        stop_timeout: seconds that running work may take when the server stops.
        log_dir: folder for each worker's output; None: the server's own stderr.
        restart: when a lost worker is started again.
        exit_when_lost: the server ends when no worker is left that could be restarted.
        rest: the configuration of REST routes.
        grpc_engine: one of `GRPC_ENGINES`.
        api_key: the key that calls of models must carry, over HTTP and gRPC; None: none.
        api_keys: a file of further keys (`KeyConfig`); None: there is none.
        cors_origins: web pages of these origins may call; `*` is any.
        repositories: folders with the models that callers may load.
        admin: callers may load and unload models.
        version_policy: which versions of a model of the folders are served.
        watch: seconds between two looks at the folders; 0: nobody looks.
        drain_timeout: seconds that requests of a model may take after it was unloaded or replaced.
        room: which models of the folders are loaded when.
        cluster: the machines that models run on.
        protocols: the user's own HTTP protocols: `module:Class` of subclasses of `inflight.frontends.Door`.
    """

    max_enqueued_requests: Annotated[
        int, Setting("Requests in flight before new ones are refused.", whole(1), "N", flag="max-enqueued")
    ] = DEFAULT_MAX_ENQUEUED
    start_timeout: Annotated[
        float | None,
        Setting(
            "Seconds that a servable or a language model may take to load; meanwhile a line every 10 seconds says what "
            "it does. 0: no limit.",
            time_limit,
            "SECONDS",
            f" {DEFAULT_START_TIMEOUT:g}",
        ),
    ] = DEFAULT_START_TIMEOUT
    warm_up_timeout: Annotated[
        float,
        Setting(
            "Seconds that a trial run of a model may take at the start; then it goes on without.",
            seconds,
            "SECONDS",
            " 60",
        ),
    ] = 60.0
    execution_timeout: Annotated[
        float,
        Setting(
            "Seconds that one call of a stage's function or model may take; a worker that is at one for longer is hung "
            "and gets replaced. NAME=SECONDS is for one servable; repeat for more. 0: no limit.",
            seconds,
            "SECONDS",
            f" {DEFAULT_EXECUTION_TIMEOUT:g}",
        ),
    ] = DEFAULT_EXECUTION_TIMEOUT
    stop_timeout: Annotated[
        float,
        Setting(
            "Seconds that running requests may take at the end.",
            seconds,
            "SECONDS",
            " 10",
            tgi="graceful-termination-timeout",
        ),
    ] = 10.0
    log_dir: Annotated[
        Path | None, Setting("Directory for the workers' output.", Path, "DIR", ": the server's own stderr")
    ] = None
    restart: RestartPolicy = RestartPolicy()
    exit_when_lost: bool = False
    rest: RestConfig = RestConfig()
    grpc_engine: Annotated[
        str,
        Setting(
            "Who speaks HTTP/2 at the gRPC door: nghttp2 (the library behind curl, built in where it was found), "
            "grpcio (grpc's C core), or auto (nghttp2 where it is there, else grpcio).",
            one_of(*GRPC_ENGINES),
            "ENGINE",
        ),
    ] = "auto"
    api_key: Annotated[
        str | None,
        Setting(
            "What callers of models have to show: Authorization: Bearer KEY.",
            str,
            "KEY",
            ": nothing",
            tgi="api-key",
            secret=True,
        ),
    ] = None
    api_keys: Annotated[
        str | None,
        Setting(
            "File of API keys, each with a name, a tenant, a priority and limits: YAML, TOML or JSON. It is read again "
            "when it changes.",
            existing_file,
            "FILE",
            None,
        ),
    ] = None
    cors_origins: Annotated[
        tuple[str, ...],
        Setting(
            "Origin whose web pages may call; repeat for more.",
            str,
            "ORIGIN",
            ": any",
            flag="cors-allow-origin",
            tgi="cors-allow-origin",
            many=True,
        ),
    ] = ("*",)
    repositories: Annotated[
        tuple[Path, ...],
        Setting(
            "Folder with models that can be loaded while the server runs; repeat for more. Each model is a servable, a "
            "model file, a language model, or a folder with numbered versions of the last two.",
            folder,
            "DIR",
            None,
            flag="repository",
            many=True,
        ),
    ] = ()
    admin: Annotated[
        bool,
        Setting(
            "Callers may load and unload models; where API keys are asked for, those whose key has admin: true.",
            switch,
        ),
    ] = False
    version_policy: Annotated[
        str,
        Setting(
            "Versions of a model of the folders that are served: latest, latest:2 (the largest numbers), all, or "
            "numbers like 1,3.",
            versions,
            "VERSIONS",
        ),
    ] = "latest"
    watch: Annotated[
        float,
        Setting(
            "Seconds between two looks at the folders of models: what is new is loaded, what has changed is loaded "
            "again, what is gone is unloaded. A change is taken up when nothing has moved between two looks. 0: nobody "
            "looks.",
            seconds,
            "SECONDS",
            " 0",
        ),
    ] = 0.0
    drain_timeout: Annotated[
        float,
        Setting(
            "Seconds that requests of a model may take after it was unloaded or replaced.", seconds, "SECONDS", " 300"
        ),
    ] = 300.0
    room: RoomConfig = RoomConfig()
    cluster: ClusterConfig = ClusterConfig()
    protocols: Annotated[
        tuple[str, ...],
        Setting(
            "A protocol of one's own over HTTP, a class of inflight.frontends.Door; repeat for more.",
            class_name,
            "MODULE:CLASS",
            None,
            flag="protocol",
            many=True,
        ),
    ] = ()

    @classmethod
    def asked(cls, values: Mapping[str, Any], rest: RestConfig = RestConfig(), **fields: Any) -> ServerConfig:
        """A configuration with the settings whose keys are in `values`.

        Args:
            rest: further settings of the REST routes.
            fields: by field name; they override `values`.
        """
        routes = {name: getattr(rest, name) for name in ("predict_routes", "health_routes", "tgi")}
        told: dict[str, Any] = {
            "rest": filled(RestConfig, values, **routes),
            "room": filled(RoomConfig, values),
            "cluster": filled(ClusterConfig, values),
        }
        return filled(cls, values, **{**told, **fields})

    def with_rest(self, rest: RestConfig) -> ServerConfig:
        """The same, with another configuration of the REST routes."""
        return msgspec.structs.replace(self, rest=rest)


SERVER_SETTINGS = tuple(
    field
    for record in (Addresses, ServerConfig, RoomConfig, ListenConfig, TlsConfig, RestConfig, ClusterConfig)
    for field in fields_of(record)
)
"""All settings of a server for a command line, a file or a script."""

SERVABLE_SETTINGS = tuple(field for record in (ServableConfig, RanksConfig) for field in fields_of(record))
"""Their settings of a servable or a model file."""
