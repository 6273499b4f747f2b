"""What a server, its doors and its servables are told at their start."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

DEFAULT_HTTP = "127.0.0.1:8080"
DEFAULT_GRPC = "127.0.0.1:8081"
DEFAULT_MAX_ENQUEUED = 10_000
DEFAULT_MAX_MESSAGE_MB = 100
DEFAULT_EXECUTION_TIMEOUT = 300.0
DEFAULT_START_TIMEOUT = 1800.0
GRPC_ENGINES = ("auto", "nghttp2", "grpcio")
"""Who speaks HTTP/2 at the gRPC door: nghttp2, where the package was built with it, or grpcio's C core. `auto` is the
first of them that is there."""

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Microseconds of processor time that a control group grants in a period: what `docker run --cpus` sets."""


def processors(quota: Path = CPU_QUOTA) -> int:
    """How many this process may use: those of its affinity, at most what its control group grants."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        granted, period = quota.read_text().split()
        return max(1, min(allowed, -(-int(granted) // int(period))))
    except (OSError, ValueError, ZeroDivisionError):  # no control group of version 2, or `max`
        return allowed


@dataclass(frozen=True)
class TlsConfig:
    """PEM files of one listener. With `verify_client` a client must show a certificate signed by `custom_ca`."""

    certificate: str
    private_key: str
    custom_ca: str | None = None
    verify_client: bool = False


@dataclass(frozen=True)
class ListenConfig:
    """One listening socket: `ip:port`, or `unix:path` for gRPC."""

    address: str
    max_message_mb: int = DEFAULT_MAX_MESSAGE_MB
    tls: TlsConfig | None = None


@dataclass(frozen=True)
class RestConfig:
    """How REST routes answer.

    Attributes:
        status_codes: MindSpore Serving's routes answer errors with a status of their own, and not HTTP 200.
        predict_routes, health_routes: paths that a platform has named, beside our own.
    """

    status_codes: bool = False
    predict_routes: tuple[str, ...] = ()
    health_routes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ServableConfig:
    """One servable to start.

    Attributes:
        directory: the folder that holds the servable's folder; absolute.
        name: the servable's folder, and its name for clients.
        device_ids: one replica (worker process) for each; empty: only extra workers, on the CPU.
        version: 0 is the newest on disk.
        device_type: `ascend`, `gpu`, `cpu` or None.
        num_parallel_workers: worker processes that can run Python stages, in all.
        dec_key, dec_mode: how encrypted model files are opened.
        model_file: a bare model file served without any servable_config.py; then `directory` is its folder.
        max_batch_size: rows in one run of a bare model with a dynamic batch, or None for the default.
        execution_timeout: as the server's, for this servable; None: the server's.
    """

    directory: Path
    name: str
    device_ids: tuple[int, ...] = (0,)
    version: int = 0
    device_type: str | None = None
    num_parallel_workers: int = 0
    dec_key: bytes | None = None
    dec_mode: str = "AES-GCM"
    model_file: Path | None = None
    max_batch_size: int | None = None
    execution_timeout: float | None = None


@dataclass(frozen=True)
class RestartPolicy:
    """When a lost worker is started again.

    Attributes:
        only_proven: MindSpore Serving's rule: a worker that answered nothing since its start, or that left on
            its own, is not started again, and the last one's exit ends the server.
        first_delay, max_delay: back-off in seconds between starts that fail; a proven worker restarts at once.
    """

    only_proven: bool = False
    first_delay: float = 0.5
    max_delay: float = 30.0


@dataclass(frozen=True)
class ServerConfig:
    """What the whole server is told at its start.

    Attributes:
        max_enqueued_requests: requests in flight over the whole server before new ones are refused.
        start_timeout: seconds that a worker may take to load its servable, or the ranks their language model; None:
            any time.
        warm_up_timeout: seconds that one run of a model on made-up inputs may take when a worker starts; a worker that
            takes longer is started again without such runs.
        execution_timeout: seconds that one call of a stage's function or model may take before its worker counts as
            hung and is replaced; 0: any time.
        stop_timeout: seconds that running work may take when the server stops.
        log_dir: where each worker's output goes; None: the server's own stderr.
        restart: when a lost worker is started again.
        exit_when_lost: the server ends when no worker is left that could be restarted.
        rest: how the MindSpore Serving routes answer.
        grpc_engine: one of `GRPC_ENGINES`.
        api_key: what a caller of a model has to show, over HTTP and gRPC; None: nothing.
        cors_origins: web pages of these origins may call; `*` is any.
    """

    max_enqueued_requests: int = DEFAULT_MAX_ENQUEUED
    start_timeout: float | None = DEFAULT_START_TIMEOUT
    warm_up_timeout: float = 60.0
    execution_timeout: float = DEFAULT_EXECUTION_TIMEOUT
    stop_timeout: float = 10.0
    log_dir: Path | None = None
    restart: RestartPolicy = RestartPolicy()
    exit_when_lost: bool = False
    rest: RestConfig = RestConfig()
    grpc_engine: str = "auto"
    api_key: str | None = None
    cors_origins: tuple[str, ...] = ("*",)
